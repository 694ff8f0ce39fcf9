// vkernels_emulated: the CUDA kernels of every op, run by the emulator on CPU tensors, and the twins for their tests.
#include "cuda/bindings.h"
#include "fibres.h"

namespace vk {
void bind_twins(py::module_& m);
void bind_faults(py::module_& m);
void bind_rooms(py::module_& m);
}  // namespace vk

PYBIND11_MODULE(vkernels_emulated, m) {
  m.def("allow", [](const std::vector<vk::TensorRef>& tensors) { vk::emulated::allow(tensors); });
  m.def("set_order", [](int order) { vk::emulated::set_order(static_cast<vk::emulated::Order>(order)); });
  m.def("switches", &vk::emulated::switches);
  vk::bind_cuda(m);
  vk::bind_twins(m);
  vk::bind_faults(m);
  vk::bind_rooms(m);
}
