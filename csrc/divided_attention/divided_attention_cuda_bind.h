#pragma once

#include "divided_attention_check.h"
#include "divided_attention_cuda.h"

namespace vk::divided_attention_cuda_bind {

constexpr const char* kOp = "divided_attention";

// Rows are read and written 16 bytes at a time.
inline void check_vectors(const char* name, const TensorRef& x) {
  bool whole = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) whole = whole && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  VK_CHECK(whole || x.numel() == 0, kOp, name, "lie at a multiple of 16 bytes, as all its strides do",
           reinterpret_cast<uintptr_t>(x.data) % 16);
  for (int dim = 1; dim < 3; ++dim)
    VK_CHECK(x.size(dim) == 1 || x.stride(dim) <= INT32_MAX / 2, kOp, name, "have strides below 2^30", x.stride(dim));
}

inline void check_for_gpu(const DividedAttention& p) {
  const ShortAttention& a = p.groups;
  VK_CHECK(a.q.dtype != Dtype::f32, kOp, "q", "have dtype bfloat16 or float16", "float32");
  VK_CHECK(a.q.size(3) % 8 == 0 && a.q.size(3) >= 8 && a.q.size(3) <= 128, kOp, "q",
           "have a head size that is a multiple of 8 up to 128", a.q.size(3));
  VK_CHECK(a.scale > 0, kOp, "scale", "be positive", a.scale);
  const int64_t rows = a.q.size(0) * a.q.size(2) * (a.q.size(1) + a.groups() + 1);
  VK_CHECK(rows < int64_t(1) << 30, kOp, "q", "have fewer than 2^30 rows", rows);
  for (const auto& [name, x] : {std::pair{"q", a.q}, std::pair{"k", a.k}, std::pair{"v", a.v}}) check_vectors(name, x);
}

inline void check_turn(const DividedAttention& p, const Turn& turn, int64_t t, bool spatial) {
  const TensorRef &x = turn.angles, &q = p.groups.q;
  if (!x.given) return;
  const int64_t d = q.size(3);
  VK_CHECK(!spatial && p.groups.len_q <= kTurnedLength, kOp, "angles",
           "be given in time only, for at most 128 frames that attend together", shape_text(q));
  check_rank(kOp, "angles", x, 3);
  check_dtype(kOp, "angles", x, Dtype::f32);
  VK_CHECK(x.size(0) == 1 || x.size(0) == q.size(0), kOp, "angles", "have b or 1 samples", shape_text(x));
  check_size(kOp, "angles", x, 1, t);
  check_size(kOp, "angles", x, 2, d);
  const bool rows = x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == d) &&
                    (x.size(0) == 1 || x.stride(0) == t * d) && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  VK_CHECK(rows, kOp, "angles", "be contiguous at a multiple of 16 bytes", shape_text(x));
}

// Float memory of `count` elements, where the kernels of this call use some.
inline float* scratch(const char* name, const TensorRef& x, bool used, int64_t count) {
  if (!used) return nullptr;
  const bool whole = x.given && x.dtype == Dtype::f32 && x.numel() >= count;
  VK_CHECK(whole && reinterpret_cast<uintptr_t>(x.data) % 16 == 0, kOp, name,
           "be aligned float32 of " + std::to_string(count) + " elements", x.given ? shape_text(x) : "nothing");
  return x.ptr<float>();
}

inline void forward(TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef part, TensorRef angles, float scale,
                    std::vector<int64_t> layout, bool neighbours, int device, uintptr_t stream) {
  DividedAttention p = lay_out(kOp, q, k, v, scale, layout);
  check_like(kOp, "o", o, q);
  if (q.numel() == 0) return;
  check_for_gpu(p);
  check_vectors("o", o);
  const Turn turn{angles, neighbours};
  check_turn(p, turn, layout[0], layout[3] != 0);
  p.groups.o = o;
  const bool shared = p.groups.q_rows.shared != 0;
  p.groups.shared_q = scratch("part", part, shared, q.size(0) * q.size(2) * p.groups.outer * q.size(3));
  divided_attention_forward_cuda(p, turn, {device, reinterpret_cast<void*>(stream)});
}

inline void backward(TensorRef grad_o, TensorRef q, TensorRef k, TensorRef v, TensorRef dq, TensorRef dk, TensorRef dv,
                     TensorRef stats, TensorRef part_q, TensorRef part_k, TensorRef part_v, TensorRef angles,
                     float scale, std::vector<int64_t> layout, bool neighbours, int device, uintptr_t stream) {
  DividedAttention p = lay_out(kOp, q, k, v, scale, layout);
  check_like(kOp, "grad_o", grad_o, q);
  check_like(kOp, "dq", dq, q);
  check_like(kOp, "dk", dk, k);
  check_like(kOp, "dv", dv, v);
  if (q.numel() == 0) return;
  check_for_gpu(p);
  check_vectors("grad_o", grad_o);
  check_vectors("dq", dq);
  check_vectors("dk", dk);
  check_vectors("dv", dv);
  const Turn turn{angles, neighbours};
  check_turn(p, turn, layout[0], layout[3] != 0);
  p.groups.grad_o = grad_o, p.groups.dq = dq, p.groups.dk = dk, p.groups.dv = dv;
  const ShortAttention& a = p.groups;
  const bool shared = a.q_rows.shared != 0;
  const int64_t row = q.size(0) * a.outer * q.size(3);
  p.groups.shared_q = scratch("part_q", part_q, shared, row * q.size(2));
  p.groups.shared_k = scratch("part_k", part_k, shared, row * k.size(2));
  p.groups.shared_v = scratch("part_v", part_v, shared, row * k.size(2));
  float* rows = scratch("stats", stats, !is_packed(a, turn), 2 * q.size(0) * a.groups() * q.size(2) * a.len_q);
  divided_attention_backward_cuda(p, turn, rows, {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) {
  m.def("divided_attention_fwd_cuda", &forward, release_gil());
  m.def("divided_attention_bwd_cuda", &backward, release_gil());
}

}  // namespace vk::divided_attention_cuda_bind
