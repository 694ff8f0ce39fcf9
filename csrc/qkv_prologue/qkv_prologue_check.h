// What qkv_prologue refuses whatever the backend; no value of a tensor is looked at.
#pragma once

#include <vector>

#include "qkv_prologue.h"
#include "rope_check.h"

namespace vk {

// layout: n, m, d, blocks, offset, post, all_heads
inline QkvPrologueParams checked_qkv_prologue(const TensorRef& qkv, const TensorRef& bias, const TensorRef& q_norm,
                                              const TensorRef& k_norm, const TensorRef& q, const TensorRef& k,
                                              const TensorRef& v, const TensorRef& pos, const TensorRef& axis,
                                              const TensorRef& freq, double scale, double eps,
                                              const std::vector<int64_t>& layout) {
  constexpr const char* op = "qkv_prologue";
  constexpr int64_t most = int64_t{1} << 20;
  VK_CHECK(layout.size() == 7, op, "layout", "have 7 numbers", layout.size());
  const int64_t n = layout[0], m = layout[1], d = layout[2];
  for (const int64_t size : {n, m, d})
    VK_CHECK(size >= 1 && size <= most, op, "layout", "hold sizes of 1 to 2^20", size);
  QkvPrologueParams p{qkv, bias, {q_norm, k_norm}, {q, k, v}, {}, eps, layout[5] != 0, layout[6] != 0};
  check_rank(op, "qkv", qkv, 3);
  check_size(op, "qkv", qkv, 2, (n + 2 * m) * d);
  check_unit_stride(op, "qkv", qkv);
  VK_CHECK(qkv.dtype <= Dtype::f16, op, "qkv", "be float32, bfloat16 or float16", static_cast<int>(qkv.dtype));
  const char* names[3] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    const TensorRef& x = p.out[i];
    check_rank(op, names[i], x, 4);
    check_dtype(op, names[i], x, qkv.dtype);
    check_unit_stride(op, names[i], x);
    check_size(op, names[i], x, 0, qkv.size(0));
    check_size(op, names[i], x, 1, qkv.size(1));
    check_size(op, names[i], x, 2, i == 0 ? n : m);
    check_size(op, names[i], x, 3, d);
  }
  const int64_t columns[3] = {(n + 2 * m) * d, p.all_heads ? n * d : d, p.all_heads ? m * d : d};
  const TensorRef given[3] = {bias, q_norm, k_norm};
  const char* arguments[3] = {"bias", "q_norm", "k_norm"};
  for (int i = 0; i < 3; ++i) {
    if (!given[i].given) continue;
    check_rank(op, arguments[i], given[i], 1);
    check_dtype(op, arguments[i], given[i], Dtype::f32);
    check_unit_stride(op, arguments[i], given[i]);
    check_size(op, arguments[i], given[i], 0, columns[i]);
  }
  if (pos.given) {
    p.rope = {pos, axis, freq, {}, {}, scale, false, layout[3], layout[4]};
    check_rope_shapes(op, p.rope, qkv.size(0), qkv.size(1), d);
    VK_CHECK(n % p.rope.heads() == 0 && m % p.rope.heads() == 0, op, "axis", "have a divisor of n and m heads",
             p.rope.heads());
  }
  return p;
}

}  // namespace vk
