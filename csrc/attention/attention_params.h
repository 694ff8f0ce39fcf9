// What every kernel of attention is told.
#pragma once

#include <cmath>

#include "attention_schedule.h"
#include "vkernels/device/softmax.h"

namespace vk::device {

// Rows of a tensor b s heads d, in elements.
struct Rows {
  const void* data;
  int64_t b, s, head;
};

struct Problem {
  Rows q, k, v;
  Mask mask;
  Schedule schedule;
  int d, share;  // query heads that read one key head
  float scale;   // times log2 e
};

template <class T>
VK_DEVICE const T* head_of(const Rows& x, const Place& at, int head) {
  return static_cast<const T*>(x.data) + at.sample * x.b + head * x.head;
}

inline Rows rows_of(const TensorRef& t) { return {t.data, t.stride(0), t.stride(1), t.stride(2)}; }

// Blocks own tiles of `tile` queries, or of keys.
inline Problem problem_of(const AttentionParams& a, int tile, bool keys) {
  Problem p{};
  p.q = rows_of(a.q), p.k = rows_of(a.k), p.v = rows_of(a.v);
  p.mask = mask_on_device(a, tile);
  p.d = int(a.q.size(3));
  p.share = a.k.size(2) > 0 ? int(a.q.size(2) / a.k.size(2)) : 1;
  p.scale = float(a.scale * double(kLog2e));
  p.schedule = schedule_of(a, p.mask, tile, keys);
  return p;
}

}  // namespace vk::device
