// The arithmetic of one head of one short sequence, on packed rows. See short_attention_kernel.h.
#pragma once

#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace short_attention {
namespace {

constexpr int kHalf = kLanes / 2;                    // keys of one score vector; it holds 2 queries x kHalf keys
constexpr int kRowTile = kHalf < 4 ? kHalf : 4;      // output rows of one product tile
constexpr int kColTile = kLanes == 16 ? 4 : 2;       // vectors of one product tile
constexpr int64_t kQueryBlock = 32;                  // queries whose scores are alive at once
constexpr int64_t kAhead = 6;                        // row pieces prefetched ahead: less than the ways of a cache set
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // larger outputs bypass the caches

VK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Keeps a loaded value in a register: the compiler would rather load it again for each of its uses, and loads are what
// these loops run out of first.
VK_INLINE f32v hold(f32v x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#endif
  return x;
}

// ---- vector pieces ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
#define VK_UNPACK_LO32(a, b) (f32v) _mm512_unpacklo_ps((__m512)(a), (__m512)(b))
#define VK_UNPACK_HI32(a, b) (f32v) _mm512_unpackhi_ps((__m512)(a), (__m512)(b))
#define VK_UNPACK_LO64(a, b) (f32v) _mm512_unpacklo_pd((__m512d)(a), (__m512d)(b))
#define VK_UNPACK_HI64(a, b) (f32v) _mm512_unpackhi_pd((__m512d)(a), (__m512d)(b))
#else
#if defined(__AVX2__)
#define VK_UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define VK_UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define VK_UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define VK_UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define VK_UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define VK_UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define VK_UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define VK_UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif
#endif

// Lane i of the result is the sum of the lanes of v[i].
VK_INLINE f32v transposed_sum(const f32v (&v)[kLanes]) {
  f32v quad[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const f32v ab = VK_UNPACK_LO32(v[4 * i], v[4 * i + 1]) + VK_UNPACK_HI32(v[4 * i], v[4 * i + 1]);
    const f32v cd = VK_UNPACK_LO32(v[4 * i + 2], v[4 * i + 3]) + VK_UNPACK_HI32(v[4 * i + 2], v[4 * i + 3]);
    quad[i] = VK_UNPACK_LO64(ab, cd) + VK_UNPACK_HI64(ab, cd);
  }
#if defined(__AVX512F__)
  const __m512 q0 = (__m512)quad[0], q1 = (__m512)quad[1], q2 = (__m512)quad[2], q3 = (__m512)quad[3];
  const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(q0, q1, 0x88), _mm512_shuffle_f32x4(q0, q1, 0xdd));
  const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(q2, q3, 0x88), _mm512_shuffle_f32x4(q2, q3, 0xdd));
  return (f32v)_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
#elif defined(__AVX2__)
  const __m256 q0 = (__m256)quad[0], q1 = (__m256)quad[1];
  return (f32v)_mm256_add_ps(_mm256_permute2f128_ps(q0, q1, 0x20), _mm256_permute2f128_ps(q0, q1, 0x31));
#else
  return quad[0];
#endif
}

// The lanes of each half of x combined by `f`, in every lane of that half.
template <class Combine>
VK_INLINE f32v within_halves(f32v x, const Combine& f) {
#if defined(__AVX512F__)
  x = f(x, (f32v)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1));
  x = f(x, (f32v)_mm512_permute_ps((__m512)x, 0x4e));
  return f(x, (f32v)_mm512_permute_ps((__m512)x, 0xb1));
#elif defined(__AVX2__)
  x = f(x, (f32v)_mm256_permute_ps((__m256)x, 0x4e));
  return f(x, (f32v)_mm256_permute_ps((__m256)x, 0xb1));
#else
  return f(x, (f32v)__builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
}
VK_INLINE f32v half_max(f32v x) {
  return within_halves(x, [](f32v a, f32v b) { return max(a, b); });
}
VK_INLINE f32v half_sum(f32v x) {
  return within_halves(x, [](f32v a, f32v b) { return a + b; });
}
// lo in the first half of the lanes, hi in the second.
VK_INLINE f32v two_halves(float lo, float hi) {
  f32v x = splat(lo);
  for (int i = kHalf; i < kLanes; ++i) x[i] = hi;
  return x;
}

// ---- words ----------------------------------------------------------------------------------------------------------
// Packed rows are made of 4-byte words: one float, or (kPairs) two bf16 that one instruction multiplies and adds. Words
// of a row pair neighbours along d; words of a stacked row pair two token rows: stacked row y, column c is
// (row 2y, row 2y + 1)[c]. Without kPairs a stacked row is a row.

template <class T>
struct MultipliesPairs {
  static constexpr bool value = false;
};
#if defined(__AVX512BF16__)
template <>
struct MultipliesPairs<vk::bf16> {
  static constexpr bool value = true;
};
#endif

template <bool kPairs>
VK_INLINE f32v multiply_add(f32v sum, f32v a, f32v b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}

// Scores are kept in pairs of queries: kHalf keys of two queries are one slot, a vector of kLanes words.
VK_INLINE int64_t slot(int64_t blocks, int64_t pair, int64_t block) { return (pair * blocks + block) * kLanes; }

// A slot's final values, as the products read them: floats as they are; pairs of bf16 along the keys in its first
// words and, transposed, along the two queries in the others.
template <bool kPairs>
VK_INLINE void store_weights(float* to, f32v x) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    const __m256i keys = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    const __m128i first = _mm256_castsi256_si128(keys), second = _mm256_extracti128_si256(keys, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), keys);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpacklo_epi16(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 12), _mm_unpackhi_epi16(first, second));
    return;
  }
#endif
  store(to, x);
}

// Where the weights of output row x begin: of query x over the keys, or (kTransposed) of key x over the queries.
template <bool kPairs, bool kTransposed>
VK_INLINE int64_t weights_of(int64_t blocks, int64_t x) {
  if constexpr (kTransposed) return slot(blocks, 0, x / kHalf) + x % kHalf + (kPairs ? kHalf : 0);
  return slot(blocks, x / 2, 0) + (x & 1) * (kPairs ? kHalf / 2 : kHalf);
}

// ---- the two small products -----------------------------------------------------------------------------------------

// Slots of rows_a[i] . rows_b[j], for an even number of rows_a and whole blocks of rows_b, `w` words each.
template <bool kPairs>
VK_INLINE void dot_rows(float* out, const float* rows_a, const float* rows_b, int64_t count_a, int64_t blocks,
                        int64_t w) {
  for (int64_t block = 0; block < blocks; ++block) {
    const float* b = rows_b + block * kHalf * w;
    for (int64_t i = 0; i < count_a; i += 2) {
      const float* a = rows_a + i * w;
      f32v acc[kLanes] = {};
      for (int64_t c = 0; c < w; c += kLanes) {
        const f32v a0 = load(a + c), a1 = load(a + w + c);
#pragma GCC unroll 8
        for (int j = 0; j < kHalf; ++j) {
          const f32v bj = hold(load(b + j * w + c));
          acc[j] = multiply_add<kPairs>(acc[j], a0, bj);
          acc[kHalf + j] = multiply_add<kPairs>(acc[kHalf + j], a1, bj);
        }
      }
      store(out + slot(blocks, i / 2, block), transposed_sum(acc));
    }
  }
}

// One tile of out[x] = sum_y weight(x, y) rows[y]: kRowTile rows from x, kCols vectors from column c.
template <bool kPairs, bool kTransposed, int kCols>
VK_INLINE void product_tile(f32v (&acc)[kRowTile][kCols], const float* weights, const float* stacked, int64_t blocks,
                            int64_t x, int64_t count_y, int64_t w, int64_t c) {
  constexpr int kSpan = kTransposed ? 2 : kHalf;     // rows per step
  constexpr int kRows = kPairs ? kSpan / 2 : kSpan;  // stacked rows per step
  constexpr int kNext = kTransposed && !kPairs ? kHalf : 1;
  const int64_t stride = kTransposed ? blocks * kLanes : kLanes;
  const float* weight[kRowTile];
#pragma GCC unroll 4
  for (int r = 0; r < kRowTile; ++r) weight[r] = weights + weights_of<kPairs, kTransposed>(blocks, x + r);
  const float* row = stacked + c;
  for (int64_t y = 0; y < count_y; y += kSpan) {
#pragma GCC unroll 8
    for (int u = 0; u < kRows; ++u) {
      f32v b[kCols];
#pragma GCC unroll 4
      for (int i = 0; i < kCols; ++i) b[i] = hold(load(row + i * kLanes));
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r) {
        const f32v a = hold(splat(weight[r][u * kNext]));
#pragma GCC unroll 4
        for (int i = 0; i < kCols; ++i) acc[r][i] = multiply_add<kPairs>(acc[r][i], a, b[i]);
      }
      row += w;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowTile; ++r) weight[r] += stride;
  }
}

template <bool kPairs, bool kTransposed, int kCols, class Emit>
VK_INLINE void product_columns(const float* weights, const float* stacked, int64_t blocks, int64_t x, int64_t count_x,
                               int64_t count_y, int64_t w, int64_t c, const Emit& emit) {
  f32v acc[kRowTile][kCols] = {};
  product_tile<kPairs, kTransposed, kCols>(acc, weights, stacked, blocks, x, count_y, w, c);
#pragma GCC unroll 4
  for (int r = 0; r < kRowTile; ++r)
    if (x + r < count_x)
#pragma GCC unroll 4
      for (int i = 0; i < kCols; ++i) emit(x + r, c + i * kLanes, acc[r][i]);
}

// out[x] = sum_y weight(x, y) rows[y] for x < count_x: emit(x, c, value) for every vector. kTransposed: x counts keys,
// y queries. count_x is rounded up to whole tiles, count_y to whole steps; padding rows hold zeros.
template <bool kPairs, bool kTransposed, class Emit>
VK_INLINE void product(const float* weights, const float* stacked, int64_t blocks, int64_t count_x, int64_t count_y,
                       int64_t w, const Emit& emit) {
  for (int64_t x = 0; x < count_x; x += kRowTile) {
    int64_t c = 0;
    for (; c + kColTile * kLanes <= w; c += kColTile * kLanes)
      product_columns<kPairs, kTransposed, kColTile>(weights, stacked, blocks, x, count_x, count_y, w, c, emit);
    for (; c + 2 * kLanes <= w; c += 2 * kLanes)
      product_columns<kPairs, kTransposed, 2>(weights, stacked, blocks, x, count_x, count_y, w, c, emit);
    if (c < w) product_columns<kPairs, kTransposed, 1>(weights, stacked, blocks, x, count_x, count_y, w, c, emit);
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Scores of two queries become their probabilities, in place, as weights if kPairs. lse, if given, receives the two
// log(sum(exp)).
template <bool kPairs>
VK_INLINE void softmax_pair(float* scores, int64_t blocks, int64_t len_k, float scale, float* lse) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int64_t tail = len_k - (blocks - 1) * kHalf;  // live keys of the last block
  const i32v dead = (iota() & (kHalf - 1)) >= splat(static_cast<int32_t>(tail));
  const f32v factor = splat(scale * kLog2E);
  float* last = scores + (blocks - 1) * kLanes;
  const f32v ends = dead ? splat(-kInf) : load(last) * factor;
  f32v top = ends;
  for (int64_t i = 0; i < blocks - 1; ++i) top = max(top, load(scores + i * kLanes) * factor);
  top = half_max(top);
  const f32v last_p = exp2(ends - top);
  f32v sum = last_p;
  for (int64_t i = 0; i < blocks - 1; ++i) {
    const f32v p = exp2(load(scores + i * kLanes) * factor - top);
    store(scores + i * kLanes, p);
    sum += p;
  }
  sum = half_sum(sum);
  const f32v inverse = 1.0f / sum;
  for (int64_t i = 0; i < blocks - 1; ++i)
    store_weights<kPairs>(scores + i * kLanes, load(scores + i * kLanes) * inverse);
  store_weights<kPairs>(last, last_p * inverse);
  if (lse) {
    lse[0] = (top[0] + std::log2(sum[0])) / kLog2E;
    lse[1] = (top[kHalf] + std::log2(sum[kHalf])) / kLog2E;
  }
}

// dp becomes dS = scale P (dP - sum_j P dP + dlse): the row is whole, so the sum needs no saved output. Both end as
// weights.
template <bool kPairs>
VK_INLINE void softmax_pair_backward(float* p, float* dp, int64_t blocks, float scale, f32v grad_lse) {
  f32v sum = {};
  for (int64_t i = 0; i < blocks * kLanes; i += kLanes) sum += load(p + i) * load(dp + i);
  sum = half_sum(sum) - grad_lse;
  for (int64_t i = 0; i < blocks * kLanes; i += kLanes) {
    const f32v probability = load(p + i);
    store_weights<kPairs>(dp + i, probability * (load(dp + i) - sum) * scale);
    if (kPairs) store_weights<kPairs>(p + i, probability);
  }
}

}  // namespace
}  // namespace short_attention
}  // namespace vk::VK_ISA
