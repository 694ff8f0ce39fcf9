#pragma once

#include "apply_rope_check.h"

namespace vk::apply_rope_bind {

inline void apply_rope_cpu(TensorRef q, TensorRef k, TensorRef q_out, TensorRef k_out, TensorRef pos, TensorRef axis,
                           TensorRef freq, TensorRef cos, TensorRef sin, double scale, bool inverse, int64_t blocks,
                           int64_t offset) {
  const ApplyRopeParams p{{q, k}, {q_out, k_out}, {pos, axis, freq, cos, sin, scale, inverse, blocks, offset}};
  check_apply_rope(p);
  check_rope("apply_rope", p.rope, q.size(0), q.size(1), q.size(3));
  VK_DISPATCH(apply_rope, p);
}

inline void bind(py::module_& m) { m.def("apply_rope", &apply_rope_cpu, release_gil()); }

}  // namespace vk::apply_rope_bind
