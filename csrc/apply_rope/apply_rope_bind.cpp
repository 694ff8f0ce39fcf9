#include "apply_rope.h"
#include "bind.h"

namespace vk {

static void apply_rope_cpu(TensorRef x, TensorRef cos, TensorRef sin, TensorRef out) {
  constexpr const char* op = "apply_rope";
  check_rank(op, "x", x, 4);
  check_rank(op, "out", out, 4);
  check_unit_stride(op, "x", x);
  check_unit_stride(op, "out", out);
  for (const auto& [name, table] : {std::pair{"cos", cos}, std::pair{"sin", sin}}) {
    check_rank(op, name, table, 3);
    check_dtype(op, name, table, Dtype::f32);
    check_size(op, name, table, 1, x.size(1));
    VK_CHECK(table.size(2) * 2 == x.size(3), op, name, "have one angle per pair", shape_text(table));
  }
  for (int i = 0; i < 4; ++i) check_size(op, "out", out, i, x.size(i));
  VK_DISPATCH(apply_rope, {x, cos, sin, out});
}

void bind_apply_rope(py::module_& m) {
  m.def("apply_rope", &apply_rope_cpu, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"), release_gil());
}

}  // namespace vk
