// The products of attention on tensor cores by mma.sync, and the ring of tiles that feeds them. What an sm_90a loop
// with wgmma would replace; scheduler, mask and epilogue do not know how a product is made.
#pragma once

#include "vkernels/device/softmax.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/tile.h"

namespace vk::device {

// Tiles that are filled while others are read: load `index` goes to slot index % kSlots. One barrier a load.
template <class AnyTile, int kSlots>
struct Ring {
  static constexpr size_t kBytes = kSlots * AnyTile::kBytes;
  char* data;
};

template <class AnyTile, int kSlots>
VK_DEVICE AnyTile slot_of(const Ring<AnyTile, kSlots>& ring, int index) {
  const unsigned slot = static_cast<unsigned>(index) % kSlots;
  return {reinterpret_cast<typename AnyTile::Element*>(ring.data + slot * AnyTile::kBytes)};
}

// The tile of load `index` is there for all threads, and load index - 1 has been used by all.
template <class AnyTile, int kSlots>
VK_DEVICE AnyTile wait_for(const Ring<AnyTile, kSlots>& ring, int index) {
  wait_for_copies<kSlots - 2>();
  sync_block();
  return slot_of(ring, index);
}

// s += a b': rows `row` .. of a (kM tiles of 16) with all rows of b; summed over the columns of both.
template <class T, int kM, int N, int RA, int RB, int C>
VK_DEVICE void multiply_rows(FragmentC (&s)[kM][N], const Tile<T, RA, C>& a, int row, const Tile<T, RB, C>& b) {
  const int at = anew(lane());
#pragma unroll
  for (int k = 0; k < C; k += 16) {
    FragmentA left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) left[m] = left_operand(a, row + 16 * m, k, at);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      FragmentB right[2];
      right_operands(right, b, 8 * n, k, at);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_add<T>(s[m][n + i], left[m], right[i]);
    }
  }
}

// Weights rounded to T, half the registers.
template <class T, int N>
VK_DEVICE void round_weights(FragmentA (&w)[N / 2], const FragmentC (&p)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += 2) w[n / 2] = as_operand<T>(p[n], p[n + 1]);
}

// acc += w b: weights with the rows of b. The last 8 columns are left out where `columns` says so (d = 72, 88).
template <class T, int kM, int K, int N, int RB, int C>
VK_DEVICE void mix_rows(FragmentC (&acc)[kM][N], const FragmentA (&w)[kM][K], const Tile<T, RB, C>& b, int columns) {
  static_assert(16 * K == RB && 8 * N == C, "every weight meets its row");
  const bool whole = C % 64 == 0 || columns > C - 8;
  const int at = anew(lane());
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      FragmentB right[2];
      right_operands_across(right, b, 16 * k, 8 * n, at);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (n + i == N - 1 && !whole) break;
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_add<T>(acc[m][n + i], w[m][k], right[i]);
      }
    }
  }
}

}  // namespace vk::device
