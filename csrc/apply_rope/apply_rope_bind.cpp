#include "apply_rope.h"
#include "rope_check.h"

namespace vk {

static void apply_rope_cpu(TensorRef q, TensorRef k, TensorRef q_out, TensorRef k_out, TensorRef pos, TensorRef axis,
                           TensorRef freq, TensorRef cos, TensorRef sin, double scale, bool inverse, int64_t blocks,
                           int64_t offset) {
  constexpr const char* op = "apply_rope";
  const RopeArgs rope{pos, axis, freq, cos, sin, scale, inverse, blocks, offset};
  const TensorRef in[2] = {q, k}, out[2] = {q_out, k_out};
  const char* names[2][2] = {{"q", "q_out"}, {"k", "k_out"}};
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && !k.given) continue;
    check_rank(op, names[i][0], in[i], 4);
    check_rank(op, names[i][1], out[i], 4);
    check_unit_stride(op, names[i][0], in[i]);
    check_unit_stride(op, names[i][1], out[i]);
    VK_CHECK(in[i].dtype <= Dtype::f16, op, names[i][0], "be float32, bfloat16 or float16",
             static_cast<int>(in[i].dtype));
    check_dtype(op, names[i][0], in[i], q.dtype);
    check_dtype(op, names[i][1], out[i], q.dtype);
    for (int dim = 0; dim < 4; ++dim) check_size(op, names[i][1], out[i], dim, in[i].size(dim));
    for (int dim : {0, 1, 3}) check_size(op, names[i][0], in[i], dim, q.size(dim));
  }
  check_rope(op, rope, q.size(0), q.size(1), q.size(3));
  for (const auto& [name, x] : {std::pair{"q", q}, std::pair{"k", k}})
    VK_CHECK(!x.given || x.size(2) % rope.heads() == 0, op, name, "have a multiple of the heads of axis",
             shape_text(x));
  VK_DISPATCH(apply_rope, ApplyRopeParams{{q, k}, {q_out, k_out}, rope});
}

void bind_apply_rope(py::module_& m) { m.def("apply_rope", &apply_rope_cpu, release_gil()); }

}  // namespace vk
