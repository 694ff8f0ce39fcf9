"""LayerNorm and RMSNorm of rows that lie in registers: float32 tiles [rows, columns], 0 in columns past `C`."""

import triton
import triton.language as tl


@triton.jit
def row_statistics(u, inside, eps, C: tl.constexpr, LAYER: tl.constexpr):
    """(mean, 1 / deviation) [rows, 1] over the columns that are `inside`; RMSNorm has no mean."""
    if LAYER:
        mean = tl.sum(u, 1, keep_dims=True) / C
        apart = tl.where(inside, u - mean, 0.0)
    else:
        mean = tl.zeros([u.shape[0], 1], tl.float32)
        apart = u
    return mean, tl.rsqrt(tl.sum(apart * apart, 1, keep_dims=True) / C + eps)


@triton.jit
def gradient_means(g, unit, C: tl.constexpr, LAYER: tl.constexpr):
    """What `norm_gradient` needs of whole rows [rows, 1]: the means of g * unit and, for LayerNorm, of g."""
    mixed = tl.sum(g * unit, 1, keep_dims=True) / C
    plain = tl.sum(g, 1, keep_dims=True) / C if LAYER else tl.zeros([g.shape[0], 1], tl.float32)
    return mixed, plain


@triton.jit
def norm_gradient(g, unit, deviation, mixed, plain):
    """The gradient of u from `g`, that of unit = (u - mean) * deviation: what moves mean and deviation is taken off."""
    return (g - unit * mixed - plain) * deviation
