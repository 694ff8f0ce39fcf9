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

// A real position in that fixed point.
VK_HD int64_t to_fixed(double position) {
  const double scaled = position * 4294967296.0;
  return static_cast<int64_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

// The 32 bits of an angle that float32 can tell apart: the nearest, not the lower.
VK_HD uint32_t phase_of(uint64_t angle) { return static_cast<uint32_t>((angle + 0x80000000u) >> 32); }

inline constexpr float kRadiansOfPhase = 1.4629180792671596e-9f;  // 2 pi / 2^32

// sin and cos of |t| <= pi / 4, each within 1e-7. F: float, or a vector of them.
template <class F>
VK_HD void sincos_of_eighth(F t, F& s, F& c) {
  const F z = t * t;
  s = t + t * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  c = 1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
}

// sin and cos of phase / 2^32 turns: the nearest quarter turn is split off in integers.
VK_HD void sincos_of_phase(uint32_t phase, float& sin, float& cos) {
  const uint32_t quarter = (phase + 0x20000000u) >> 30;
  float s, c;
  sincos_of_eighth(static_cast<float>(static_cast<int32_t>(phase - (quarter << 30))) * kRadiansOfPhase, s, c);
  sin = quarter & 1u ? c : s;
  cos = quarter & 1u ? s : c;
  if (quarter & 2u) sin = -sin;
  if ((quarter + 1u) & 2u) cos = -cos;
}

// One pair turned. F: float, or a vector of them.
template <class F>
VK_HD void turn_pair(F x0, F x1, F c, F s, F& y0, F& y1) {
  y0 = x0 * c - x1 * s;
  y1 = x1 * c + x0 * s;
}

inline constexpr int64_t kMaxPairs = 1024;

struct RopeArgs {
  TensorRef pos;   // axes b|1 s: int32, int64, float32 or float64; absent when a table is given
  TensorRef axis;  // heads r int32: the axis pair j of a head follows, -1 for none; heads divides every number of heads
  TensorRef freq;  // r int64: turns * 2^64, as bits
  TensorRef cos;   // b|1 s r float: the caller's table; b|1 s 2 r: each member of a pair turns by an angle of its own
  TensorRef sin;
  double scale = 1;
  bool inverse = false;
  int64_t blocks = 1;  // half layout inside each of `blocks` equal parts; 0: neighbouring elements are a pair
  int64_t offset = 0;  // first rotated element of a head

  int64_t pairs() const { return cos.given ? cos.size(-1) : freq.given ? freq.size(0) : 0; }
  int64_t heads() const { return cos.given || !axis.given ? 1 : axis.size(0); }
  bool apart() const { return cos.given && cos.rank == 4; }
};

}  // namespace vk
