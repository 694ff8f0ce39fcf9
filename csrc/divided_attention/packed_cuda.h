// Sequences of up to 16 tokens: a warp takes as many as fill 16 rows, one head at a time. Everything happens in its
// registers: one load of every row, one pass, one store; no shared memory, no barrier.
//
// The scores of such a tile are block-diagonal. What that wastes on products costs no byte, and bytes decide here.
#pragma once

#include "sequences_cuda.h"
#include "turn_cuda.h"
#include "vkernels/device/softmax.h"

namespace vk {
namespace {

using namespace device;

constexpr int kPackedWarps = 4, kPackedThreads = kPackedWarps * kWarp;

struct Packed {
  Heads q, k, v, o, dq, dk, dv;  // backward: o is its gradient
  Sequences where;
  Divisor heads, per_key;  // heads of the grid; heads of q that share one of k
  int64_t units;           // warps with work
  int packed;              // sequences of a tile
  int magic;               // row * magic >> 8 = row / length
  int vectors;
  float scale, scale_log2;
  bool cls;
  const float* angles;  // b|1 frames d, where q and k are turned
  int angles_b;         // frames, or 0 where samples share them
  bool neighbours;      // are pairs, else halves
};

// The two rows of a lane, g and g + 8, and which sequence of the tile they and the lane's columns belong to.
struct Rows {
  int sample[2], token[2];  // token -1: there is none
  int slot[2], column_slot[4];
  bool opens[2];  // the first row of its sample
  int frame[2];   // its row of angles
};

template <bool kTurned>
VK_DEVICE Rows rows_of(const Packed& p, int tile) {
  const int row = lane() % 16, slot = row * p.magic >> 8, sequence = tile * p.packed + slot;
  const int i = row - slot * p.where.length;
  int sample = 0, token = -1, opens = 0, frame = 0;
  if (slot < p.packed && sequence < p.where.count) {
    const Sequence s = sequence_at(p.where, sequence);
    sample = s.sample;
    token = s.base + token_of(p.where, i);
    opens = s.opens && i == 0;
    frame = s.sample * p.angles_b + s.outer * p.where.length + i;
  }
  Rows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = lane() / 4 + 8 * half;
    rows.sample[half] = shuffle(sample, from);
    rows.token[half] = shuffle(token, from);
    rows.opens[half] = shuffle(opens, from) != 0;
    if constexpr (kTurned) rows.frame[half] = shuffle(frame, from);
    rows.slot[half] = from * p.magic >> 8;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) rows.column_slot[i] = (lane() % 4 * 2 + i % 2 + i / 2 * 8) * p.magic >> 8;
  return rows;
}

template <class T>
struct Pointers {
  T* row[2];
};

template <class T>
VK_DEVICE Pointers<T> pointers(const Heads& x, const Rows& rows, int head, int element = 0) {
  Pointers<T> p;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    p.row[half] = rows.token[half] < 0 ? nullptr : row_at<T>(x, rows.sample[half], rows.token[half], head) + element;
  return p;
}

template <int kChunks, class T>
VK_DEVICE RowTile<kChunks> load_rows(const Heads& x, const Rows& rows, int head, int vectors) {
  const auto at = pointers<const T>(x, rows, head);
  return device::load_rows<kChunks>(at.row, vectors);
}

// Chunk c to its rows. A CLS token is in no sequence: who stores the first row of a sample stores its zeros too.
template <class T>
VK_DEVICE void store_rows(const Packed& p, const Heads& x, const Rows& rows, int head, int c, const Chunk& chunk,
                          float low, float high) {
  const auto to = pointers<T>(x, rows, head);
  store_chunk(to.row, p.vectors, c, chunk, low, high);
  const int at = lane() % 4 + 4 * c;
  if (!p.cls || at >= p.vectors) return;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (rows.opens[half]) store16(row_at<T>(x, rows.sample[half], 0, head) + at * kLanesOf<T>, Vector{});
}

// Scores become weights, 0 between sequences. A row sees itself at least, also one that belongs to no sequence.
VK_DEVICE OnlineSoftmax softmax_rows(FragmentC (&s)[2], const Rows& rows, float scale_log2) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (rows.column_slot[2 * j + e % 2] != rows.slot[e / 2]) s[j].value[e] = kNothing;
  OnlineSoftmax row;
  float keep[2];
  softmax_step(row, s, scale_log2, keep);
  complete(row);
  return row;
}

// p in s, dp in ds; p normalised and p * (dp - sum of p * dp) in their places.
VK_DEVICE void softmax_gradient(FragmentC (&s)[2], FragmentC (&ds)[2], const OnlineSoftmax& row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float share = 1.0f / row.total[half];
    float mixed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& p = s[i / 2].value[2 * half + i % 2];
      p *= share;
      mixed += p * ds[i / 2].value[2 * half + i % 2];
    }
    mixed = sum_over_lanes<4>(mixed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = ds[i / 2].value[2 * half + i % 2];
      x = s[i / 2].value[2 * half + i % 2] * (x - mixed);
    }
  }
}

template <class Element, int kChunksOfD, bool kIsTurned>
struct PackedTraits {
  using T = Element;
  static constexpr int kChunks = kChunksOfD;
  static constexpr bool kTurned = kIsTurned;
};

struct AnglesOfRows {
  const float* row[2];
};

VK_DEVICE AnglesOfRows angles_of(const Packed& p, const Rows& rows) {
  return {
      {p.angles + wide_product(rows.frame[0], 8 * p.vectors), p.angles + wide_product(rows.frame[1], 8 * p.vectors)}};
}

template <class Traits>
VK_KERNEL(kPackedThreads)
packed_forward(const Packed p) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kChunks;
  const int64_t unit = block_x() * kPackedWarps + warp();
  if (unit >= p.units) return;
  const int tile = quotient(int(unit), p.heads), head = int(unit) - tile * int(p.heads.divisor);
  const int key = quotient(head, p.per_key);
  const Rows rows = rows_of<Traits::kTurned>(p, tile);
  auto q = load_rows<kChunks, T>(p.q, rows, head, p.vectors);
  auto k = load_rows<kChunks, T>(p.k, rows, key, p.vectors);
  const auto v = load_rows<kChunks, T>(p.v, rows, key, p.vectors);
  if constexpr (Traits::kTurned) turn_rows<T>(q, k, angles_of(p, rows).row, p.vectors, p.neighbours);

  FragmentC s[2]{};
  multiply_rows<T>(s, q, k);
  const OnlineSoftmax row = softmax_rows(s, rows, p.scale_log2);
  const FragmentA weights = as_operand<T>(s[0], s[1]);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Chunk o{};
    mix_rows<T>(o, weights, v, c);
    store_rows<T>(p, p.o, rows, head, c, o, 1.0f / row.total[0], 1.0f / row.total[1]);
  }
}

// What one head's gradients are made of, as left operands.
struct Gradients {
  FragmentA queries;        // ds: rows are queries
  FragmentA keys, weights;  // ds and p: rows are keys
};

template <class T, int kChunks>
VK_DEVICE Gradients differentiate(const Packed& p, const Rows& rows, const RowTile<kChunks>& q,
                                  const RowTile<kChunks>& k, const RowTile<kChunks>& v, const RowTile<kChunks>& g) {
  FragmentC s[2]{}, ds[2]{};
  multiply_rows<T>(s, q, k);
  multiply_rows<T>(ds, g, v);
  softmax_gradient(s, ds, softmax_rows(s, rows, p.scale_log2));
  const FragmentA queries = as_operand<T>(ds[0], ds[1]);
  return {queries, transpose_matrix(queries), transpose_matrix(as_operand<T>(s[0], s[1]))};
}

// scale * weights x: the gradient of what was turned is turned back.
template <class Traits, bool kTurned>
VK_DEVICE void store_gradient(const Packed& p, const Heads& to, const Rows& rows, int head, const FragmentA& weights,
                              const RowTile<Traits::kChunks>& x, float scale) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kChunks, kApart = kChunks / 2;
  if constexpr (kTurned && kChunks % 2 == 0)
    if (!p.neighbours) {
#pragma unroll
      for (int c = 0; c < kApart; ++c) {
        Chunk first{}, second{};
        mix_rows<T>(first, weights, x, c);
        mix_rows<T>(second, weights, x, c + kApart);
        turn_back(first, second, angles_of(p, rows).row, p.vectors, c);
        store_rows<T>(p, to, rows, head, c, first, scale, scale);
        store_rows<T>(p, to, rows, head, c + kApart, second, scale, scale);
      }
      return;
    }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Chunk dx{};
    mix_rows<T>(dx, weights, x, c);
    if constexpr (kTurned) turn_back(dx, angles_of(p, rows).row, p.vectors, c);
    store_rows<T>(p, to, rows, head, c, dx, scale, scale);
  }
}

template <class Traits>
VK_KERNEL(kPackedThreads)
packed_backward(const Packed p) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kChunks;
  const int64_t unit = block_x() * kPackedWarps + warp();
  if (unit >= p.units) return;
  const int tile = quotient(int(unit), p.heads), head = int(unit) - tile * int(p.heads.divisor);
  const Rows rows = rows_of<Traits::kTurned>(p, tile);
  auto q = load_rows<kChunks, T>(p.q, rows, head, p.vectors);
  auto k = load_rows<kChunks, T>(p.k, rows, head, p.vectors);
  const auto v = load_rows<kChunks, T>(p.v, rows, head, p.vectors);
  const auto g = load_rows<kChunks, T>(p.o, rows, head, p.vectors);
  if constexpr (Traits::kTurned) turn_rows<T>(q, k, angles_of(p, rows).row, p.vectors, p.neighbours);
  const Gradients d = differentiate<T>(p, rows, q, k, v, g);
  store_gradient<Traits, Traits::kTurned>(p, p.dq, rows, head, d.queries, k, p.scale);
  store_gradient<Traits, Traits::kTurned>(p, p.dk, rows, head, d.keys, q, p.scale);
  store_gradient<Traits, false>(p, p.dv, rows, head, d.weights, g, 1.0f);
}

// Several heads share k and v, and their gradients are summed in registers, which hold 32 elements of d at a time: the
// probabilities are computed again for each.
template <class Traits>
VK_KERNEL(kPackedThreads)
packed_backward_grouped(const Packed p) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kChunks;
  const int64_t unit = block_x() * kPackedWarps + warp();
  if (unit >= p.units) return;
  const int tile = quotient(int(unit), p.heads), key = int(unit) - tile * int(p.heads.divisor);
  const int per_key = int(p.per_key.divisor);
  const Rows rows = rows_of<false>(p, tile);
  for (int c = 0; 4 * c < p.vectors; ++c) {
    const auto chunk_of = [&](const Heads& x, int head) {
      const auto at = pointers<const T>(x, rows, head, 32 * c);
      return device::load_rows<1>(at.row, p.vectors - 4 * c);
    };
    Chunk dk{}, dv{};
    for (int head = key * per_key; head < (key + 1) * per_key; ++head) {
      const auto q = load_rows<kChunks, T>(p.q, rows, head, p.vectors);
      const auto k = load_rows<kChunks, T>(p.k, rows, key, p.vectors);
      const auto v = load_rows<kChunks, T>(p.v, rows, key, p.vectors);
      const auto g = load_rows<kChunks, T>(p.o, rows, head, p.vectors);
      const Gradients d = differentiate<T>(p, rows, q, k, v, g);
      Chunk dq{};
      mix_rows<T>(dq, d.queries, chunk_of(p.k, key), 0);
      store_rows<T>(p, p.dq, rows, head, c, dq, p.scale, p.scale);
      mix_rows<T>(dk, d.keys, chunk_of(p.q, head), 0);
      mix_rows<T>(dv, d.weights, chunk_of(p.o, head), 0);
    }
    store_rows<T>(p, p.dk, rows, key, c, dk, p.scale, p.scale);
    store_rows<T>(p, p.dv, rows, key, c, dv, 1.0f, 1.0f);
  }
}

}  // namespace
}  // namespace vk
