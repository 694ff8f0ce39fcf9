"""Exact angles: fixed-point turns (2^64 to a turn, wrapping is the range reduction) to cosine and sine."""

import triton
import triton.language as tl


@triton.jit
def turns_at(pos, freq):
    """Turns * 2^64 of integer positions `pos` at frequencies `freq` (int64, as bits): the product, wrapped."""
    return pos.to(tl.int64) * freq


@triton.jit
def turns_at_real(pos, freq):
    """Turns * 2^64 of real positions, taken to 2^-32: pos * freq in 32.32 fixed point, wrapped."""
    whole = tl.floor(pos)
    fraction = ((pos - whole) * 4294967296.0).to(tl.uint64)
    high = (freq.to(tl.uint64) >> 32) * fraction
    low = ((freq.to(tl.uint64) & 0xFFFFFFFF) * fraction) >> 32
    return whole.to(tl.int64) * freq + high.to(tl.int64) + low.to(tl.int64)


@triton.jit
def cos_sin(turns):
    """Cosine and sine of `turns` / 2^64 of a full turn, each to about one unit in the last place of float32.

    The nearest quarter turn is taken off in integers; what is left, at most pi/4, needs two short polynomials.
    """
    high = (turns >> 32).to(tl.int32)
    quarter = (high + 0x20000000) >> 30  # wraps: the nearest quarter, -2..1
    x = (high - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    z = x * x
    sine = x + x * z * (-1.6666654611e-01 + z * (8.3321608736e-03 - z * 1.9515295891e-04))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-02 + z * (-1.388731625493765e-03 + z * 2.443315711809948e-05))
    odd = (quarter & 1) != 0
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((quarter + 1) & 2) != 0, -c, c)
    s = tl.where((quarter & 2) != 0, -s, s)
    return c, s
