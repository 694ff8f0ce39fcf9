"""The rotation of rows of heads: angles of a block of tokens, then every pair of every head turned by them."""

import triton
import triton.language as tl

from vkernels.triton.rounding import rounded
from vkernels.triton.turns import cos_sin, turns_at, turns_at_real


@triton.jit
def position_angles(
    pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr, freq_ptr, sample, token, live, pair, PAIRS: tl.constexpr
):
    """Cosines and sines [tokens, pairs] from positions, exact. A pair that follows none of the `axes` does not turn."""
    axis = tl.load(axis_ptr + pair, mask=pair < PAIRS, other=-1)
    freq = tl.load(freq_ptr + pair, mask=pair < PAIRS, other=0)
    turning = live[:, None] & ((axis >= 0) & (axis < axes))[None, :]
    at = (sample * stride_pb + token * stride_ps)[:, None] + (tl.maximum(axis, 0) * stride_pa)[None, :]
    pos = tl.load(pos_ptr + at, mask=turning, other=0)
    if pos.dtype.is_floating():
        turns = turns_at_real(pos.to(tl.float64), freq[None, :])
    else:
        turns = turns_at(pos, freq[None, :])
    return cos_sin(tl.where(turning, turns, 0))


@triton.jit
def table(ptr, stride_b, stride_s, sample, token, live, pair, PAIRS: tl.constexpr):
    """The caller's cosines or sines, [tokens, pairs]."""
    inside = live[:, None] & (pair < PAIRS)[None, :]
    return tl.load(ptr + (sample * stride_b + token * stride_s)[:, None] + pair[None, :], mask=inside, other=0.0)


@triton.jit
def load_pairs(x_ptr, at, inside, pair, PAIRS: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr):
    """(x0, x1) of every pair in float32: [..., R] each, from heads that start at `at` [..., 1].

    BLOCKS 0: neighbours are a pair. Else the head is BLOCKS equal parts and the halves of a part pair up.
    """
    if BLOCKS == 0:
        column = tl.arange(0, 2 * R)
        both = tl.load(x_ptr + at + column, mask=inside & (column < 2 * PAIRS), other=0.0).to(tl.float32)
        x0, x1 = tl.split(tl.reshape(both, both.shape[:-1] + [R, 2]))  # noqa: RUF005 (Triton knows no star)
    else:
        half: tl.constexpr = PAIRS // BLOCKS
        column = pair if BLOCKS == 1 else (pair // half) * (2 * half) + pair % half
        inside = inside & (pair < PAIRS)
        x0 = tl.load(x_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + at + column + half, mask=inside, other=0.0).to(tl.float32)
    return x0, x1


@triton.jit
def store_pairs(y_ptr, at, y0, y1, inside, pair, PAIRS: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr):
    """The inverse of `load_pairs`, rounded to what `y_ptr` points to."""
    y0, y1 = rounded(y0, y_ptr.dtype.element_ty), rounded(y1, y_ptr.dtype.element_ty)
    if BLOCKS == 0:
        column = tl.arange(0, 2 * R)
        both = tl.reshape(tl.join(y0, y1), y0.shape[:-1] + [2 * R])  # noqa: RUF005 (Triton knows no star)
        tl.store(y_ptr + at + column, both, mask=inside & (column < 2 * PAIRS))
    else:
        half: tl.constexpr = PAIRS // BLOCKS
        column = pair if BLOCKS == 1 else (pair // half) * (2 * half) + pair % half
        inside = inside & (pair < PAIRS)
        tl.store(y_ptr + at + column, y0, mask=inside)
        tl.store(y_ptr + at + column + half, y1, mask=inside)


@triton.jit
def turn(x0, x1, c, s):
    return x0 * c - x1 * s, x1 * c + x0 * s
