// Where tiles pass by, q and k are turned in shared memory as soon as they are there, before a product reads them.
// Their gradients are turned back as float32 on the way out.
//
// A thread turns four pairs at a time, two pieces of 8 bytes: neighbours lie side by side, halves d / 2 apart. That is
// a multiple of 4 elements for every head, of 8 it is not (72, 88).
#pragma once

#include "tiled_cuda.h"
#include "turn_cuda.h"

namespace vk {
namespace {

constexpr int kFour = 4;

// The elements with which the pieces of four pairs begin.
struct Pieces {
  uint32_t first, second;
};

VK_DEVICE Pieces pieces_of(const Tiled& p, uint32_t four) {
  return p.neighbours ? Pieces{2 * kFour * four, 2 * kFour * four + kFour}
                      : Pieces{kFour * four, uint32_t(p.columns) / 2 + kFour * four};
}

// Of four pairs in row `row` of the sequence.
VK_DEVICE Angles<kFour> angles_of(const Tiled& p, const Block& b, int row, int four, float direction = 1) {
  const int frame = b.at.sample * p.angles_b + b.at.outer * p.where.length + row;
  return load_angles<kFour>(p.angles + wide_product(frame, p.columns), p.columns / 2, kFour * four, direction);
}

VK_DEVICE void turn_four(float (&x)[kFour], float (&y)[kFour], const Angles<kFour>& by, bool neighbours) {
  if (neighbours) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      turn_pair(x[2 * i], x[2 * i + 1], by.cos[i], by.sin[i], x[2 * i], x[2 * i + 1]);
      turn_pair(y[2 * i], y[2 * i + 1], by.cos[2 + i], by.sin[2 + i], y[2 * i], y[2 * i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) turn_pair(x[i], y[i], by.cos[i], by.sin[i], x[i], y[i]);
  }
}

template <class T, int R, int C>
VK_DEVICE HalfVector* piece_at(const Tile<T, R, C>& tile, uint32_t row, uint32_t element) {
  return reinterpret_cast<HalfVector*>(vector_at(tile, row, element / 8) + element % 8);
}

// The first `live` rows of a tile; its row 0 is row `first` of the sequence. `threads` threads call.
template <class T, int R, int C>
VK_DEVICE void turn_tile(const Tiled& p, const Block& b, const Tile<T, R, C>& tile, int first, int live, int thread,
                         int threads) {
  constexpr int kFours = C / (2 * kFour);
#pragma unroll 1
  for (int at = thread; at < live * kFours; at += threads) {
    const uint32_t row = uint32_t(at) / kFours, four = uint32_t(at) % kFours;
    if (2 * kFour * four >= uint32_t(p.columns)) continue;
    const Pieces pieces = pieces_of(p, four);
    HalfVector *one = piece_at(tile, row, pieces.first), *two = piece_at(tile, row, pieces.second);
    float x[kFour], y[kFour];
    widen_piece<T>(load_shared(one), x);
    widen_piece<T>(load_shared(two), y);
    turn_four(x, y, angles_of(p, b, first + row, four), p.neighbours);
    store_shared(one, narrow_piece<T>(x));
    store_shared(two, narrow_piece<T>(y));
  }
}

// The rows a warp holds, which came in a group of copies before the last one: their first tensor.
template <class Traits, int kTensors>
VK_DEVICE void turn_held(const Tiled& p, const Block& b, const Room<Traits, kTensors>& room) {
  if (!p.angles) return;
  wait_for_copies<1>();
  sync_warp();
  const int live = p.where.length - b.first;
  turn_tile(p, b, rows_in(room, 0), b.first, live < 16 ? live : 16, lane(), kWarp);
}

// The first tensor of a tile that is there. The block calls, and may read the rows held afterwards, too.
template <class Traits, int kTensors>
VK_DEVICE void turn_others(const Tiled& p, const Block& b, const Room<Traits, kTensors>& room, int stage, int tile) {
  if (!p.angles) return;
  turn_tile(p, b, others_in(room, stage, 0), tile * p.tile_rows, live_rows(p, tile), thread_index(), thread_count());
  sync_block();
}

// Where floats of a row lie: eights change places within four, so that four rows at one column lie in banks of their
// own.
template <int kColumns>
VK_DEVICE float* floats_at(float* rows, uint32_t row, uint32_t eight, uint32_t inside) {
  return rows + (row * kColumns + eight / 4 * 32 + (eight % 4 ^ row % 4) * 8 + inside);
}

template <int kColumns>
VK_DEVICE void load_four(float (&x)[kFour], float* rows, uint32_t row, uint32_t element) {
  const float* from = floats_at<kColumns>(rows, row, element / 8, element % 8);
  widen_piece<float>(load_shared(reinterpret_cast<const Vector*>(from)), x);
}

// As store_sums, turned back: as float32 through the memory of both tensors the warp held, which nobody reads any more.
template <class Traits>
VK_DEVICE void store_turned(const Tiled& p, const Block& b, const Sums<Traits>& sum, float factor,
                            const Room<Traits, 2>& room, const Heads& to, int head) {
  using T = typename Traits::T;
  constexpr int kColumns = Traits::kColumns, kFours = kColumns / (2 * kFour);
  const int me = anew(lane());
  float* const floats = reinterpret_cast<float*>(rows_in(room, 0).data);
#pragma unroll
  for (int i = 0; i < 2 * Traits::kSteps; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const FragmentC& c = sum[i];
      float* at = floats_at<kColumns>(floats, c.row(me, 2 * half), i, c.column(me, 0));
      const HalfVector two{{float_bits(c.value[2 * half] * factor), float_bits(c.value[2 * half + 1] * factor)}};
      store_shared(reinterpret_cast<HalfVector*>(at), two);
    }
  sync_warp();
  const auto rows = token_rows<T>(b, to, head);
#pragma unroll 1
  for (int at = me; at < 16 * kFours; at += kWarp) {
    const int row = int(uint32_t(at) / kFours), four = int(uint32_t(at) % kFours);
    if (2 * kFour * four >= p.columns || b.first + row >= p.where.length) continue;
    const Pieces pieces = pieces_of(p, four);
    float x[kFour], y[kFour];
    load_four<kColumns>(x, floats, row, pieces.first);
    load_four<kColumns>(y, floats, row, pieces.second);
    turn_four(x, y, angles_of(p, b, b.first + row, four, -1), p.neighbours);
    T* const out = row_of(p, rows, b.first + row);
    store_piece<T, kFour>(out + pieces.first, narrow_piece<T>(x));
    store_piece<T, kFour>(out + pieces.second, narrow_piece<T>(y));
  }
}

}  // namespace
}  // namespace vk
