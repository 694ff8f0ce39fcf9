"""The online softmax, in base 2: scores arrive multiplied by scale * LOG2E."""

import math

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def finite_or_zero(top):
    """Row maxima (or lse) to subtract: 0 where a row has seen nothing, so that -inf - (-inf) never happens."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_step(s, top, total):
    """One tile of scores [rows, keys], -inf where hidden: the weights of the tile, what earlier sums must be scaled by,
    the new row maxima and the new row totals."""
    new_top = tl.maximum(top, tl.max(s, 1))
    base = finite_or_zero(new_top)
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(top - base)
    return p, keep, new_top, total * keep + tl.sum(p, 1)


@triton.jit
def natural_lse(top, total):
    """Natural logarithm of the sum of exponentials; -inf where a row has seen nothing, NaN where it has seen one."""
    return tl.where(total == 0.0, float("-inf"), (finite_or_zero(top) + tl.log2(total)) * LN2)


@triton.jit
def normalise(acc, total):
    """acc / total, and 0 for a row that has seen nothing."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
