// Sequences longer than 16 tokens, or that share a CLS token: a warp holds 16 rows, a block those of one sequence and
// head (or a part of them), and tiles of the rows on the other side of the softmax pass by in shared memory.
//
// A shared CLS lies outside the tiles of the others: 257 = 1 + 256. Among the rows a warp holds it is the last one,
// row `length`. On the other side it is one row more, with which sums start.
#pragma once

#include "sequences_cuda.h"
#include "vkernels/device/softmax.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/tile.h"

namespace vk {
namespace {

using namespace device;

constexpr int kTileRows = 64, kMostWarps = 6, kMostThreads = kMostWarps * kWarp;

// Of a query: normaliser (base 2, of scaled scores) and sum of p * dp.
struct alignas(8) Stats {
  float lse, delta;
};

struct Tiled {
  Heads q, k, v, o, dq, dk, dv;  // backward: o is its gradient
  Sequences where;
  Divisor slots, heads, per_key;  // blocks of a sequence and head; heads of the grid; heads of q that share one of k
  int n, m, columns, tile_rows, tiles;
  float scale, scale_log2;
  bool cls;
  Stats* stats;                   // sequences n length+cls
  float *part, *part_k, *part_v;  // b n|m outer d: what the sequences leave for the CLS
  const float* angles;            // b|1 frames d, where q and k are turned
  int angles_b;                   // frames, or 0 where samples share them
  bool neighbours;                // are pairs, else halves
};

template <class Element, int kChunks>
struct TiledTraits {
  using T = Element;
  static constexpr int kColumns = 32 * kChunks, kSteps = kColumns / 16;
  static constexpr int kBlocks = kChunks == 2 ? 2 : 1;  // at least, on a multiprocessor
  // Forward: 128 registers, as for blocks of 256 threads, so that four blocks of 64 rows are on a multiprocessor.
  static constexpr int kForwardThreads = kChunks == 2 ? 256 : kMostThreads;
  using Rows = Tile<T, 16, kColumns>;
  using Others = Tile<T, kTileRows, kColumns>;
};

// Whether columns 16 step .. 16 step + 15 lie behind the head: 72 and 80 run where 96 do, one step less.
template <class Traits>
VK_DEVICE bool is_behind(const Tiled& p, int step) {
  return Traits::kSteps == 6 && step == 5 && p.columns <= 80;
}

struct Block {
  Sequence at;
  int sequence, head, slot, warps;
  int first;  // of the rows the warp holds
};

VK_DEVICE Block block_of(const Tiled& p) {
  const int index = int(block_x()), sequence_head = quotient(index, p.slots);
  Block b;
  b.slot = index - sequence_head * int(p.slots.divisor);
  b.sequence = quotient(sequence_head, p.heads);
  b.head = sequence_head - b.sequence * int(p.heads.divisor);
  b.at = sequence_at(p.where, b.sequence);
  b.warps = thread_count() / kWarp;
  b.first = (b.slot * b.warps + warp()) * 16;
  return b;
}

// How many rows of tile `tile` there are; not one, where a sequence is nothing but its CLS.
VK_DEVICE int live_rows(const Tiled& p, int tile) {
  const int left = p.where.length - tile * p.tile_rows;
  return left < p.tile_rows ? left : p.tile_rows;
}

// The rows of one sequence and head in a tensor: what depends on neither token nor lane is kept.
template <class T>
struct TokenRows {
  T* first;
  uint32_t stride;  // in bytes, as it is multiplied most often
};

template <class T>
VK_DEVICE TokenRows<T> token_rows(const Block& b, const Heads& x, int head) {
  return {row_at<T>(x, b.at.sample, b.at.base, head), uint32_t(sizeof(T)) * x.s};
}
// Behind the last row it comes again: what is made of it counts nowhere.
template <class T>
VK_DEVICE T* row_of(const Tiled& p, const TokenRows<T>& rows, int i) {
  const int last = p.where.length - 1;
  const uint64_t at = wide_product(token_of(p.where, i < last ? i : last), rows.stride);
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(rows.first) + at);
}
template <class T>
VK_DEVICE T* cls_row(const Block& b, const Heads& x, int head) {
  return row_at<T>(x, b.at.sample, 0, head);
}

// Shared memory: the rows of each warp (kHeldOf tensors), then stages of two tiles and two CLS rows.
template <class Traits, int kTensors>
struct Room {
  using T = typename Traits::T;
  static constexpr int kColumns = Traits::kColumns;

  VK_HD size_t stage_elements(int tile_rows) { return size_t(2 * tile_rows + 2) * kColumns; }
  static size_t bytes(int warps, int tile_rows, int stages) {
    return sizeof(T) * (size_t(warps) * kTensors * 16 * kColumns + stages * stage_elements(tile_rows));
  }

  T* memory;
  int warps, tile_rows;

  VK_DEVICE Room at(const Tiled& p, const Block& b) {
    return {reinterpret_cast<T*>(shared_memory()), b.warps, p.tile_rows};
  }
};

template <class Traits, int kTensors>
VK_DEVICE typename Traits::Rows rows_in(const Room<Traits, kTensors>& room, int tensor) {
  return {room.memory + (warp() * kTensors + tensor) * 16 * Traits::kColumns};
}
template <class Traits, int kTensors>
VK_DEVICE typename Traits::T* stage_in(const Room<Traits, kTensors>& room, int stage) {
  return room.memory + room.warps * kTensors * 16 * Traits::kColumns + stage * room.stage_elements(room.tile_rows);
}
template <class Traits, int kTensors>
VK_DEVICE typename Traits::Others others_in(const Room<Traits, kTensors>& room, int stage, int tensor) {
  return {stage_in(room, stage) + tensor * room.tile_rows * Traits::kColumns};
}
template <class Traits, int kTensors>
VK_DEVICE typename Traits::T* cls_in(const Room<Traits, kTensors>& room, int stage, int tensor) {
  return stage_in(room, stage) + (2 * room.tile_rows + tensor) * Traits::kColumns;
}

// Starts the copy of kCount rows, zeros behind the head. A warp calls.
template <int kCount, class T, int kColumns, class RowAt>
VK_DEVICE void copy_strip(const Tile<T, kCount, kColumns>& tile, int columns, const RowAt& row_at) {
  constexpr int kVectors = kColumns / 8;
  static_assert(kCount * kVectors % kWarp == 0, "every lane copies as much");
#pragma unroll
  for (int first = 0; first < kCount * kVectors; first += kWarp) {
    const int row = (first + lane()) / kVectors, vector = (first + lane()) % kVectors;
    const bool there = 8 * vector < columns;
    copy_async16(vector_at(tile, row, vector), row_at(row) + (there ? 8 * vector : 0), there ? 16 : 0);
  }
}

// The 16 rows a warp holds.
template <class Traits>
VK_DEVICE void copy_held(const Tiled& p, const Block& b, const typename Traits::Rows& to, const Heads& x, int head) {
  using T = typename Traits::T;
  const auto rows = token_rows<const T>(b, x, head);
  const T* cls = cls_row<const T>(b, x, head);
  copy_strip(to, p.columns, [&](int row) {
    const int i = b.first + row;
    return p.cls && i >= p.where.length ? cls : row_of(p, rows, i);
  });
}

// Two tensors whose tiles pass by.
template <class T>
struct Others {
  TokenRows<const T> rows[2];
  const T* cls[2];
};

template <class T>
VK_DEVICE Others<T> others(const Block& b, const Heads& x, const Heads& y, int head) {
  return {{token_rows<const T>(b, x, head), token_rows<const T>(b, y, head)},
          {cls_row<const T>(b, x, head), cls_row<const T>(b, y, head)}};
}

// Starts the copy of tile `tile`, and of the CLS rows with the first.
template <class Traits, int kTensors>
VK_DEVICE void copy_others(const Tiled& p, const Block& b, const Room<Traits, kTensors>& room, int stage, int tile,
                           const Others<typename Traits::T>& from) {
  using T = typename Traits::T;
  constexpr int kStrip = 8;  // the rows after which vectors lie as they lay
  using Strip = Tile<T, kStrip, Traits::kColumns>;
  constexpr int kVectors = Traits::kColumns / 8;
  const int first = tile * p.tile_rows, live = live_rows(p, tile);
  const int strips = (live + 15) / 16 * 2;  // whole steps of 16
#pragma unroll
  for (int y = 0; y < 2; ++y) {
#pragma unroll 1
    for (int strip = (warp() + y * strips) % b.warps; strip < strips; strip += b.warps)
      copy_strip(Strip{others_in(room, stage, y).data + strip * kStrip * Traits::kColumns}, p.columns,
                 [&](int row) { return row_of(p, from.rows[y], first + strip * kStrip + row); });
    if (!p.cls || tile != 0 || warp() != y % b.warps || lane() >= kVectors) continue;
    const bool there = 8 * lane() < p.columns;
    copy_async16(cls_in(room, stage, y) + 8 * lane(), from.cls[y] + (there ? 8 * lane() : 0), there ? 16 : 0);
  }
}

// The rows a warp holds as left operands: in registers, or where those are needed for sums, read each time.
template <class Traits, bool kInRegisters>
struct Held {
  typename Traits::Rows tile;
  FragmentA operand[kInRegisters ? Traits::kSteps : 1];
};

template <class Traits, bool kInRegisters>
VK_DEVICE void hold(Held<Traits, kInRegisters>& x, const typename Traits::Rows& tile) {
  x.tile = tile;
  if constexpr (kInRegisters)
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) x.operand[step] = left_operand(tile, 0, 16 * step);
}
template <class Traits, bool kInRegisters>
VK_DEVICE FragmentA left_of(const Held<Traits, kInRegisters>& x, int step) {
  if constexpr (kInRegisters)
    return x.operand[step];
  else
    return left_operand(x.tile, 0, 16 * step);
}

// The 16 rows of a tile from `row` on, a multiple of 16.
template <class Traits>
VK_DEVICE typename Traits::Rows sixteen(const typename Traits::Others& x, int row) {
  return {x.data + row * Traits::kColumns};
}

// s = x y'.
template <class Traits, bool kInRegisters>
VK_DEVICE void multiply_rows(FragmentC (&s)[2], const Tiled& p, const Held<Traits, kInRegisters>& x,
                             const typename Traits::Rows& y) {
  s[0] = s[1] = FragmentC{};
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    if (is_behind<Traits>(p, step)) break;
    const FragmentA left = left_of(x, step);
    FragmentB right[2];
    right_operands(right, y, 0, 16 * step);
    multiply_add<typename Traits::T>(s[0], left, right[0]);
    multiply_add<typename Traits::T>(s[1], left, right[1]);
  }
}

template <class Traits>
using Sums = FragmentC[2 * Traits::kSteps];

// sum += weights y.
template <class Traits>
VK_DEVICE void mix_rows(Sums<Traits>& sum, const Tiled& p, const FragmentA& weights, const typename Traits::Rows& y) {
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    if (is_behind<Traits>(p, step)) break;
    FragmentB right[2];
    right_operands_across(right, y, 0, 16 * step);
    multiply_add<typename Traits::T>(sum[2 * step], weights, right[0]);
    multiply_add<typename Traits::T>(sum[2 * step + 1], weights, right[1]);
  }
}

// x y for one row y: every column of the product is it, so every lane gets what belongs to its two rows.
template <class Traits, bool kInRegisters>
VK_DEVICE void multiply_row(float (&s)[2], const Held<Traits, kInRegisters>& x, const typename Traits::T* y) {
  FragmentC c{};
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    FragmentB right;
    load_matrices(right.reg, y + 16 * step + lane() / 8 % 2 * 8);
    multiply_add<typename Traits::T>(c, left_of(x, step), right);
  }
  s[0] = c.value[0];
  s[1] = c.value[2];
}

// sum += weights y for one row y, a weight for each of a lane's two rows.
template <class Traits>
VK_DEVICE void mix_row(Sums<Traits>& sum, const float (&weight)[2], const typename Traits::T* y) {
#pragma unroll
  for (int i = 0; i < 2 * Traits::kSteps; ++i) {
    float low, high;
    widen_two(load_shared(reinterpret_cast<const uint32_t*>(y + 8 * i + lane() % 4 * 2)), low, high,
              typename Traits::T{});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[i].value[2 * half] += weight[half] * low;
      sum[i].value[2 * half + 1] += weight[half] * high;
    }
  }
}

// Which of a lane's two rows is the CLS; -1: none.
VK_DEVICE int cls_half(const Tiled& p, const Block& b) {
  const int row = p.where.length - b.first;
  return p.cls && row >= 0 && row < 16 && row % 8 == lane() / 4 ? row / 8 : -1;
}

// Sums, times a factor, to the rows of a tensor, through the shared memory of the rows the warp held; those of the CLS
// in float to `part`.
template <class Traits>
VK_DEVICE void store_sums(const Tiled& p, const Block& b, const Sums<Traits>& sum, const float (&factor)[2],
                          const typename Traits::Rows& through, const Heads& to, int head, float* part) {
  using T = typename Traits::T;
  const int cls = cls_half(p, b);
  sync_warp();
#pragma unroll
  for (int i = 0; i < 2 * Traits::kSteps; ++i) {
    const FragmentC c{{sum[i].value[0] * factor[0], sum[i].value[1] * factor[0], sum[i].value[2] * factor[1],
                       sum[i].value[3] * factor[1]}};
    put(through, 0, 8 * i, c);
    const int column = 8 * i + c.column(lane(), 0);
    if (cls >= 0 && column < p.columns) {
      store(part + column, cls ? c.value[2] : c.value[0]);
      store(part + column + 1, cls ? c.value[3] : c.value[1]);
    }
  }
  sync_warp();
  const auto rows = token_rows<T>(b, to, head);
  device::store_rows<16, kWarp>(
      through, 0, p.columns,
      [&](int row) { return b.first + row < p.where.length ? row_of(p, rows, b.first + row) : nullptr; }, anew(lane()));
  sync_warp();  // the rows may be filled again
}

// Where a sequence leaves its share of the CLS's row.
VK_DEVICE float* part_of(const Tiled& p, const Block& b, float* part, int heads, int head) {
  if (!p.cls) return nullptr;
  return part + ((int64_t(b.at.sample) * heads + head) * p.where.outer + b.at.outer) * p.columns;
}

}  // namespace
}  // namespace vk
