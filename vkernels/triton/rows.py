"""Where the tokens of an attention group lie: processing index -> row of a tensor.

A side of an attention problem is (row map or None, tokens, length of a group, group stride, token stride). Packed
groups lie end to end: index i is token i % length of group i // length, so that one tile holds many short groups.
"""

import triton
import triton.language as tl


@triton.jit
def token_rows(i, live, side, group, PACKED: tl.constexpr):
    """Rows, int64, of processing indices `i`. Whatever a row map holds, its rows exist; of indices that are not live,
    they may not."""
    rows_ptr, tokens, length, group_stride, token_stride = side
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i, mask=live, other=0)
        return tl.minimum(tl.maximum(row, 0), tokens - 1).to(tl.int64)
    elif PACKED:
        return (i // length).to(tl.int64) * group_stride + (i % length).to(tl.int64) * token_stride
    else:
        return group.to(tl.int64) * group_stride + i.to(tl.int64) * token_stride


@triton.jit
def live_tokens(count_ptr, length):
    """How many of the `length` tokens of a side are not dropped."""
    if count_ptr is None:
        return length
    else:
        return tl.minimum(tl.maximum(tl.load(count_ptr), 0), length)


@triton.jit
def of_sample(ptr, sample, size, per_sample, BIT: tl.constexpr):
    """A mask tensor at its sample, `size` elements each; bit BIT of `per_sample` is 0 where samples share it."""
    if ptr is None:
        return ptr
    else:
        return ptr + sample * size * ((per_sample >> BIT) & 1)


@triton.jit
def place(tiles, groups, heads):
    """(tile, group, head, sample) of this program on an axis without end: tiles of one head run side by side, and share
    in L2 what they read."""
    at = tl.program_id(0)
    rest = at // tiles
    return at % tiles, rest % groups, rest // groups % heads, (rest // groups // heads).to(tl.int64)
