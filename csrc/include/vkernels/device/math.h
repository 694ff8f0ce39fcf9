// Approximate functions of the hardware, bits counted, and rounding to the 16-bit floats two at a time.
#pragma once

#include <cmath>

#include "vkernels/device/memory.h"

namespace vk::device {

// 2^x, within 2 units in the last place; 0 for -inf.
VK_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

VK_DEVICE float log2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

VK_DEVICE int popcount(uint32_t x) {
#if defined(__CUDACC__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// Two values in one register, `low` in the lower half.
VK_DEVICE uint32_t round_two(float low, float high, bf16) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return from_float<bf16>(low).bits | uint32_t(from_float<bf16>(high).bits) << 16;
#endif
}
VK_DEVICE uint32_t round_two(float low, float high, f16) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return f16_bits(low) | uint32_t(f16_bits(high)) << 16;
#endif
}

VK_DEVICE void widen_two(uint32_t r, float& low, float& high, bf16) {
  low = bits_float(r << 16);
  high = bits_float(r & 0xffff0000u);
}
VK_DEVICE void widen_two(uint32_t r, float& low, float& high, f16) {
#if defined(__CUDACC__)
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(r));
#else
  low = to_float(f16{uint16_t(r)});
  high = to_float(f16{uint16_t(r >> 16)});
#endif
}

// One value, by the hardware's conversion.
template <class T>
VK_DEVICE float widen_one(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    float low, high;
    widen_two(x.bits, low, high, T{});
    return low;
  }
}
template <class T>
VK_DEVICE T narrow_one(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T{static_cast<uint16_t>(round_two(x, 0.0f, T{}))};
}

// A vector of T as floats, and back with one rounding.
template <class T>
VK_DEVICE void widen(const Vector& v, float (&x)[kLanesOf<T>]) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) x[i] = bits_float(v.word[i]);
  } else {
    for (int i = 0; i < 4; ++i) widen_two(v.word[i], x[2 * i], x[2 * i + 1], T{});
  }
}
template <class T>
VK_DEVICE Vector narrow(const float (&x)[kLanesOf<T>]) {
  Vector v;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) v.word[i] = float_bits(x[i]);
  } else {
    for (int i = 0; i < 4; ++i) v.word[i] = round_two(x[2 * i], x[2 * i + 1], T{});
  }
  return v;
}

}  // namespace vk::device
