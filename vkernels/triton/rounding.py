"""Rounding float32 to what memory or a product holds."""

import triton
import triton.language as tl

from vkernels import library

INTERPRETED: tl.constexpr = tl.constexpr(library.INTERPRETED)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as DTYPE, to the nearest, ties to even. The interpreter cuts float32 to bfloat16 off: there, bits do it."""
    if INTERPRETED and x.dtype == tl.float32 and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.uint32).to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(DTYPE)
