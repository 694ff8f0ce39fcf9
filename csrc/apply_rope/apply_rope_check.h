// What apply_rope refuses whatever the backend; no value of a tensor is looked at.
#pragma once

#include "apply_rope.h"
#include "rope_check.h"

namespace vk {

inline void check_apply_rope(const ApplyRopeParams& p) {
  constexpr const char* op = "apply_rope";
  const TensorRef& q = p.x[0];
  const char* names[2][2] = {{"q", "q_out"}, {"k", "k_out"}};
  for (int i = 0; i < 2; ++i) {
    const TensorRef &x = p.x[i], &out = p.out[i];
    if (i == 1 && !x.given) continue;
    check_rank(op, names[i][0], x, 4);
    check_rank(op, names[i][1], out, 4);
    check_unit_stride(op, names[i][0], x);
    check_unit_stride(op, names[i][1], out);
    VK_CHECK(x.dtype <= Dtype::f16, op, names[i][0], "be float32, bfloat16 or float16", static_cast<int>(x.dtype));
    check_dtype(op, names[i][0], x, q.dtype);
    check_dtype(op, names[i][1], out, q.dtype);
    for (int dim = 0; dim < 4; ++dim) check_size(op, names[i][1], out, dim, x.size(dim));
    for (int dim : {0, 1, 3}) check_size(op, names[i][0], x, dim, q.size(dim));
  }
  check_rope_shapes(op, p.rope, q.size(0), q.size(1), q.size(3));
  for (const auto& [name, x] : {std::pair{"q", q}, std::pair{"k", p.x[1]}})
    VK_CHECK(!x.given || x.size(2) % p.rope.heads() == 0, op, name, "have a multiple of the heads of axis",
             shape_text(x));
}

}  // namespace vk
