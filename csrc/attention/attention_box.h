// Exact windows: which pairs the box of a mask leaves. A warp works out what its rows see of a step's columns while it
// holds no scores, one bit a pair, and goes past the products of a step where they see nothing.
#pragma once

#include "attention_mask.h"
#include "vkernels/device/warp.h"

namespace vk::device {

// Rows are queries and columns keys, or the other way round.
template <int kAllRows, int kColumns>
struct Sight {
  static constexpr int kWords = kColumns / 32, kLines = kRelations + 1;
  static constexpr size_t kBytes = (3 * kLines * kColumns + kAllRows * kWords) * sizeof(int);
  int* lines;      // attributes of columns, then whether they are global: of this step and the two after it
  uint32_t* seen;  // of every row of the tile, bit c: it sees column c of this step
};

template <int kAllRows, int kColumns>
VK_DEVICE Sight<kAllRows, kColumns> sight_at(char* memory) {
  using Mine = Sight<kAllRows, kColumns>;
  int* lines = reinterpret_cast<int*>(memory);
  return {lines, reinterpret_cast<uint32_t*>(lines + 3 * Mine::kLines * kColumns)};
}

VK_DEVICE int index_in_group(const Side& s, const Mask& m, int i) { return m.packed ? i % s.length : i; }

// Where attribute 0 of token i is.
VK_DEVICE const int32_t* attributes_of(const Side& s, const Mask& m, const Place& at, int i) {
  return s.attributes + at.sample * s.attributes_b + index_in_group(s, m, i);
}
VK_DEVICE bool is_global(const Side& s, const Mask& m, const Place& at, int i) {
  return s.global && load(s.global + at.sample * s.global_b + index_in_group(s, m, i)) != 0;
}

// The columns of step `step`, tokens [first, limit) of `side`, for use after the next barrier.
template <int kAllRows, int kColumns>
VK_DEVICE void note_columns(const Mask& m, const Side& side, const Place& at, const Sight<kAllRows, kColumns>& sight,
                            int step, int first, int limit) {
  const int i = first + thread_index();
  if (thread_index() >= kColumns || i >= limit) return;
  int* line = sight.lines + step % 3 * sight.kLines * kColumns + thread_index();
  const int32_t* attributes = attributes_of(side, m, at, i);
  for (int a = 0; a < m.relations; ++a) store_shared(line + a * kColumns, load(attributes + int64_t(a) * side.length));
  store_shared(line + kRelations * kColumns, int(is_global(side, m, at, i)));
}

VK_DEVICE uint32_t bits_below(int end) { return end <= 0 ? 0u : end >= 32 ? ~0u : (1u << end) - 1u; }
VK_DEVICE uint32_t bits_between(int begin, int end) { return bits_below(end) & ~bits_below(begin); }

// Bit c: value c of a line is `own` plus lo to hi.
VK_DEVICE uint32_t related_columns(const int* line, int own, int lo, int hi) {
  uint32_t bits = 0;
#pragma unroll
  for (int c = 0; c < 32; c += 4) {
    const Vector four = load_shared(reinterpret_cast<const Vector*>(line + c));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (related(own, static_cast<int>(four.word[i]), lo, hi)) bits |= 1u << (c + i);
  }
  return bits;
}

// What the box leaves of 32 columns, whose lines are `lines`, to token i.
template <bool kKeyRows, int kColumns>
VK_DEVICE uint32_t boxed_columns(const Mask& m, const Place& at, int i, const int* lines) {
  const Side& side = kKeyRows ? m.k : m.q;
  if (is_global(side, m, at, i)) return ~0u;
  const int32_t* attributes = attributes_of(side, m, at, i);
  uint32_t bits = ~0u;
#pragma unroll 1
  for (int a = 0; a < m.relations && bits; ++a) {
    const int lo = m.bounds[2 * a], hi = m.bounds[2 * a + 1], own = load(attributes + int64_t(a) * side.length);
    bits &= related_columns(lines + a * kColumns, own, kKeyRows ? -hi : lo, kKeyRows ? -lo : hi);
  }
  return bits | related_columns(lines + kRelations * kColumns, 0, 1, 1);
}

// Notes what rows [row, row + kRows) of the tile, this warp's, see of the columns of step `step`; whether they see any.
// `first` is the token of the tile's row 0; inside(row, word) the columns, 32 a word, that lie in the row's interval.
template <bool kKeyRows, int kRows, int kAllRows, int kColumns, class Inside>
VK_DEVICE bool note_seen(const Mask& m, const Place& at, const Sight<kAllRows, kColumns>& sight, int step, int row,
                         int first, const Inside& inside) {
  const int* lines = sight.lines + step % 3 * sight.kLines * kColumns;
  uint32_t any = 0;
#pragma unroll 1
  for (int unit = lane(); unit < kRows * sight.kWords; unit += kWarp) {
    const int r = row + unit % kRows, word = unit / kRows;
    uint32_t bits = inside(r, word);
    if (bits) bits &= boxed_columns<kKeyRows, kColumns>(m, at, first + r, lines + 32 * word);
    store_shared(sight.seen + r * sight.kWords + word, bits);
    any |= bits;
  }
  sync_warp();
  return ballot(any != 0) != 0;
}

// Bit 4 n + e: element e of fragment n counts, in a product whose first row and column are `row` and `column`.
template <int N, int kAllRows, int kColumns>
VK_DEVICE uint32_t seen_bits(const Sight<kAllRows, kColumns>& sight, int row, int column) {
  static_assert(N <= 8, "32 bits");
  uint32_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* words = sight.seen + (row + lane() / 4 + 8 * half) * sight.kWords;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int at = column + 8 * n;
      bits |= (load_shared(words + at / 32) >> (at % 32 + lane() % 4 * 2) & 3u) << (4 * n + 2 * half);
    }
  }
  return bits;
}

}  // namespace vk::device
