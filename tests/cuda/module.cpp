// vkernels_emulated: the CUDA kernels of every op, run by the emulator on CPU tensors, and the twins for their tests.
#include "bind.h"
#include "cuda/launches.h"
#include "fibres.h"

namespace vk {
#define VK_OP(name) void bind_##name##_cuda(py::module_& m);
#include "ops_cuda.inc"
#undef VK_OP
void bind_twins(py::module_& m);
void bind_faults(py::module_& m);
void bind_rooms(py::module_& m);
}  // namespace vk

PYBIND11_MODULE(vkernels_emulated, m) {
  m.def("allow", [](const std::vector<vk::TensorRef>& tensors) { vk::emulated::allow(tensors); });
  m.def("set_order", [](int order) { vk::emulated::set_order(static_cast<vk::emulated::Order>(order)); });
  m.def("switches", &vk::emulated::switches);
  vk::bind_launches(m);
  vk::bind_twins(m);
  vk::bind_faults(m);
  vk::bind_rooms(m);
#define VK_OP(name) vk::bind_##name##_cuda(m);
#include "ops_cuda.inc"
#undef VK_OP
}
