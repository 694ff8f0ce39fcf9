#pragma once

#include "qkv_prologue_check.h"
#include "qkv_prologue_cuda.h"

namespace vk::qkv_prologue_cuda_bind {

constexpr const char* kOp = "qkv_prologue";

inline void check_for_gpu(const QkvPrologueParams& p) {
  VK_CHECK(p.out[0].size(3) <= kLongestHead, kOp, "layout", "have heads of at most 256 elements", p.out[0].size(3));
  VK_CHECK(p.rope.heads() <= kMostAxisRows, kOp, "axis", "have at most 64 rows", p.rope.heads());
}

inline void forward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef q, TensorRef k,
                    TensorRef v, TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps,
                    std::vector<int64_t> layout, int device, uintptr_t stream) {
  const QkvPrologueParams p =
      checked_qkv_prologue(qkv, bias, q_norm, k_norm, q, k, v, pos, axis, freq, scale, eps, layout);
  check_for_gpu(p);
  qkv_prologue_cuda(p, {device, reinterpret_cast<void*>(stream)});
}

inline void backward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef dq, TensorRef dk,
                     TensorRef dv, TensorRef pos, TensorRef axis, TensorRef freq, TensorRef dqkv, TensorRef stats,
                     TensorRef partials, double scale, double eps, std::vector<int64_t> layout, int device,
                     uintptr_t stream) {
  QkvPrologueCudaBackward p;
  p.forward = checked_qkv_prologue(qkv, bias, q_norm, k_norm, dq, dk, dv, pos, axis, freq, scale, eps, layout);
  check_for_gpu(p.forward);
  p.dqkv = dqkv, p.stats = stats, p.partials = partials;
  check_rank(kOp, "dqkv", dqkv, 3);
  check_dtype(kOp, "dqkv", dqkv, qkv.dtype);
  check_unit_stride(kOp, "dqkv", dqkv);
  for (int i = 0; i < 3; ++i) check_size(kOp, "dqkv", dqkv, i, qkv.size(i));
  const int64_t n = layout[0], m = layout[1], d = layout[2];
  const int64_t columns = (bias.given ? (n + 2 * m) * d : 0) + (q_norm.given ? n * d : 0) + (k_norm.given ? m * d : 0);
  check_rank(kOp, "partials", partials, 2);
  check_size(kOp, "partials", partials, 1, columns);
  if (p.forward.all_heads && (q_norm.given || k_norm.given)) {
    check_rank(kOp, "stats", stats, 2);
    check_size(kOp, "stats", stats, 0, qkv.size(0) * qkv.size(1));
    check_size(kOp, "stats", stats, 1, 4);
  }
  for (const auto& [name, x] : {std::pair{"partials", partials}, std::pair{"stats", stats}}) {
    if (!x.given || x.numel() == 0) continue;
    check_dtype(kOp, name, x, Dtype::f32);
    VK_CHECK(x.stride(1) == 1 && x.stride(0) == x.size(1), kOp, name, "be contiguous", shape_text(x));
  }
  qkv_prologue_bwd_cuda(p, {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) {
  m.def("qkv_prologue_cuda", &forward, release_gil());
  m.def("qkv_prologue_bwd_cuda", &backward, release_gil());
}

}  // namespace vk::qkv_prologue_cuda_bind
