#pragma once

#include "apply_rope_check.h"
#include "apply_rope_cuda.h"

namespace vk::apply_rope_cuda_bind {

inline void apply_rope_on_gpu(TensorRef q, TensorRef k, TensorRef q_out, TensorRef k_out, TensorRef pos, TensorRef axis,
                              TensorRef freq, TensorRef cos, TensorRef sin, double scale, bool inverse, int64_t blocks,
                              int64_t offset, int device, uintptr_t stream) {
  const ApplyRopeParams p{{q, k}, {q_out, k_out}, {pos, axis, freq, cos, sin, scale, inverse, blocks, offset}};
  check_apply_rope(p);
  VK_CHECK(!p.rope.apart(), "apply_rope", "cos", "have one angle a pair", shape_text(cos));
  for (const TensorRef& x : p.x)
    VK_CHECK(!x.given || (x.size(2) < INT32_MAX && x.size(3) < INT32_MAX), "apply_rope", "q",
             "have fewer than 2^31 heads and elements a head", shape_text(x));
  apply_rope_cuda(p, {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) { m.def("apply_rope_cuda", &apply_rope_on_gpu, release_gil()); }

}  // namespace vk::apply_rope_cuda_bind
