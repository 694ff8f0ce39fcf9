"""Where the tokens of an attention group lie: processing index -> row of a tensor.

FORM says at compile time what a mask plan holds: bit i for tensor i of `TENSORS`, and PACKED where groups are
packed: then they lie end to end, index i is token i % length of group i // length, and a tile holds many short groups.

A side (queries 0, keys 1) is (row map, tokens, length of a group, group stride, token stride).
"""

import triton
import triton.language as tl

TENSORS = ("q_rows", "k_rows", "q_count", "k_count", "ranges", "q_attr", "k_attr", "q_global", "k_global")
PACKED: tl.constexpr = tl.constexpr(512)  # the highest of the bits


@triton.jit
def token_rows(i, live, side, group, SIDE: tl.constexpr, FORM: tl.constexpr):
    """Rows, int64, of processing indices `i`. Whatever a row map holds, its rows exist; of indices that are not live,
    they may not."""
    rows_ptr, tokens, length, group_stride, token_stride = side
    if (FORM >> SIDE) & 1:
        row = tl.load(rows_ptr + i, mask=live, other=0)
        return tl.minimum(tl.maximum(row, 0), tokens - 1).to(tl.int64)
    elif FORM >= PACKED:
        return (i // length).to(tl.int64) * group_stride + (i % length).to(tl.int64) * token_stride
    else:
        return group.to(tl.int64) * group_stride + i.to(tl.int64) * token_stride


@triton.jit
def live_tokens(count_ptr, length, SIDE: tl.constexpr, FORM: tl.constexpr):
    """How many of the `length` tokens of a side are not dropped."""
    if (FORM >> (2 + SIDE)) & 1:
        return tl.minimum(tl.maximum(tl.load(count_ptr), 0), length)
    else:
        return length


@triton.jit
def place(tiles, groups, heads):
    """(tile, group, head, sample) of this program on an axis without end: tiles of one head run side by side, and share
    in L2 what they read."""
    at = tl.program_id(0)
    rest = at // tiles
    return at % tiles, rest % groups, rest // groups % heads, (rest // groups // heads).to(tl.int64)
