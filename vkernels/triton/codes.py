"""Products with packed codes, without unpacking a tile: one product per place of a code inside its word.

A word holds 32 / bits codes along the axis that is summed. A tile of words, shifted by i places, is one of every L-th
element of that axis, as a product wants it: unpacking is a shift and a mask in the register that held the word, and the
other factor is cut into the same L planes once. Few words are loaded F times over, F L = 32 / bits, so that a plane has
the 16 rows of a tensor core:

    plane i, row r  =  element r L + i  =  word r / F, place (r mod F) L + i
"""

import triton
import triton.language as tl

from vkernels.triton.matmul import dot


@triton.jit
def planes(x, L: tl.constexpr):
    """The L planes [rows, r] of x [rows, r L]: plane i holds columns i, L + i, 2 L + i, ..."""
    out = (x,)
    for level in tl.static_range(5):
        if (1 << level) < L:
            low, high = (), ()
            for i in tl.static_range(1 << level):
                a, b = tl.split(tl.reshape(out[i], [x.shape[0], x.shape[1] >> (level + 1), 2]))
                low, high = low + (a,), high + (b,)  # type: ignore[assignment]  # noqa: RUF005
            out = low + high  # type: ignore[assignment]
    return out


@triton.jit
def load_words(ptr, row_stride, columns, WORDS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, LANES: tl.constexpr):
    """Tile [K, LANES] of words, each in F rows; zeros past WORDS words and past `columns` lanes."""
    word = tl.arange(0, K) // F
    lane = tl.arange(0, LANES)
    inside = (word < WORDS)[:, None] & (lane < columns)[None, :]
    return tl.load(ptr + word[:, None] * row_stride + lane[None, :], mask=inside, other=0)


@triton.jit
def codes_at(words, i: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, L: tl.constexpr, dtype):
    """Plane i of a tile of words, less `middle(BITS)`: whole numbers that every dtype holds exactly."""
    place = (tl.arange(0, K) % F) * L + i
    code = (words >> (place * BITS)[:, None]) & ((1 << BITS) - 1)
    if dtype == tl.float16:  # 0x6400 is 1024, whose last bit is worth 1: no conversion of integers is needed
        return (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024 + (1 << (BITS - 1)))
    else:
        return (code - (1 << (BITS - 1))).to(dtype)


@triton.jit
def unit_rows(q):
    """(rows of q below 1, the powers of two they were divided by). float32 stays as it is.

    In float16, which holds the digits of a bfloat16: its product with a delta, itself float16, keeps 11 bits and cannot
    overflow.
    """
    if q.dtype == tl.float32:
        return q, tl.full([q.shape[0]], 1.0, tl.float32)
    else:
        q = q.to(tl.float32)
        exponent = tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000
        norm = (exponent + 0x00800000).to(tl.float32, bitcast=True)
        return (q / norm[:, None]).to(tl.float16), norm


@triton.jit
def add_codes(acc, factors, words, BITS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, L: tl.constexpr):
    """acc + factor @ (codes - middle): `factors` are the planes [rows, K] of the factor.

    A code is exact in tf32, so a float32 factor costs two products: its first 11 bits, and the rest.
    """
    for i in tl.static_range(L):
        codes = codes_at(words, i, BITS, K, F, L, factors[i].dtype)
        if codes.dtype == tl.float32:
            high = (factors[i].to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc = tl.dot(high, codes, acc, input_precision="tf32")
            acc = tl.dot(factors[i] - high, codes, acc, input_precision="tf32")
        else:
            acc += dot(factors[i], codes)
    return acc
