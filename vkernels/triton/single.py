"""Single heads: one query or key that meets a whole tile, in float32, without a tensor core.

They come in the two parts of head.py.
"""

import triton
import triton.language as tl


@triton.jit
def _load_part(ptr, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, SIZE)
    return tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def load_row(ptr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both parts, float32, of the head at `ptr`."""
    a = _load_part(ptr, 0, A, D)
    if B == 0:
        return a, a
    else:  # Triton compiles whatever follows an if
        return a, _load_part(ptr, A, B, D)


@triton.jit
def store_row(ptr, a, b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The inverse of `load_row`, rounded to what `ptr` points to."""
    column = tl.arange(0, A)
    tl.store(ptr + column, a.to(ptr.dtype.element_ty), mask=column < D)
    if B > 0:
        column = A + tl.arange(0, B)
        tl.store(ptr + column, b.to(ptr.dtype.element_ty), mask=column < D)


@triton.jit
def row_dot(x_a, x_b, y_a, y_b, B: tl.constexpr):
    """The product of two heads."""
    s = tl.sum(x_a * y_a, 0)
    if B > 0:
        s += tl.sum(x_b * y_b, 0)
    return s


@triton.jit
def row_scores(x_a, x_b, y_a, y_b, B: tl.constexpr):
    """The products [rows] of every head of x [rows, d] with the one head y."""
    s = tl.sum(x_a.to(tl.float32) * y_a[None, :], 1)
    if B > 0:
        s += tl.sum(x_b.to(tl.float32) * y_b[None, :], 1)
    return s


@triton.jit
def row_mix(p, v_a, v_b, acc_a, acc_b, B: tl.constexpr):
    """acc + p v for one head acc, of weights p [rows] and heads v [rows, d]."""
    acc_a += tl.sum(p[:, None] * v_a.to(tl.float32), 0)
    if B > 0:
        acc_b += tl.sum(p[:, None] * v_b.to(tl.float32), 0)
    return acc_a, acc_b


@triton.jit
def row_spread(p, y_a, y_b, acc_a, acc_b, B: tl.constexpr):
    """acc + p y for tiles acc [rows, d], of weights p [rows] and the one head y."""
    acc_a += p[:, None] * y_a[None, :]
    if B > 0:
        acc_b += p[:, None] * y_b[None, :]
    return acc_a, acc_b
