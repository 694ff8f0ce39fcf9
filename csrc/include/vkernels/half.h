// Storage types of the two 16-bit floats and their scalar conversions (round to nearest even). Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "vkernels/host_device.h"

namespace vk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

VK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
VK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

VK_HD float to_float(float x) { return x; }
VK_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
VK_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  // Shift the exponent by multiplying: exact for subnormals too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u)));
}

VK_HD void round_to(float x, float& y) { y = x; }
VK_HD void round_to(float x, bf16& y) {
  const uint32_t u = float_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  y.bits = nan ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
VK_HD uint16_t f16_bits(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {                                  // subnormal: let the adder round
    const float shifted = bits_float(a) + bits_float(0x3f000000u);
    return uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
  }
  a += 0xc8000fffu + ((a >> 13) & 1u);  // rebias the exponent by -112 and round
  return uint16_t(sign | a >> 13);
}
VK_HD void round_to(float x, f16& y) { y.bits = f16_bits(x); }

template <class T>
VK_HD T from_float(float x) {
  T y;
  round_to(x, y);
  return y;
}

}  // namespace vk
