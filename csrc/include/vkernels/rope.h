// What a rotation is, for every op that applies one: angles as fixed-point turns, and the arguments that carry them.
#pragma once

#include <cstdint>

#include "vkernels/host_device.h"
#include "vkernels/tensor.h"

namespace vk {

// An angle in turns: frequency is a fraction of a turn per unit of position, times 2^64. Wrapping is the range
// reduction, so an integer position is exact. A real position is fixed point with 32 fractional bits.
VK_HD uint64_t turns(int64_t position, uint64_t frequency) { return static_cast<uint64_t>(position) * frequency; }
VK_HD uint64_t turns_fixed(int64_t position, uint64_t frequency) {
  const uint64_t whole = static_cast<uint64_t>(position >> 32),
                 fraction = static_cast<uint64_t>(position) & 0xffffffffu;
  return whole * frequency + fraction * (frequency >> 32) + ((fraction * (frequency & 0xffffffffu)) >> 32);
}

inline constexpr int64_t kMaxPairs = 1024;

struct RopeArgs {
  TensorRef pos;   // axes b|1 s: int32, int64, float32 or float64; absent when a table is given
  TensorRef axis;  // heads r int32: the axis pair j of a head follows, -1 for none; heads divides every number of heads
  TensorRef freq;  // r int64: turns * 2^64, as bits
  TensorRef cos;   // b|1 s r float: the caller's table
  TensorRef sin;
  double scale = 1;
  bool inverse = false;
  int64_t blocks = 1;  // half layout inside each of `blocks` equal parts; 0: neighbouring elements are a pair
  int64_t offset = 0;  // first rotated element of a head

  int64_t pairs() const { return cos.given ? cos.size(2) : freq.given ? freq.size(0) : 0; }
  int64_t heads() const { return cos.given || !axis.given ? 1 : axis.size(0); }
};

}  // namespace vk
