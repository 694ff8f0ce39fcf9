// Angles of one token and the rotation of one head's row. Include only from *_cpu.cpp files.
#pragma once

#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"
#include "vkernels/rope.h"

namespace vk::VK_ISA {

// sin and cos of phase / 2^32 turns, each within 1e-7: the nearest quarter turn is split off in integers.
VK_INLINE void sincos_turns(u32v phase, f32v& sin, f32v& cos) {
  const u32v quarter = (phase + 0x20000000u) >> 30;
  f32v s, c;
  sincos_of_eighth<f32v>(__builtin_convertvector((i32v)(phase - (quarter << 30)), f32v) * kRadiansOfPhase, s, c);
  const i32v swap = (i32v)((quarter & 1u) != 0u);
  const f32v sin_size = swap ? c : s, cos_size = swap ? s : c;
  sin = (f32v)((u32v)sin_size ^ ((quarter & 2u) << 30));
  cos = (f32v)((u32v)cos_size ^ (((quarter + 1u) & 2u) << 30));
}

// The rotation of every pair of one token, held for all its heads. Neighbouring pairs (blocks == 0) are kept spread out
// as (c, c) and (-s, s), so that a row turns with one swap per vector.
namespace {  // each instruction set its own

class TokenAngles {
 public:
  // Slots of scratch() that are free in the caller.
  TokenAngles(const RopeArgs& r, int slot)
      : r_(r), pairs_(r.pairs()), stride_(round_up(r.blocks == 0 ? 2 * pairs_ : pairs_)) {
    const size_t tables = static_cast<size_t>(2 * r.heads() * stride_ + 2 * round_up(pairs_)) * sizeof(float);
    cos_ = static_cast<float*>(scratch(slot, tables + static_cast<size_t>(round_up(pairs_)) * sizeof(uint32_t)));
    sin_ = cos_ + r.heads() * stride_;
    c_ = sin_ + r.heads() * stride_;
    s_ = c_ + round_up(pairs_);
    phase_ = reinterpret_cast<uint32_t*>(s_ + round_up(pairs_));
    for (int64_t j = 0; j < round_up(pairs_); ++j) phase_[j] = 0;
  }

  void set(int64_t ib, int64_t is) {
    const float scale = static_cast<float>(r_.scale), sign = r_.inverse ? -scale : scale;
    if (r_.apart()) return set_apart(ib, is, scale, sign);
    for (int64_t h = 0; h < r_.heads(); ++h) {
      if (r_.cos.given) {
        const int64_t row = (r_.cos.size(0) == 1 ? 0 : ib) * r_.cos.stride(0) + is * r_.cos.stride(1);
        const int64_t row_s = (r_.sin.size(0) == 1 ? 0 : ib) * r_.sin.stride(0) + is * r_.sin.stride(1);
        for (int64_t j = 0; j < pairs_; ++j) {
          c_[j] = r_.cos.ptr<const float>()[row + j] * scale;
          s_[j] = r_.sin.ptr<const float>()[row_s + j] * sign;
        }
      } else {
        set_phases(h, ib, is);
        for (int64_t j = 0; j < pairs_; j += kLanes) {
          u32v phase;
          memcpy(&phase, phase_ + j, sizeof phase);
          f32v s, c;
          sincos_turns(phase, s, c);
          VK_ISA::store(c_ + j, c * scale);
          VK_ISA::store(s_ + j, s * sign);
        }
      }
      float *cos = cos_ + h * stride_, *sin = sin_ + h * stride_;
      if (r_.blocks == 0) {
        for (int64_t j = 0; j < pairs_; ++j) {
          cos[2 * j] = cos[2 * j + 1] = c_[j];
          sin[2 * j] = -s_[j];
          sin[2 * j + 1] = s_[j];
        }
      } else {
        memcpy(cos, c_, sizeof(float) * static_cast<size_t>(pairs_));
        memcpy(sin, s_, sizeof(float) * static_cast<size_t>(pairs_));
      }
    }
  }

  // y = the rotated part of x (both point at the head's first element); `head` counts the spec's heads. x may be y.
  template <class X, class Y>
  __attribute__((always_inline)) void rotate(const X* x, Y* y, int64_t head) const {
    const float *cos = cos_ + head * stride_, *sin = sin_ + head * stride_;
    x += r_.offset;
    y += r_.offset;
    if (r_.blocks == 0) {
      for (int64_t j = 0; j < 2 * pairs_; j += kLanes) {
        const int64_t count = 2 * pairs_ - j;
        const f32v v = VK_ISA::load(x + j, count);
        VK_ISA::store(y + j, v * VK_ISA::load(cos + j) + swap_neighbours(v) * VK_ISA::load(sin + j), count);
      }
      return;
    }
    const int64_t half = pairs_ / r_.blocks;
    for (int64_t block = 0; block < r_.blocks; ++block, x += 2 * half, y += 2 * half, cos += half, sin += half)
      for (int64_t j = 0; j < half; j += kLanes) {
        const int64_t count = half - j;
        const f32v c = VK_ISA::load(cos + j, count), s = VK_ISA::load(sin + j, count);
        const f32v x0 = VK_ISA::load(x + j, count), x1 = VK_ISA::load(x + half + j, count);
        f32v y0, y1;
        turn_pair(x0, x1, c, s, y0, y1);
        VK_ISA::store(y + j, y0, count);
        VK_ISA::store(y + half + j, y1, count);
      }
  }

 private:
  static int64_t round_up(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  __attribute__((always_inline)) static f32v swap_neighbours(f32v v) {
    i32v order;
    for (int i = 0; i < kLanes; ++i) order[i] = i ^ 1;
    return __builtin_shuffle(v, order);
  }

  // Neighbours, each by an angle of its own.
  void set_apart(int64_t ib, int64_t is, float scale, float sign) {
    for (int64_t member = 0; member < 2; ++member) {
      const auto row = [&](const TensorRef& t) {
        return t.ptr<const float>() + (t.size(0) == 1 ? 0 : ib) * t.stride(0) + is * t.stride(1) + member * t.stride(2);
      };
      const float *c = row(r_.cos), *s = row(r_.sin), side = member == 0 ? -sign : sign;
      for (int64_t j = 0; j < pairs_; ++j) {
        cos_[2 * j + member] = c[j] * scale;
        sin_[2 * j + member] = s[j] * side;
      }
    }
  }

  void set_phases(int64_t h, int64_t ib, int64_t is) {
    int64_t fixed[kMaxAxes];
    const bool real = r_.pos.dtype == Dtype::f32 || r_.pos.dtype == Dtype::f64;
    const int64_t axes = r_.pos.size(0) < kMaxAxes ? r_.pos.size(0) : kMaxAxes;
    for (int64_t a = 0; a < axes; ++a) {
      const int64_t at =
          a * r_.pos.stride(0) + (r_.pos.size(1) == 1 ? 0 : ib) * r_.pos.stride(1) + is * r_.pos.stride(2);
      switch (r_.pos.dtype) {
        case Dtype::i32:
          fixed[a] = r_.pos.ptr<const int32_t>()[at];
          break;
        case Dtype::i64:
          fixed[a] = r_.pos.ptr<const int64_t>()[at];
          break;
        case Dtype::f32:
          fixed[a] = to_fixed(static_cast<double>(r_.pos.ptr<const float>()[at]));
          break;
        default:
          fixed[a] = to_fixed(r_.pos.ptr<const double>()[at]);
      }
    }
    const int32_t* axis = r_.axis.ptr<const int32_t>() + h * r_.axis.stride(0);
    const int64_t* freq = r_.freq.ptr<const int64_t>();
    for (int64_t j = 0; j < pairs_; ++j) {
      const uint64_t f = static_cast<uint64_t>(freq[j]);
      const int64_t p = axis[j] < 0 ? 0 : fixed[axis[j]];
      phase_[j] = phase_of(real ? turns_fixed(p, f) : turns(p, f));
    }
  }

  static constexpr int64_t kMaxAxes = 4;
  const RopeArgs& r_;
  int64_t pairs_, stride_;
  float *cos_, *sin_, *c_, *s_;
  uint32_t* phase_;
};

}  // namespace

}  // namespace vk::VK_ISA
