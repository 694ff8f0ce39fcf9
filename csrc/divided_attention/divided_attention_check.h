// What every binding of divided_attention checks before a kernel may run, and the groups its layout names.
#pragma once

#include "bind.h"
#include "divided_attention.h"

namespace vk {

// layout = [t, l, cls, spatial, patch-major, frames per group]
inline DividedAttention lay_out(const char* op, const TensorRef& q, const TensorRef& k, const TensorRef& v, float scale,
                                const std::vector<int64_t>& layout) {
  check_rank(op, "q", q, 4);
  check_rank(op, "k", k, 4);
  check_rank(op, "v", v, 4);
  VK_CHECK(q.dtype == Dtype::f32 || q.dtype == Dtype::bf16 || q.dtype == Dtype::f16, op, "q",
           "have dtype float32, bfloat16 or float16", static_cast<int>(q.dtype));
  VK_CHECK(layout.size() == 6, op, "layout", "hold 6 numbers", layout.size());
  const int64_t t = layout[0], l = layout[1], cls = layout[2], frames = layout[5];
  const int64_t limit = int64_t(1) << 31;
  VK_CHECK(t >= 0 && l >= 0 && t < limit && l < limit, op, "grid", "have sizes from 0 to 2^31",
           t < 0 || t >= limit ? t : l);
  VK_CHECK(cls == 0 || cls == 1, op, "cls", "be 0 or 1", cls);
  VK_CHECK(frames >= 1 && t % frames == 0, op, "frames_per_group", "divide the frames", frames);
  VK_CHECK(q.size(1) == cls + t * l, op, "q", "have one token per patch and cls first", shape_text(q));
  VK_CHECK(k.size(2) >= 1 && q.size(2) >= 1 && q.size(2) % k.size(2) == 0, op, "q", "have a multiple of the heads of k",
           shape_text(q));
  for (const auto& [name, x] : {std::pair{"k", k}, std::pair{"v", v}}) {
    check_dtype(op, name, x, q.dtype);
    check_size(op, name, x, 0, q.size(0));
    check_size(op, name, x, 1, q.size(1));
    check_size(op, name, x, 2, k.size(2));
    check_size(op, name, x, 3, q.size(3));
    check_unit_stride(op, name, x);
  }
  check_unit_stride(op, "q", q);

  const bool spatial = layout[3] != 0, patch_major = layout[4] != 0;
  const int64_t frame = patch_major ? 1 : l, patch = patch_major ? t : 1, groups = t / frames;
  DividedAttention p;
  ShortRows rows;
  rows.first = cls;
  p.groups.outer = groups;
  if (spatial) {  // frames a whole number of groups apart
    rows.outer_stride = frame;
    rows.token_stride = patch;
    rows.run = l > 0 ? l : 1;
    rows.run_stride = groups * frame;
    rows.shared = cls;
    p.groups.inner = 1;
    p.groups.len_q = cls + frames * l;
    p.zero_first = cls && groups == 0;
  } else {  // consecutive frames
    rows.outer_stride = frames * frame;
    rows.inner_stride = patch;
    rows.token_stride = frame;
    p.groups.inner = l;
    p.groups.len_q = frames;
    p.zero_first = cls;
  }
  p.groups.len_k = p.groups.len_q;
  p.groups.q_rows = p.groups.k_rows = rows;
  p.groups.q = q, p.groups.k = k, p.groups.v = v;
  p.groups.scale = scale;
  return p;
}

inline void check_like(const char* op, const char* name, const TensorRef& x, const TensorRef& like) {
  check_rank(op, name, x, 4);
  check_dtype(op, name, x, like.dtype);
  for (int i = 0; i < 4; ++i) check_size(op, name, x, i, like.size(i));
  check_unit_stride(op, name, x);
}

}  // namespace vk
