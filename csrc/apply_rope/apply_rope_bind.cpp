#include "apply_rope_check.h"

namespace vk {

static void apply_rope_cpu(TensorRef q, TensorRef k, TensorRef q_out, TensorRef k_out, TensorRef pos, TensorRef axis,
                           TensorRef freq, TensorRef cos, TensorRef sin, double scale, bool inverse, int64_t blocks,
                           int64_t offset) {
  const ApplyRopeParams p{{q, k}, {q_out, k_out}, {pos, axis, freq, cos, sin, scale, inverse, blocks, offset}};
  check_apply_rope(p);
  check_rope("apply_rope", p.rope, q.size(0), q.size(1), q.size(3));
  VK_DISPATCH(apply_rope, p);
}

void bind_apply_rope(py::module_& m) { m.def("apply_rope", &apply_rope_cpu, release_gil()); }

}  // namespace vk
