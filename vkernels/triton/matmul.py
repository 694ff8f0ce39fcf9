"""Products of tiles with float32 sums."""

import triton
import triton.language as tl

from vkernels import library

INTERPRETED: tl.constexpr = tl.constexpr(library.INTERPRETED)


@triton.jit
def dot(x, y):
    """x [i, k] times y [k, j], summed in float32; float32 inputs as three tf32 products, which keep 22 bits.

    The interpreter multiplies bfloat16 tiles wrongly, so they are widened there: the products are the same.
    """
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    if x.dtype == tl.float32:
        return tl.dot(x, y, input_precision="tf32x3")
    return tl.dot(x, y)
