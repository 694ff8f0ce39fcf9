#pragma once

#include <memory>

#include "bind.h"
#include "divided_attention_check.h"

namespace vk::divided_attention_bind {

inline std::unique_ptr<float[]> parts(const ShortAttention& p, int64_t heads) {
  const int64_t count = p.q_rows.shared ? p.q.size(0) * p.groups() * heads * p.q.size(3) : 0;
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]);
}

inline void forward(TensorRef q, TensorRef k, TensorRef v, TensorRef o, float scale, std::vector<int64_t> layout) {
  constexpr const char* op = "divided_attention";
  DividedAttention p = lay_out(op, q, k, v, scale, layout);
  check_like(op, "o", o, q);
  if (q.numel() == 0) return;
  p.groups.o = o;
  const auto shared = parts(p.groups, q.size(2));
  p.groups.shared_q = shared.get();
  VK_DISPATCH(divided_attention_forward, p);
}

inline void backward(TensorRef grad_o, TensorRef q, TensorRef k, TensorRef v, TensorRef dq, TensorRef dk, TensorRef dv,
                     float scale, std::vector<int64_t> layout) {
  constexpr const char* op = "divided_attention";
  DividedAttention p = lay_out(op, q, k, v, scale, layout);
  check_like(op, "grad_o", grad_o, q);
  check_like(op, "dq", dq, q);
  check_like(op, "dk", dk, k);
  check_like(op, "dv", dv, v);
  if (q.numel() == 0) return;
  p.groups.grad_o = grad_o, p.groups.dq = dq, p.groups.dk = dk, p.groups.dv = dv;
  const auto shared_q = parts(p.groups, q.size(2)), shared_k = parts(p.groups, k.size(2)),
             shared_v = parts(p.groups, k.size(2));
  p.groups.shared_q = shared_q.get(), p.groups.shared_k = shared_k.get(), p.groups.shared_v = shared_v.get();
  VK_DISPATCH(divided_attention_backward, p);
}

inline void bind(py::module_& m) {
  m.def("divided_attention_fwd", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("scale"),
        py::arg("layout"), release_gil());
  m.def("divided_attention_bwd", &backward, py::arg("grad_o"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("dq"),
        py::arg("dk"), py::arg("dv"), py::arg("scale"), py::arg("layout"), release_gil());
}

}  // namespace vk::divided_attention_bind
