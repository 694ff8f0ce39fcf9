// The quantiser of the KV cache, and where codes and tokens live. Host and device.
//
//   q = clip(round((x - z) / delta), 0, 2^bits - 1)     x' = delta q + z
//
// delta and z are float16, rounded outward (z down, delta up), so every x of the group lies in [z, z + delta top] and
// the error is at most delta / 2. A group with a NaN gets delta = z = NaN.
//
// Codes are packed along the axis a product sums over (channels of keys, tokens of values) into 32-bit words, lane by
// lane along the other axis: code i of a lane sits bits * (i % (32 / bits)) up in word i / (32 / bits). One vector load
// holds one word of 16 lanes; `word & (top << shift)` is the code times 2^shift, and the power goes into the factor.
#pragma once

#include "vkernels/half.h"

namespace vk {

inline constexpr float kHalfMax = 65504.0f;

// float16 nearest to x that is not above it (up = false) or not below it (up = true).
VK_HD f16 half_outward(float x, bool up) {
  f16 h{f16_bits(x)};
  const float back = to_float(h);
  if (up ? back < x : back > x) {
    if ((h.bits & 0x7fffu) == 0)
      h.bits = up ? 0x0001u : 0x8001u;
    else
      h.bits = uint16_t(h.bits + (((h.bits & 0x8000u) == 0) == up ? 1 : -1));
  }
  return h;
}

struct QuantScale {
  f16 delta, zero;
  float zero_value, inverse;  // inverse is 0 where delta is 0 or NaN: every code is 0 then
};

// Of a group whose smallest and largest values, clamped to +-kHalfMax, are given; both NaN where one value is.
VK_HD QuantScale quant_scale(float smallest, float largest, int bits) {
  QuantScale s;
  s.zero = half_outward(smallest, false);
  s.zero_value = to_float(s.zero);
  s.delta = half_outward((largest - s.zero_value) / float((1 << bits) - 1), true);
  const float delta = to_float(s.delta);
  s.inverse = delta > 0.0f ? 1.0f / delta : 0.0f;
  return s;
}

VK_HD int64_t code_words(int64_t count, int64_t bits) { return (count * bits + 31) / 32; }

// The token with history index i is the i-th after the sinks.
struct CacheLayout {
  int64_t bits;  // 0: full precision
  int64_t group, residual, sinks, page;
  int64_t ring;  // history tokens kept; 0: all
};

VK_HD int64_t history_end(const CacheLayout& c, int64_t length) {
  const int64_t after = length > c.sinks ? length - c.sinks : 0;
  if (c.bits == 0) return after;
  return after > c.residual ? (after - c.residual) / c.group * c.group : 0;
}
VK_HD int64_t history_begin(const CacheLayout& c, int64_t end) { return c.ring && end > c.ring ? end - c.ring : 0; }
VK_HD int64_t history_slot(const CacheLayout& c, int64_t index) { return c.ring ? index % c.ring : index; }

}  // namespace vk
