#pragma once

#include "attention_check.h"
#include "bind.h"

namespace vk::attention_bind {

using namespace attention;

// Every row of the map names a token, each at most once, so that no two tasks write one row.
inline void check_rows(const char* name, const TensorRef& t) {
  if (!t) return;
  const int64_t tokens = t.size(1);
  std::vector<bool> taken;
  for (int64_t p = 0; p < t.size(0); ++p) {
    taken.assign(static_cast<size_t>(tokens), false);
    for (int64_t i = 0; i < tokens; ++i) {
      const int32_t row = t.ptr<const int32_t>()[p * tokens + i];
      VK_CHECK(row >= 0 && row < tokens && !taken[static_cast<size_t>(row)], op, name,
               "name every token row exactly once", row);
      taken[static_cast<size_t>(row)] = true;
    }
  }
}

inline void forward(TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef lse, double scale,
                    std::vector<int64_t> layout, TensorRef q_rows, TensorRef k_rows, TensorRef q_count,
                    TensorRef k_count, TensorRef ranges, TensorRef q_attr, TensorRef k_attr,
                    std::vector<int64_t> bounds, TensorRef q_global, TensorRef k_global) {
  check_inputs(q, k, v, o, lse);
  AttentionParams p{q, k, v, o, lse, scale, {}, {}, {}, {}, {}, {}};
  p.mask = make_mask(q, k, layout, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds),
                     q_global, k_global);
  check_rows("q_rows", q_rows);
  check_rows("k_rows", k_rows);
  const std::vector<AttentionTask> tasks = attention_forward_tasks(p.mask, q.size(0), k.size(2));
  VK_DISPATCH(attention_forward, p, tasks.data(), static_cast<int64_t>(tasks.size()));
}

inline void backward(TensorRef dout, TensorRef dlse, TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef lse,
                     TensorRef dq, TensorRef dk, TensorRef dv, double scale, std::vector<int64_t> layout,
                     TensorRef q_rows, TensorRef k_rows, TensorRef q_count, TensorRef k_count, TensorRef ranges,
                     TensorRef q_attr, TensorRef k_attr, std::vector<int64_t> bounds, TensorRef q_global,
                     TensorRef k_global) {
  check_inputs(q, k, v, o, lse);
  check_gradients(q, k, lse, dout, dlse, dq, dk, dv);
  AttentionParams p{q, k, v, o, lse, scale, {}, dout, dlse, dq, dk, dv};
  p.mask = make_mask(q, k, layout, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds),
                     q_global, k_global);
  check_rows("q_rows", q_rows);
  check_rows("k_rows", k_rows);
  const std::vector<AttentionTask> tasks = attention_backward_tasks(p.mask, q.size(0), k.size(2));
  VK_DISPATCH(attention_backward, p, tasks.data(), static_cast<int64_t>(tasks.size()));
}

inline void bind(py::module_& m) {
  m.def("attention_forward", &forward, release_gil());
  m.def("attention_backward", &backward, release_gil());
}

}  // namespace vk::attention_bind
