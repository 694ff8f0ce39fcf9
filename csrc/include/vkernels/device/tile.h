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
  using Element = T;
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
//
// Neighbouring threads copy a row, up to 128 bytes of it: powers of two, so that addresses differ by constants.
template <int kThreads, int kFirst = 0, class T, int R, int C, class RowAt>
VK_DEVICE void copy_rows(const Tile<T, R, C>& tile, int columns, const T* anywhere, const RowAt& row_at,
                         int thread = thread_index()) {
  constexpr int kLeft = C / 8 - kFirst, kWide = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : kLeft >= 2 ? 2 : 1;
  constexpr int kStep = kThreads / kWide;
  const int inside = thread / kWide, vector = kFirst + thread % kWide;
#pragma unroll
  for (int first = 0; first < R; first += kStep) {
    const int row = first + inside;
    if (R % kStep != 0 && row >= R) break;
    const T* from = row_at(row);
    const bool there = from != nullptr && 8 * vector < columns;
    // Places repeat every eight rows.
    T* to = kStep % 8 == 0 ? vector_at(tile, inside, vector) + first * C : vector_at(tile, row, vector);
    copy_async16(to, there ? from + 8 * vector : anywhere, there ? 16 : 0);
  }
  if constexpr (kLeft > kWide) copy_rows<kThreads, kFirst + kWide>(tile, columns, anywhere, row_at, thread);
}

// The vector that lane-dependent `row` and `side` (0 or 1) and the constant `column` (a multiple of 16) name: few of
// its parts depend on the lane, the rest folds into the address of an instruction.
template <class T, int R, int C>
VK_DEVICE const T* operand_at(const Tile<T, R, C>& tile, int row, int side, int column) {
  constexpr int kGroup = Tile<T, R, C>::kGroup, kVectors = C / 8;
  const int turned = side ^ (row / (8 / kGroup) % kGroup), vector = column / 8;
  return tile.data + 8 * (row * kVectors + (turned ^ vector % kGroup)) + 8 * (vector / kGroup * kGroup);
}

// 16 rows from `row` on, 16 columns from `column` on, as the left operand of a product. The whole warp calls; `row` is
// a multiple of 16.
template <class T, int R, int C>
VK_DEVICE FragmentA left_operand(const Tile<T, R, C>& tile, int row, int column, int at = lane()) {
  FragmentA a;
  load_matrices(a.reg, operand_at(tile, at % 16, at / 16, column) + row * C);
  return a;
}

// The right operands of two neighbouring products a b: 16 rows of the tile are their columns, 16 columns are summed
// over (queries times keys).
template <class T, int R, int C>
VK_DEVICE void right_operands(FragmentB (&b)[2], const Tile<T, R, C>& tile, int row, int column, int at = lane()) {
  uint32_t reg[4];
  load_matrices(reg, operand_at(tile, at / 16 * 8 + at % 8, at / 8 % 2, column) + row * C);
  b[0] = {{reg[0], reg[1]}};
  b[1] = {{reg[2], reg[3]}};
}

// The same where 16 rows are summed over and 16 columns are their columns (weights times values).
template <class T, int R, int C>
VK_DEVICE void right_operands_across(FragmentB (&b)[2], const Tile<T, R, C>& tile, int row, int column,
                                     int at = lane()) {
  uint32_t reg[4];
  load_matrices<true>(reg, operand_at(tile, at % 16, at / 16, column) + row * C);
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
