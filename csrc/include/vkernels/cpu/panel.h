// Matrix products out of packed panels: the arithmetic under every attention kernel. Include only from *_cpu.cpp files.
//
// Memory is read in 32-bit words: a float, or (kPairs, where the processor multiplies bf16 pairs) two consecutive bf16
// along the summed axis. A panel is kPanel columns wide and contiguous: [step][kPanel] words.
//
//   product      c[row][column] (+)= sum over steps of a[row][step] * b[step][column], kStrip rows by one panel
//   pack_columns rows of a matrix become panel columns:  panel p, step j, column i = word j of row p * kPanel + i
//   pack_rows    rows of a matrix become panel steps:    panel p, step j, column i = element p * kPanel + i of row j
#pragma once

#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {

inline constexpr int kPanel = 2 * kLanes;
#if defined(__AVX512F__)
inline constexpr int kStrip = 8;  // 8 x 2 accumulators of 32 registers
#else
inline constexpr int kStrip = 4;  // 4 x 2 accumulators of 16 registers
#endif
#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif
template <class T>
inline constexpr bool kMultiplyPairs = false;
template <>
inline constexpr bool kMultiplyPairs<bf16> = kHasPairs;

VK_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <bool kPairs>
VK_INLINE int64_t words(int64_t count) {
  return kPairs ? (count + 1) / 2 : count;
}

// acc + a * b; with kPairs each lane adds the two products of its bf16 pairs.
template <bool kPairs>
VK_INLINE f32v multiply_add(float a, f32v b, f32v acc) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
  return splat(a) * b + acc;
}

template <bool kPairs, int kColumns>
static __attribute__((noinline)) void product_strip(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                                    int64_t steps, float* c, int64_t c_row, bool add) {
  f32v acc[kStrip][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) acc[r][j] = add ? load(c + r * c_row + j * kLanes) : f32v{};
  const float* a3 = a + 3 * a_row;  // row pointers three apart: the others are base + index
  const float* a6 = a + 6 * a_row;
  for (int64_t step = 0; step < steps; ++step, a += a_step, a3 += a_step, a6 += a_step, b += kPanel) {
    f32v column[kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) column[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kStrip; ++r) {
      const float* row = r < 3 ? a : r < 6 ? a3 : a6;
      const float word = row[(r % 3) * a_row];
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) acc[r][j] = multiply_add<kPairs>(word, column[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) store(c + r * c_row + j * kLanes, acc[r][j]);
}

// c is kStrip rows of `columns` floats (rounded up to kLanes); panels of b lie `b_panel` words apart.
template <bool kPairs>
VK_INLINE void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_panel, int64_t steps,
                       float* c, int64_t c_row, int64_t columns, bool add) {
  int64_t done = 0;
  for (; done + kLanes < columns; done += kPanel, b += b_panel)
    product_strip<kPairs, 2>(a, a_row, a_step, b, steps, c + done, c_row, add);
  if (done < columns) product_strip<kPairs, 1>(a, a_row, a_step, b, steps, c + done, c_row, add);
}

// Lane masks of one butterfly step: the low result takes a where (lane & kHalf) == 0 and b's partner elsewhere.
template <int kHalf>
VK_INLINE void butterfly(f32v& a, f32v& b) {
  i32v low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kHalf ? kLanes + i - kHalf : i;
    high[i] = i & kHalf ? kLanes + i : i + kHalf;
  }
  const f32v x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x;
  b = y;
}
template <int kHalf>
VK_INLINE void butterflies(f32v (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kHalf)) butterfly<kHalf>(v[i], v[i | kHalf]);
}
VK_INLINE void transpose(f32v (&v)[kLanes]) {
  butterflies<1>(v);
  butterflies<2>(v);
  if constexpr (kLanes > 4) butterflies<4>(v);
  if constexpr (kLanes > 8) butterflies<8>(v);
}

// kLanes words of a row from word `at` on, zeros past `count` elements; `sign` multiplies.
template <bool kPairs, class T>
VK_INLINE f32v load_words(const T* row, int64_t at, int64_t count) {
  if constexpr (kPairs) {
    uint16_t pair[2 * kLanes] = {};
    const int64_t left = count - 2 * at;
    if (left >= 2 * kLanes) return load(reinterpret_cast<const float*>(row + 2 * at));
    if (left > 0) memcpy(pair, row + 2 * at, 2 * static_cast<size_t>(left));
    return load(reinterpret_cast<const float*>(pair));
  } else {
    return count > at ? load(row + at, count - at) : f32v{};
  }
}

// row(i) -> pointer to row i of `rows` rows of `count` elements. Rows past the end become zero columns, words past
// `count` zero steps.
template <bool kPairs, class Row>
static void pack_columns(const Row& row, int64_t rows, int64_t count, int64_t steps, float* out) {
  for (int64_t r = 0; r < round_up(rows, kPanel); r += kLanes) {
    float* panel = out + (r / kPanel) * steps * kPanel + r % kPanel;
    for (int64_t step = 0; step < steps; step += kLanes) {
      f32v v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = r + i < rows ? load_words<kPairs>(row(r + i), step, count) : f32v{};
      transpose(v);
      const int64_t left = steps - step < kLanes ? steps - step : kLanes;
      for (int64_t i = 0; i < left; ++i) store(panel + (step + i) * kPanel, v[i]);
    }
  }
}

VK_INLINE f32v interleave(f32v even, f32v odd) {  // bf16 of both in one word, the even row low
  const u32v low = __builtin_convertvector(to_bf16(even), u32v), high = __builtin_convertvector(to_bf16(odd), u32v);
  return (f32v)(low | high << 16);
}

// Panels lie `panel_words` apart; `steps` rounds rows up to whole words and to `row_unit` zero rows.
template <bool kPairs, class Row>
static void pack_rows(const Row& row, int64_t rows, int64_t padded_rows, int64_t count, float* out,
                      int64_t panel_words) {
  constexpr int kUnit = kPairs ? 2 : 1;
  for (int64_t r = 0; r < padded_rows; r += kUnit) {
    for (int64_t at = 0; at < count; at += kLanes) {
      const f32v even = r < rows ? load(row(r) + at, count - at) : f32v{};
      float* to = out + (at / kPanel) * panel_words + (r / kUnit) * kPanel + at % kPanel;
      if constexpr (kPairs) {
        const f32v odd = r + 1 < rows ? load(row(r + 1) + at, count - at) : f32v{};
        store(to, interleave(even, odd));
      } else {
        store(to, even);
      }
    }
  }
}

}  // namespace vk::VK_ISA
