// Affine moves: no arithmetic, only addresses, in units of 1 to 16 bytes.
//
// copy_runs: a run is contiguous on both sides. A thread takes one unit at each of four places of the output.
//
// turn: x is contiguous along i, y along j. A tile of both is read along i, 16 bytes a lane, laid into shared memory
// and written along j, 16 bytes a lane, each gathered from as many rows of the tile as it has elements. A warp's lanes
// write 8 vectors along j for 4 neighbouring i. Vector v of row j lies at v ^ j / (elements of a vector) % 8, so the 8
// lanes that read 8 different rows find their elements in different banks, and whole rows are still stored without a
// conflict.
#pragma once

#include "vkernels/device/memory.h"
#include "vkernels/device/sync.h"

namespace vk {
namespace {

using namespace device;

template <int kBytes>
struct UnitOf;
template <>
struct UnitOf<1> {
  using type = uint8_t;
};
template <>
struct UnitOf<2> {
  using type = uint16_t;
};
template <>
struct UnitOf<4> {
  using type = uint32_t;
};
template <>
struct UnitOf<8> {
  using type = uint64_t;
};
template <>
struct UnitOf<16> {
  using type = Vector;
};

template <class U>
VK_DEVICE U load_unit(const U* from) {
  if constexpr (sizeof(U) == sizeof(Vector))
    return load16(from);
  else
    return load(from);
}
template <class U>
VK_DEVICE void store_unit(U* to, const U& unit) {
  if constexpr (sizeof(U) == sizeof(Vector))
    store16(to, unit);
  else
    store(to, unit);
}

// Factors around a run or a tile, innermost first, strides in elements (units of a copy).
struct Factors {
  static constexpr int kMost = 10;
  int count;
  int64_t size[kMost], x[kMost], y[kMost];
};

// Where iteration `index` of the factors lies. Divisions of 32 bits are several times as fast as those of 64.
VK_DEVICE void place_of(const Factors& f, int64_t index, int64_t& x, int64_t& y) {
  x = y = 0;
  for (int k = 0; k < f.count; ++k) {
    int64_t i;
    if (index >> 32 == 0 && f.size[k] >> 32 == 0) {
      const uint32_t left = static_cast<uint32_t>(index), size = static_cast<uint32_t>(f.size[k]);
      i = left % size;
      index = left / size;
    } else {
      i = index % f.size[k];
      index /= f.size[k];
    }
    x += i * f.x[k];
    y += i * f.y[k];
  }
}

constexpr int kCopyThreads = 256, kCopyUnits = 4;

struct CopyParams {
  const void* x;
  void* y;
  Factors factors;  // the first is the run; y is dense
  int64_t total;
};

template <int kBytes>
VK_KERNEL(kCopyThreads)
copy_runs(const CopyParams p) {
  using U = typename UnitOf<kBytes>::type;
  const int64_t first = block_x() * kCopyThreads * kCopyUnits + thread_index();
  U unit[kCopyUnits];
#pragma unroll
  for (int k = 0; k < kCopyUnits; ++k) {
    const int64_t i = first + k * kCopyThreads;
    if (i >= p.total) break;
    int64_t x, y;
    place_of(p.factors, i, x, y);
    unit[k] = load_unit(static_cast<const U*>(p.x) + x);
  }
#pragma unroll
  for (int k = 0; k < kCopyUnits; ++k)
    if (first + k * kCopyThreads < p.total) store_unit(static_cast<U*>(p.y) + first + k * kCopyThreads, unit[k]);
}

struct TurnParams {
  const void* x;
  void* y;
  Factors factors;
  int64_t size_i, size_j, xi, xj, yi;  // strides; y's along j is 1
  int64_t tiles_i, tiles_j;
  bool loose_x, loose_y;  // element by element
};

// Elements of a vector, and of the side of a tile.
template <int kBytes>
inline constexpr int kTurnWidth = 16 / kBytes;
template <int kBytes>
inline constexpr int kTurnSide = 8 * kTurnWidth<kBytes>;
template <int kBytes>
inline constexpr int kTurnThreads = 4 * kTurnSide<kBytes>;  // two vectors each

template <int kBytes>
VK_DEVICE int turned_vector(int j, int v) {
  return j * 8 + (v ^ j / kTurnWidth<kBytes> % 8);
}

template <int kBytes>
VK_DEVICE Vector read_along_i(const TurnParams& p, const typename UnitOf<kBytes>::type* x, int64_t i, int64_t j) {
  using U = typename UnitOf<kBytes>::type;
  constexpr int kWidth = kTurnWidth<kBytes>;
  Vector v{};
  if (j >= p.size_j || i >= p.size_i) return v;
  if (!p.loose_x) return load16(x + j * p.xj + i);
  U element[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (i + k < p.size_i) element[k] = load(x + j * p.xj + (i + k) * p.xi);
  memcpy(&v, element, sizeof v);
  return v;
}

template <int kBytes>
VK_DEVICE void write_along_j(const TurnParams& p, typename UnitOf<kBytes>::type* y, int64_t i, int64_t j,
                             const typename UnitOf<kBytes>::type (&element)[kTurnWidth<kBytes>]) {
  if (j >= p.size_j || i >= p.size_i) return;
  auto* to = y + i * p.yi + j;
  if (!p.loose_y) {
    Vector v;
    memcpy(&v, element, sizeof v);
    return store16(to, v);
  }
#pragma unroll
  for (int k = 0; k < kTurnWidth<kBytes>; ++k)
    if (j + k < p.size_j) store(to + k, element[k]);
}

template <int kBytes>
VK_KERNEL(kTurnThreads<kBytes>)
turn(const TurnParams p) {
  using U = typename UnitOf<kBytes>::type;
  constexpr int kWidth = kTurnWidth<kBytes>, kSide = kTurnSide<kBytes>, kThreads = kTurnThreads<kBytes>;
  int64_t at_x, at_y;
  place_of(p.factors, block_x() / (p.tiles_i * p.tiles_j), at_x, at_y);
  const U* x = static_cast<const U*>(p.x) + at_x;
  U* y = static_cast<U*>(p.y) + at_y;
  const int64_t i0 = block_x() % p.tiles_i * kSide, j0 = block_x() / p.tiles_i % p.tiles_j * kSide;
  Vector* tile = reinterpret_cast<Vector*>(shared_memory());
  Vector read[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int item = thread_index() + k * kThreads;
    read[k] = read_along_i<kBytes>(p, x, i0 + item % 8 * kWidth, j0 + item / 8);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int item = thread_index() + k * kThreads;
    store_shared(tile + turned_vector<kBytes>(item / 8, item % 8), read[k]);
  }
  sync_block();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int item = thread_index() + k * kThreads, i = item / 8, j = item % 8 * kWidth;
    U element[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      element[e] =
          load_shared(reinterpret_cast<const U*>(tile + turned_vector<kBytes>(j + e, i / kWidth)) + i % kWidth);
    write_along_j<kBytes>(p, y, i0 + i, j0 + j, element);
  }
}

}  // namespace
}  // namespace vk
