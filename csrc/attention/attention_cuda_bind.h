#pragma once

#include "attention_check.h"
#include "attention_cuda.h"
#include "bind.h"

namespace vk::attention_cuda_bind {

using namespace attention;

// Rows are copied 16 bytes at a time.
inline void check_vectors(const char* name, const TensorRef& t) {
  bool whole = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) whole = whole && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  VK_CHECK(whole || t.numel() == 0, op, name, "lie at 16-byte addresses, row by row", shape_text(t));
}

inline void check_call(const TensorRef& q, const TensorRef& k, const TensorRef& v) {
  VK_CHECK(q.dtype == Dtype::bf16 || q.dtype == Dtype::f16, op, "q", "have dtype bfloat16, float16",
           static_cast<int>(q.dtype));
  VK_CHECK(q.size(3) <= 128 && q.size(3) % 8 == 0, op, "q", "have a head size of at most 128 that is a multiple of 8",
           q.size(3));
  for (const auto& [name, t] : {std::pair{"q", q}, std::pair{"k", k}, std::pair{"v", v}}) check_vectors(name, t);
}

inline void forward(TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef lse, TensorRef q_rows,
                    TensorRef k_rows, TensorRef q_count, TensorRef k_count, TensorRef ranges, TensorRef q_attr,
                    TensorRef k_attr, TensorRef q_global, TensorRef k_global, double scale, std::vector<int64_t> layout,
                    std::vector<int64_t> bounds, int device, uintptr_t stream) {
  check_inputs(q, k, v, o, lse);
  check_call(q, k, v);
  check_vectors("o", o);
  AttentionParams p{q, k, v, o, lse, scale, {}, {}, {}, {}, {}, {}};
  p.mask = make_mask(q, k, layout, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds),
                     q_global, k_global);
  attention_forward_cuda(p, {device, reinterpret_cast<void*>(stream)});
}

inline void check_room(const char* name, const TensorRef& t, Dtype dtype, int64_t elements) {
  check_rank(op, name, t, 1);
  check_dtype(op, name, t, dtype);
  check_contiguous(name, t);
  VK_CHECK(t.size(0) >= elements, op, name, "hold " + std::to_string(elements) + " elements", t.size(0));
}

inline void backward(TensorRef dout, TensorRef dlse, TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef lse,
                     TensorRef dq, TensorRef dk, TensorRef dv, TensorRef stats, TensorRef spans, TensorRef q_rows,
                     TensorRef k_rows, TensorRef q_count, TensorRef k_count, TensorRef ranges, TensorRef q_attr,
                     TensorRef k_attr, TensorRef q_global, TensorRef k_global, double scale,
                     std::vector<int64_t> layout, std::vector<int64_t> bounds, int device, uintptr_t stream) {
  check_inputs(q, k, v, o, lse);
  check_call(q, k, v);
  check_gradients(q, k, lse, dout, dlse, dq, dk, dv);
  for (const auto& [name, t] :
       {std::pair{"dout", dout}, std::pair{"o", o}, std::pair{"dq", dq}, std::pair{"dk", dk}, std::pair{"dv", dv}})
    check_vectors(name, t);
  AttentionParams p{q, k, v, o, lse, scale, {}, dout, dlse, dq, dk, dv};
  p.mask = make_mask(q, k, layout, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds),
                     q_global, k_global);
  const AttentionLayout& l = p.mask.layout;
  check_room("stats", stats, Dtype::f32, 2 * q.size(0) * q.size(2) * l.groups * ((l.len_q + 3) / 4 * 4));
  if (ranges) check_room("spans", spans, Dtype::i32, 2 * q.size(0) * ranges.size(2) * ((l.len_q + 31) / 32));
  attention_backward_cuda(p, {stats, spans}, {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) {
  m.def("attention_cuda", &forward, release_gil());
  m.def("attention_backward_cuda", &backward, release_gil());
}

}  // namespace vk::attention_cuda_bind
