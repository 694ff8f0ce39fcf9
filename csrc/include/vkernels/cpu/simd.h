// One vector of kLanes floats, whatever the instruction set. Include only from *_cpu.cpp files (VK_ISA is set there).
// Arithmetic is the compiler's own vector arithmetic (a * b + c contracts to FMA); the functions below are what that
// lacks. Everything has internal linkage, so no instruction set's code leaks into another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vkernels/half.h"

#define VK_INLINE static inline __attribute__((always_inline))

namespace vk::VK_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(kLanes * 4)));
typedef int32_t i32v __attribute__((vector_size(kLanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(kLanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(kLanes * 2)));

inline constexpr float kInf = std::numeric_limits<float>::infinity();

VK_INLINE f32v splat(float x) { return x - f32v{}; }  // 0 + x is an addition: it turns -0 into 0
VK_INLINE i32v splat(int32_t x) { return i32v{} + x; }
VK_INLINE i32v iota() {
  i32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
VK_INLINE f32v max(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
VK_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
VK_INLINE f32v bits_to_float(i32v x) { return (f32v)x; }

VK_INLINE float reduce_add(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}
VK_INLINE float reduce_max(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < kLanes; ++i) s = v[i] > s ? v[i] : s;
  return s;
#endif
}

// ---- loads and stores of the three storage types; count < kLanes touches only the first `count` elements ----------

VK_INLINE f32v load(const float* p) {
  f32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
VK_INLINE f32v from_bf16(u16v h) { return (f32v)(__builtin_convertvector(h, u32v) << 16); }
VK_INLINE f32v load(const bf16* p) {
  u16v h;
  memcpy(&h, p, sizeof h);
  return from_bf16(h);
}
VK_INLINE f32v load(const f16* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

VK_INLINE u16v to_bf16(f32v x) {
#if defined(__AVX512BF16__)
  return (u16v)_mm512_cvtneps_pbh((__m512)x);
#else
  const u32v u = (u32v)x;
  const u32v rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u32v nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u32v)(x == x ? rounded : nan), u16v);
#endif
}

VK_INLINE void store(float* p, f32v x) { memcpy(p, &x, sizeof x); }
VK_INLINE void store(bf16* p, f32v x) {
  const u16v h = to_bf16(x);
  memcpy(p, &h, sizeof h);
}
VK_INLINE void store(f16* p, f32v x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

template <class T>
VK_INLINE f32v load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  const __mmask16 m = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    return (f32v)_mm512_maskz_loadu_ps(m, p);
  } else if constexpr (std::is_same_v<T, bf16>) {
    return from_bf16((u16v)_mm256_maskz_loadu_epi16(m, p));
  } else {
    return (f32v)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
  }
#else
  T buffer[kLanes] = {};
  memcpy(buffer, p, sizeof(T) * static_cast<size_t>(count));
  return load(buffer);
#endif
}
template <class T>
VK_INLINE void store(T* p, f32v x, int64_t count) {
  if (count >= kLanes) return store(p, x);
#if defined(__AVX512F__)
  const __mmask16 m = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, m, (__m512)x);
  else if constexpr (std::is_same_v<T, bf16>)
    _mm256_mask_storeu_epi16(p, m, (__m256i)to_bf16(x));
  else
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  T buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, sizeof(T) * static_cast<size_t>(count));
#endif
}

// Bypasses the caches where the address allows it; for outputs larger than the last-level cache.
template <class T>
VK_INLINE void store_streaming(T* p, f32v x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if ((reinterpret_cast<uintptr_t>(p) & 63) == 0) return _mm512_stream_ps(p, (__m512)x);
  } else {
    if ((reinterpret_cast<uintptr_t>(p) & 31) == 0) {
      if constexpr (std::is_same_v<T, bf16>)
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bf16(x));
      T buffer[kLanes] __attribute__((aligned(32)));
      store(buffer, x);
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(buffer));
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if ((reinterpret_cast<uintptr_t>(p) & 31) == 0) return _mm256_stream_ps(p, (__m256)x);
  }
#endif
  store(p, x);
}

// Copies past the caches in whole lines. A line that is written in part, or by both kinds of stores, would be read from
// memory first: rows that are no multiple of a line are put together before they leave.
VK_INLINE void copy_streaming(void* to, const void* from, size_t bytes) {
#if defined(__AVX2__)
  char* y = static_cast<char*>(to);
  const char* x = static_cast<const char*>(from);
  const size_t before = (64 - (reinterpret_cast<uintptr_t>(y) & 63)) & 63, head = before < bytes ? before : bytes;
  memcpy(y, x, head);
  for (y += head, x += head, bytes -= head; bytes >= 64; y += 64, x += 64, bytes -= 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), _mm512_loadu_si512(x));
#else
    for (int half = 0; half < 64; half += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(y + half),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + half)));
#endif
  }
  memcpy(y, x, bytes);
#else
  memcpy(to, from, bytes);
#endif
}
VK_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- exp2: 2^x, relative error <= 2e-7 on [-126, 127]; smaller x (and -inf) gives 0 --------------------------------
VK_INLINE f32v exp2(f32v x) {
  const f32v lowest = splat(-126.5f);
  const i32v vanishes = x < lowest;
  const f32v clamped = max(x, lowest);
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = clamped + magic;
  const i32v n = (i32v)shifted - (i32v)magic;
  const f32v f = clamped - (shifted - magic);  // in [-0.5, 0.5]
  f32v p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const f32v scaled = (f32v)((i32v)p + (n << 23));
  return vanishes ? f32v{} : scaled;
}

}  // namespace vk::VK_ISA
