"""Heads of any size as two power-of-two parts: 72 = 64 + 8 of a masked 16, 80 = 64 + 16, 88 = 64 + 24 of 32, 128 = 128.

A head padded to the next power of two wastes up to half of its products. In two parts a head of 72 costs 80 columns,
not 128. Wide heads are halved: every warp holds its rows of a part whole for a product, and those of float32 twice, as
tf32 halves. `B == 0` says that there is no second part; then part b is part a again, and nobody reads it.
"""

from functools import cache

import triton
import triton.language as tl

from vkernels.triton.launch import power_of_2
from vkernels.triton.matmul import dot
from vkernels.triton.rounding import rounded


@cache
def parts(d: int, widest: int) -> tuple[int, int]:
    """(A, B): the columns of the two parts of a head of `d`; B = 0 where one part does as well, and is not wider than
    `widest`."""
    whole = max(16, power_of_2(d))
    a = whole // 2
    b = max(16, power_of_2(d - a)) if d > a else 0
    return (a, b) if a >= 16 and (0 < b < a or whole > widest) else (whole, 0)


@triton.jit
def _load_part(ptr, at, live, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > D:
        return tl.load(ptr + at[:, None] + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0)
    return tl.load(ptr + at[:, None] + column[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _store_part(ptr, at, live, x, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, SIZE)
    inside = live[:, None] & (column < D)[None, :] if FIRST + SIZE > D else live[:, None]
    tl.store(ptr + at[:, None] + column[None, :], rounded(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_head(ptr, at, live, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both parts of heads that start at elements `at` [rows]; rows that are not live, and columns past D, are 0."""
    a = _load_part(ptr, at, live, 0, A, D)
    if B == 0:
        return a, a
    else:  # Triton compiles whatever follows an if
        return a, _load_part(ptr, at, live, A, B, D)


@triton.jit
def store_head(ptr, at, live, a, b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The inverse of `load_head`, rounded to what `ptr` points to."""
    _store_part(ptr, at, live, a, 0, A, D)
    if B > 0:
        _store_part(ptr, at, live, b, A, B, D)


@triton.jit
def zero_head(ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Two float32 parts of zeros, to sum into."""
    a = tl.zeros([ROWS, A], tl.float32)
    if B == 0:
        return a, a
    else:
        return a, tl.zeros([ROWS, B], tl.float32)


@triton.jit
def scores(q_a, q_b, k_a, k_b, B: tl.constexpr):
    """q k^T over both parts of the head: [rows of q, rows of k], float32."""
    s = dot(q_a, tl.trans(k_a))
    if B > 0:
        s += dot(q_b, tl.trans(k_b))
    return s


@triton.jit
def mix(p, v_a, v_b, acc_a, acc_b, B: tl.constexpr):
    """acc + p v for both parts of the head; p [rows, rows of v] is rounded to the dtype of v, as a product needs it."""
    p = rounded(p, v_a.dtype)
    acc_a += dot(p, v_a)
    if B > 0:
        acc_b += dot(p, v_b)
    return acc_a, acc_b
