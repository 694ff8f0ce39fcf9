#pragma once

#include "qkv_prologue_check.h"

namespace vk::qkv_prologue_bind {

constexpr const char* kOp = "qkv_prologue";

inline QkvPrologueParams checked(const TensorRef& qkv, const TensorRef& bias, const TensorRef& q_norm,
                                 const TensorRef& k_norm, const TensorRef& q, const TensorRef& k, const TensorRef& v,
                                 const TensorRef& pos, const TensorRef& axis, const TensorRef& freq, double scale,
                                 double eps, const std::vector<int64_t>& layout) {
  const QkvPrologueParams p =
      checked_qkv_prologue(qkv, bias, q_norm, k_norm, q, k, v, pos, axis, freq, scale, eps, layout);
  if (pos.given) check_rope(kOp, p.rope, qkv.size(0), qkv.size(1), layout[2]);
  return p;
}

inline void forward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef q, TensorRef k,
                    TensorRef v, TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps,
                    std::vector<int64_t> layout) {
  const QkvPrologueParams p = checked(qkv, bias, q_norm, k_norm, q, k, v, pos, axis, freq, scale, eps, layout);
  VK_DISPATCH(qkv_prologue, p);
}

inline void backward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef dq, TensorRef dk,
                     TensorRef dv, TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps,
                     std::vector<int64_t> layout, TensorRef dqkv, TensorRef partials, TensorRef sums) {
  QkvPrologueBackwardParams p;
  p.forward = checked(qkv, bias, q_norm, k_norm, dq, dk, dv, pos, axis, freq, scale, eps, layout);
  p.dqkv = dqkv;
  p.partials = partials;
  p.sums = sums;
  check_rank(kOp, "dqkv", dqkv, 3);
  check_dtype(kOp, "dqkv", dqkv, qkv.dtype);
  check_unit_stride(kOp, "dqkv", dqkv);
  for (int i = 0; i < 3; ++i) check_size(kOp, "dqkv", dqkv, i, qkv.size(i));
  int64_t columns = 0;
  for (const TensorRef& x : {bias, q_norm, k_norm}) columns += x.given ? x.size(0) : 0;
  check_rank(kOp, "partials", partials, 2);
  check_rank(kOp, "sums", sums, 1);
  check_size(kOp, "partials", partials, 0, kPartials);
  check_size(kOp, "partials", partials, 1, columns);
  check_size(kOp, "sums", sums, 0, columns);
  for (const TensorRef& x : {partials, sums}) {
    check_dtype(kOp, "partials", x, Dtype::f32);
    check_unit_stride(kOp, "partials", x);
  }
  VK_DISPATCH(qkv_prologue_bwd, p);
}

inline void bind(py::module_& m) {
  m.def("qkv_prologue", &forward, release_gil());
  m.def("qkv_prologue_bwd", &backward, release_gil());
  m.attr("QKV_PROLOGUE_PARTIALS") = kPartials;
}

}  // namespace vk::qkv_prologue_bind
