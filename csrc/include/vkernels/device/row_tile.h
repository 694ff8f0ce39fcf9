// Rows of a head in the registers of a warp, as they lie in memory: one load of 16 bytes serves every product.
//
// Where a product runs along the rows (q k'), it may walk d in any order as long as both sides do: the four words of a
// vector are the operand registers of two steps, left and right alike. Where it runs over the rows (p v), each word is
// an 8 x 8 matrix that is transposed between registers. What comes out lies as it went in, so it is stored by 16 bytes.
#pragma once

#include "vkernels/device/matrix.h"

namespace vk::device {

// 16 rows of up to 32 kChunks elements: lane (g, t) = (lane / 4, lane % 4) holds vectors t, t + 4, ... of rows g and
// g + 8.
template <int kChunks>
struct RowTile {
  Vector half[2][kChunks];
};

// `vectors` of each row, zeros behind them and where a row is null.
template <int kChunks, class T>
VK_DEVICE RowTile<kChunks> load_rows(const T* const (&row)[2], int vectors) {
  RowTile<kChunks> x;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = lane() % 4 + 4 * c;
      if (row[half] && at < vectors)
        x.half[half][c] = load16<Cache::keep>(row[half] + at * kLanesOf<T>);
      else
        x.half[half][c] = Vector{};
    }
  return x;
}

// s[h] += a b' for the rows 8 h .. 8 h + 7 of b.
template <class T, int kChunks>
VK_DEVICE void multiply_rows(FragmentC (&s)[2], const RowTile<kChunks>& a, const RowTile<kChunks>& b) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      const FragmentA left{
          {a.half[0][c].word[w], a.half[1][c].word[w], a.half[0][c].word[w + 1], a.half[1][c].word[w + 1]}};
#pragma unroll
      for (int h = 0; h < 2; ++h)
        multiply_add<T>(s[h], left, FragmentB{{b.half[h][c].word[w], b.half[h][c].word[w + 1]}});
    }
}

// Four tiles of a result, 16 rows by 32 elements of d: x[j] has elements 8 t + 2 j and the one after it.
using Chunk = FragmentC[4];

// Chunk c of p x, added.
template <class T, int kChunks>
VK_DEVICE void mix_rows(Chunk& sum, const FragmentA& p, const RowTile<kChunks>& x, int c) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    multiply_add<T>(sum[j], p,
                    FragmentB{{transpose_matrix(x.half[0][c].word[j]), transpose_matrix(x.half[1][c].word[j])}});
}

// Chunk c, times a factor for row g and one for row g + 8, to the rows that are not null.
template <class T>
VK_DEVICE void store_chunk(T* const (&row)[2], int vectors, int c, const Chunk& x, float low, float high) {
  const int at = lane() % 4 + 4 * c;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? high : low;
    Vector v;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      v.word[j] = round_two(x[j].value[2 * half] * factor, x[j].value[2 * half + 1] * factor, T{});
    if (row[half] && at < vectors) store16(row[half] + at * kLanesOf<T>, v);
  }
}

}  // namespace vk::device
