// Rows of a head turned where they lie in a warp's registers, and gradients of turned rows turned back.
//
// A row of angles: the cosines of d / 2 pairs, then their sines. Pairs are neighbours, which share a word, or elements
// of two halves; halves are whole chunks apart (d 64 and 128), so both elements of a pair are in one lane.
#pragma once

#include "vkernels/device/piece.h"
#include "vkernels/device/row_tile.h"
#include "vkernels/rope.h"

namespace vk {
namespace {

using namespace device;

template <int kPairs>
struct Angles {
  float cos[kPairs], sin[kPairs];
};

// Those of pairs first .. first + kPairs - 1; direction -1 turns back.
template <int kPairs>
VK_DEVICE Angles<kPairs> load_angles(const float* row, int pairs, int first, float direction) {
  Angles<kPairs> by;
  load_floats(row + first, by.cos);
  load_floats(row + pairs + first, by.sin);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) by.sin[i] *= direction;
  return by;
}

// For a lane's vector in chunk c, whose pairs end in the one kChunks / 2 chunks on.
VK_DEVICE Angles<8> angles_of_halves(const float* row, int vectors, int c, float direction = 1) {
  return load_angles<8>(row, 4 * vectors, 8 * (lane() % 4 + 4 * c), direction);
}
// For the neighbours in vector `at`.
VK_DEVICE Angles<4> angles_of_neighbours(const float* row, int vectors, int at, float direction = 1) {
  return load_angles<4>(row, 4 * vectors, 4 * at, direction);
}

template <class T>
VK_DEVICE void turn_halves(Vector& first, Vector& second, const Angles<8>& by) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float a[2], b[2];
    widen_two(first.word[w], a[0], a[1], T{});
    widen_two(second.word[w], b[0], b[1], T{});
#pragma unroll
    for (int e = 0; e < 2; ++e) turn_pair(a[e], b[e], by.cos[2 * w + e], by.sin[2 * w + e], a[e], b[e]);
    first.word[w] = round_two(a[0], a[1], T{});
    second.word[w] = round_two(b[0], b[1], T{});
  }
}

template <class T>
VK_DEVICE void turn_neighbours(Vector& x, const Angles<4>& by) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float a, b;
    widen_two(x.word[w], a, b, T{});
    turn_pair(a, b, by.cos[w], by.sin[w], a, b);
    x.word[w] = round_two(a, b, T{});
  }
}

// Both tensors of a row by the same angles, which are read once.
template <class T, int kChunks>
VK_DEVICE void turn_rows(RowTile<kChunks>& q, RowTile<kChunks>& k, const float* const (&angles)[2], int vectors,
                         bool neighbours) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (neighbours) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = lane() % 4 + 4 * c;
        if (at >= vectors) break;
        const Angles<4> by = angles_of_neighbours(angles[half], vectors, at);
        turn_neighbours<T>(q.half[half][c], by);
        turn_neighbours<T>(k.half[half][c], by);
      }
    } else if constexpr (kChunks % 2 == 0) {
#pragma unroll
      for (int c = 0; c < kChunks / 2; ++c) {
        const Angles<8> by = angles_of_halves(angles[half], vectors, c);
        turn_halves<T>(q.half[half][c], q.half[half][c + kChunks / 2], by);
        turn_halves<T>(k.half[half][c], k.half[half][c + kChunks / 2], by);
      }
    }
  }
}

// Chunk c of a gradient turned back, with the chunk its pairs end in.
VK_DEVICE void turn_back(Chunk& first, Chunk& second, const float* const (&angles)[2], int vectors, int c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Angles<8> by = angles_of_halves(angles[half], vectors, c, -1);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float &a = first[i / 2].value[2 * half + i % 2], &b = second[i / 2].value[2 * half + i % 2];
      turn_pair(a, b, by.cos[i], by.sin[i], a, b);
    }
  }
}
// The same where pairs are neighbours.
VK_DEVICE void turn_back(Chunk& x, const float* const (&angles)[2], int vectors, int c) {
  const int at = lane() % 4 + 4 * c;
  if (at >= vectors) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Angles<4> by = angles_of_neighbours(angles[half], vectors, at, -1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float &a = x[j].value[2 * half], &b = x[j].value[2 * half + 1];
      turn_pair(a, b, by.cos[j], by.sin[j], a, b);
    }
  }
}

}  // namespace
}  // namespace vk
