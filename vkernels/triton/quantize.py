"""The quantiser of the KV cache, bit for bit that of csrc/include/vkernels/quantize.h.

    q = clip(round((x - zero) / delta), 0, 2^bits - 1)     x' = delta q + zero

delta and zero are float16, rounded outward (zero down, delta up). Divisions are rounded correctly, which `/` of Triton
is not, and no product is followed by a sum: nothing is left for a compiler to round otherwise.
"""

import triton
import triton.language as tl

HALF_MAX: tl.constexpr = tl.constexpr(65504.0)
ROUNDS: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to a whole number, ties to even
ROUNDS_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def half_outward(x, UP: tl.constexpr):
    """float16 nearest to x that is not below it (UP) or not above it."""
    near = x.to(tl.float16)
    back = near.to(tl.float32)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if UP:
        wrong = back < x
        beyond = tl.where((bits & 0x7FFF) == 0, 0x0001, tl.where(bits < 0x8000, bits + 1, bits - 1))
    else:
        wrong = back > x
        beyond = tl.where((bits & 0x7FFF) == 0, 0x8001, tl.where(bits < 0x8000, bits - 1, bits + 1))
    return tl.where(wrong, beyond, bits).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def quant_scale(low, high, BITS: tl.constexpr):
    """(delta, zero, zero in float32, 1 / delta) of groups between low and high, within +-HALF_MAX.

    A group that holds a NaN says high = inf: delta and zero are NaN. Its codes are 0, as those of a group of one value:
    what is returned as 1 / delta is 0.
    """
    bad = high > HALF_MAX
    zero = half_outward(low, False)
    zero_value = zero.to(tl.float32)
    delta = half_outward(tl.div_rn(high - zero_value, tl.full(low.shape, (1 << BITS) - 1, tl.float32)), True)
    codes_something = (delta.to(tl.float32) > 0.0) & ~bad
    step = tl.where(codes_something, delta.to(tl.float32), 1.0)
    inverse = tl.where(codes_something, tl.div_rn(tl.full(low.shape, 1.0, tl.float32), step), 0.0)
    nan = tl.full(low.shape, float("nan"), tl.float32).to(tl.float16)
    return tl.where(bad, nan, delta), tl.where(bad, nan, zero), zero_value, inverse


@triton.jit
def quantise(x, inside, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Codes (int32, like x; 0 where not `inside`), and delta and zero of groups along AXIS, of x in float32."""
    nan = x != x
    x = tl.minimum(tl.maximum(tl.where(nan, 0.0, x), -HALF_MAX), HALF_MAX)
    low = tl.min(tl.where(inside, x, HALF_MAX), AXIS)
    high = tl.max(tl.where(inside, tl.where(nan, float("inf"), x), -HALF_MAX), AXIS)
    delta, zero, zero_value, inverse = quant_scale(low, high, BITS)
    place = (x - tl.expand_dims(zero_value, AXIS)) * tl.expand_dims(inverse, AXIS)
    place = tl.minimum(tl.maximum(place, 0.0), (1 << BITS) - 1.0)
    codes = (place + ROUNDS).to(tl.int32, bitcast=True) - ROUNDS_BITS
    return tl.where(inside, codes, 0), delta, zero


@triton.jit
def pack_columns(codes, BITS: tl.constexpr):
    """Words [rows, columns / L] of codes [rows, columns], L = 32 / BITS: code i of a word is BITS i up."""
    L: tl.constexpr = 32 // BITS
    apart = tl.reshape(codes.to(tl.uint32), [codes.shape[0], codes.shape[1] // L, L])
    word = tl.sum(apart << (BITS * tl.arange(0, L)).to(tl.uint32)[None, None, :], 2)
    return word.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def pack_rows(codes, BITS: tl.constexpr):
    """Words [rows / L, columns] of codes [rows, columns]."""
    L: tl.constexpr = 32 // BITS
    apart = tl.reshape(codes.to(tl.uint32), [codes.shape[0] // L, L, codes.shape[1]])
    word = tl.sum(apart << (BITS * tl.arange(0, L)).to(tl.uint32)[None, :, None], 1)
    return word.to(tl.uint32).to(tl.int32, bitcast=True)
