"""Where the tokens of short sequences lie: sequence (outer, inner) of a sample holds `length` tokens; token i of it is

    first + outer * stride_outer + inner * stride_inner + (i // run) * stride_run + i % run * stride_token

so the frames of one patch, the patches of one frame, or those of several frames far apart are read where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Sequences:
    """The numbers of the formula above, in token rows."""

    first: int
    outer: int
    inner: int
    length: int
    run: int
    stride_outer: int
    stride_inner: int
    stride_run: int
    stride_token: int

    @property
    def count(self) -> int:
        """Sequences of one sample."""
        return self.outer * self.inner

    @property
    def runs(self) -> bool:
        """Whether a sequence is more than one run, so that rows cost a division."""
        return self.run < self.length

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        return self.first, self.run, self.stride_outer, self.stride_inner, self.stride_run, self.stride_token


@triton.jit
def token_rows(i, run, stride_run, stride_token, RUNS: tl.constexpr, WIDE: tl.constexpr):
    """Token rows of tokens `i` of a sequence, counted from its first. WIDE: elements take 64 bits to count; where
    32 do, addresses take half the registers."""
    if WIDE:
        i = i.to(tl.int64)
    if RUNS:
        return i // run * stride_run + i % run * stride_token
    else:  # Triton compiles whatever follows an if
        return i * stride_token


@triton.jit
def first_row(outer, inner, first, stride_outer, stride_inner):
    """Token row, int64, of the first token of a sequence."""
    return first + outer.to(tl.int64) * stride_outer + inner.to(tl.int64) * stride_inner


@triton.jit
def pack(tile, length, sequences, ROWS: tl.constexpr):
    """Whole sequences packed into a tile of ROWS: per row which of the tile's sequences, which of all, which token of
    it, and whether there is one."""
    row = tl.arange(0, ROWS)
    packed = ROWS // length
    slot = row // length
    sequence = tile * packed + slot
    return slot, sequence, row % length, (slot < packed) & (sequence < sequences)
