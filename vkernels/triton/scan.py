"""Counting along a row: how many before me, how many below me. Deterministic: no atomics."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def sum_of(ptr, first, last, BLOCK: tl.constexpr):
    """The sum of elements first .. last of an int32 row; one program, BLOCK at a time."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at, mask=at < last, other=0)
    return tl.sum(total, 0)


@triton.jit
def exclusive_count(flag):
    """How many of `flag` [BLOCK], int32 zeros and ones, stand before each."""
    return tl.cumsum(flag, 0) - flag


@triton.jit
def count_below(ptr, at, stride, length, value, live, steps, OR_EQUAL: tl.constexpr):
    """How many of `length` ascending numbers at elements at, at + stride, ... are below `value` (or equal to it), by
    binary search: one search per lane, `steps` of them enough for the longest. Reads nothing outside the row, whatever
    the numbers are. int64; 0 where not live."""
    low = tl.zeros_like(value).to(tl.int64)
    high = tl.where(live, low + length, low)
    for _ in range(steps):
        middle = (low + high) >> 1
        undecided = low < high
        x = tl.load(ptr + at + middle * stride, mask=undecided, other=0).to(tl.int64)
        above = (x <= value) if OR_EQUAL else (x < value)
        low = tl.where(undecided & above, middle + 1, low)
        high = tl.where(undecided & (above == 0), middle, high)
    return low
