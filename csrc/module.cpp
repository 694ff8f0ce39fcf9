// vkernels._C: build facts, threads, and one bind_<op> per folder. No torch: tensors arrive as TensorRef.
#include "bind.h"
#include "cpu/scratch.h"
#include "cuda/launches.h"
#include "cuda/missing.h"
#include "vkernels/cpu/isa.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/tiles.h"

namespace vk {
#define VK_OP(name) void bind_##name(py::module_& m);
#include "ops.inc"
#undef VK_OP
#if !defined(VK_CUDA_ABSENT)
#define VK_OP(name) void bind_##name##_cuda(py::module_& m);
#include "ops_cuda.inc"
#undef VK_OP
#endif
}  // namespace vk

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vkernels. Use the functions of the vkernels package; these check less.";

  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("isa_names", &vk::isa_names);
  m.def("isa_usable", &vk::isa_usable);
  m.def("isa_active", [] { return vk::isa_name(vk::active_isa()); });
  m.def("isa_force", &vk::force_isa);
  m.def("set_torch_threads", [](uintptr_t parallel_for, uintptr_t get_num_threads) {
    vk::set_torch_threads(reinterpret_cast<void*>(parallel_for), reinterpret_cast<void*>(get_num_threads));
  });
  m.def("cuda_missing", &vk::cuda_missing);
  m.def("num_threads", &vk::num_threads);
  m.def("scratch_bytes", &vk::scratch_bytes);
  m.def("tile_sizes", [](const std::string& op) {
    py::dict sizes;
    const vk::TileSizes all = VK_DISPATCH(tile_sizes);
    for (int64_t i = 0; i < all.count; ++i)
      if (op == all.first[i].op) sizes[all.first[i].what] = all.first[i].size;
    return sizes;
  });
  m.def("advise_huge_pages",
        [](uintptr_t address, size_t bytes) { vk::advise_huge_pages(reinterpret_cast<void*>(address), bytes); });

#define VK_OP(name) vk::bind_##name(m);
#include "ops.inc"
#undef VK_OP
#if !defined(VK_CUDA_ABSENT)
  vk::bind_launches(m);
#define VK_OP(name) vk::bind_##name##_cuda(m);
#include "ops_cuda.inc"
#undef VK_OP
#endif
}
