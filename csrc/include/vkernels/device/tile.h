// Rows of 16-bit elements in shared memory: filled from anywhere by asynchronous copies, read by tensor cores.
//
// Vectors (16 bytes) of a row change places with the row, so that the eight rows an ldmatrix reads at one column lie in
// eight different groups of banks, whatever the width of the tile.
#pragma once

#include "vkernels/device/copy_async.h"
#include "vkernels/device/matrix.h"

namespace vk::device {

template <class T, int kRowCount, int kColumnCount>
struct Tile {
  static_assert(sizeof(T) == 2 && kColumnCount % 8 == 0, "rows of whole vectors of 16-bit elements");
  static constexpr int kRows = kRowCount, kColumns = kColumnCount, kVectors = kColumns / 8;
  static constexpr size_t kBytes = size_t(kRows) * kColumns * sizeof(T);
  // Vectors change places within groups of kGroup; where rows are an odd number of vectors apart they need not.
  static constexpr int kGroup = kVectors % 8 == 0 ? 8 : kVectors % 4 == 0 ? 4 : kVectors % 2 == 0 ? 2 : 1;

  T* data;
};

// Which vector of shared memory holds vector `vector` of row `row`.
template <class AnyTile>
VK_HD int vector_place(int row, int vector) {
  return row * AnyTile::kVectors + (vector ^ (row / (8 / AnyTile::kGroup) % AnyTile::kGroup));
}

template <class T, int R, int C>
VK_DEVICE T* vector_at(const Tile<T, R, C>& tile, int row, int vector) {
  return tile.data + 8 * vector_place<Tile<T, R, C>>(row, vector);
}

// Starts the copies that fill the tile; kThreads threads call, `thread` is their index. Row r comes from
// `row_at(r)`, a const T* at a 16-byte address; null and columns from `columns` (a multiple of 8) on become zeros.
// `anywhere`: any pointer into a tensor of the call. The caller commits.
template <int kThreads, class T, int R, int C, class RowAt>
VK_DEVICE void copy_rows(const Tile<T, R, C>& tile, int columns, const T* anywhere, const RowAt& row_at,
                         int thread = thread_index()) {
  constexpr int kVectors = C / 8, kAll = R * kVectors;
#pragma unroll
  for (int first = 0; first < kAll; first += kThreads) {
    const int at = first + thread, row = at / kVectors, vector = at % kVectors;
    if (kAll % kThreads != 0 && at >= kAll) break;
    const T* from = row_at(row);
    const bool there = from != nullptr && 8 * vector < columns;
    copy_async16(vector_at(tile, row, vector), there ? from + 8 * vector : anywhere, there ? 16 : 0);
  }
}

// 16 rows from `row` on, 16 columns from `column` on, as the left operand of a product. The whole warp calls.
template <class T, int R, int C>
VK_DEVICE FragmentA left_operand(const Tile<T, R, C>& tile, int row, int column) {
  FragmentA a;
  load_matrices(a.reg, vector_at(tile, row + lane() % 16, column / 8 + lane() / 16));
  return a;
}

// The right operands of two neighbouring products a b: 16 rows of the tile are their columns, 16 columns are summed
// over (queries times keys).
template <class T, int R, int C>
VK_DEVICE void right_operands(FragmentB (&b)[2], const Tile<T, R, C>& tile, int row, int column) {
  uint32_t reg[4];
  load_matrices(reg, vector_at(tile, row + lane() / 16 * 8 + lane() % 8, column / 8 + lane() / 8 % 2));
  b[0] = {{reg[0], reg[1]}};
  b[1] = {{reg[2], reg[3]}};
}

// The same where 16 rows are summed over and 16 columns are their columns (weights times values).
template <class T, int R, int C>
VK_DEVICE void right_operands_across(FragmentB (&b)[2], const Tile<T, R, C>& tile, int row, int column) {
  uint32_t reg[4];
  load_matrices<true>(reg, vector_at(tile, row + lane() % 16, column / 8 + lane() / 16));
  b[0] = {{reg[0], reg[1]}};
  b[1] = {{reg[2], reg[3]}};
}

// Rounds 16 x 8 results into the tile, at `row` and `column`.
template <class T, int R, int C>
VK_DEVICE void put(const Tile<T, R, C>& tile, int row, int column, const FragmentC& c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* to = vector_at(tile, row + c.row(lane(), 2 * half), column / 8) + c.column(lane(), 0);
    store_shared(reinterpret_cast<uint32_t*>(to), round_two(c.value[2 * half], c.value[2 * half + 1], T{}));
  }
}

// Writes kCount rows from `row` on to where `row_at(r)` says, a T* at a 16-byte address; null: not at all. kThreads
// threads call.
template <int kCount, int kThreads, class T, int R, int C, class RowAt>
VK_DEVICE void store_rows(const Tile<T, R, C>& tile, int row, int columns, const RowAt& row_at, int thread) {
  constexpr int kVectors = C / 8, kAll = kCount * kVectors;
#pragma unroll
  for (int first = 0; first < kAll; first += kThreads) {
    const int at = first + thread, r = row + at / kVectors, vector = at % kVectors;
    if (kAll % kThreads != 0 && at >= kAll) break;
    T* to = row_at(r);
    if (to != nullptr && 8 * vector < columns)
      store16(to + 8 * vector, load_shared(reinterpret_cast<const Vector*>(vector_at(tile, r, vector))));
  }
}

}  // namespace vk::device
