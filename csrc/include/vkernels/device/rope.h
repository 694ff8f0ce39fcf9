// Rotations inside a kernel: what of RopeArgs travels to the GPU, the angle of one pair, where an element's pair lies.
#pragma once

#include "vkernels/device/memory.h"
#include "vkernels/rope.h"

namespace vk::device {

struct Rope {
  const void* pos;  // axes b|1 s, or null: tables
  Dtype pos_dtype;
  int axes;
  int64_t pos_axis, pos_b, pos_s;  // strides; 0 over a batch that is shared
  const int32_t* axis;             // heads pairs
  int64_t axis_head;
  const int64_t* freq;
  const float *cos, *sin;
  int64_t cos_b, cos_s, sin_b, sin_s;
  float scale, sin_scale;  // sin's carries the direction
  int pairs, heads, blocks, offset;
};

inline int64_t batch_stride(const TensorRef& t, int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

inline Rope rope_on_device(const RopeArgs& a) {
  Rope r{};
  r.scale = static_cast<float>(a.scale);
  r.sin_scale = a.inverse ? -r.scale : r.scale;
  r.pairs = static_cast<int>(a.pairs());
  r.heads = static_cast<int>(a.heads());
  r.blocks = static_cast<int>(a.blocks);
  r.offset = static_cast<int>(a.offset);
  if (a.cos.given) {
    r.cos = a.cos.ptr<const float>();
    r.sin = a.sin.ptr<const float>();
    r.cos_b = batch_stride(a.cos, 0), r.cos_s = a.cos.stride(1);
    r.sin_b = batch_stride(a.sin, 0), r.sin_s = a.sin.stride(1);
  } else {
    r.pos = a.pos.data;
    r.pos_dtype = a.pos.dtype;
    r.axes = static_cast<int>(a.pos.size(0));
    r.pos_axis = a.pos.stride(0), r.pos_b = batch_stride(a.pos, 1), r.pos_s = a.pos.stride(2);
    r.axis = a.axis.ptr<const int32_t>();
    r.axis_head = a.axis.stride(0);
    r.freq = a.freq.ptr<const int64_t>();
  }
  return r;
}

VK_DEVICE uint64_t turns_at(const Rope& r, int64_t at, uint64_t frequency) {
  switch (r.pos_dtype) {
    case Dtype::i32:
      return turns(load(static_cast<const int32_t*>(r.pos) + at), frequency);
    case Dtype::i64:
      return turns(load(static_cast<const int64_t*>(r.pos) + at), frequency);
    case Dtype::f32:
      return turns_fixed(to_fixed(load(static_cast<const float*>(r.pos) + at)), frequency);
    default:
      return turns_fixed(to_fixed(load(static_cast<const double*>(r.pos) + at)), frequency);
  }
}

// Cosine and sine of pair j at token (ib, is), scaled. Nobody can look at axis before the launch: a pair that follows
// no axis of pos does not turn.
VK_DEVICE void angle_of(const Rope& r, int head, int64_t ib, int64_t is, int j, float& cos, float& sin) {
  if (r.cos) {
    cos = load(r.cos + ib * r.cos_b + is * r.cos_s + j);
    sin = load(r.sin + ib * r.sin_b + is * r.sin_s + j);
  } else {
    const int axis = load(r.axis + head * r.axis_head + j);
    uint64_t angle = 0;
    if (axis >= 0 && axis < r.axes)
      angle = turns_at(r, axis * r.pos_axis + ib * r.pos_b + is * r.pos_s, static_cast<uint64_t>(load(r.freq + j)));
    sincos_of_phase(phase_of(angle), sin, cos);
  }
  cos *= r.scale;
  sin *= r.sin_scale;
}

// Element e of a head: its pair (-1: it does not turn), the other element of it, and whether it is the pair's first.
struct Partner {
  int pair, element;
  bool first;
};

VK_HD Partner partner_of(const Rope& r, int e) {
  const int at = e - r.offset;
  if (at < 0 || at >= 2 * r.pairs) return {-1, e, true};
  if (r.blocks == 0) return {at / 2, r.offset + (at ^ 1), at % 2 == 0};
  const int half = r.pairs / r.blocks, block = at / (2 * half), inside = at % (2 * half);
  const bool first = inside < half;
  return {block * half + inside % half, first ? e + half : e - half, first};
}

// Where the two elements of pair j lie.
VK_HD void pair_at(const Rope& r, int j, int& first, int& second) {
  if (r.blocks == 0) {
    first = r.offset + 2 * j;
    second = first + 1;
  } else {
    const int half = r.pairs / r.blocks;
    first = r.offset + j / half * 2 * half + j % half;
    second = first + half;
  }
}

}  // namespace vk::device
