// vkernels._C: build facts, threads, and one bind per op. No torch: tensors arrive as TensorRef.
// pybind11 costs a compiler as much as all of an op's bindings do, so theirs are headers of two objects: this one and
// cuda/bindings.cpp.
#include "apply_rope/apply_rope_bind.h"
#include "attention/attention_bind.h"
#include "bind.h"
#include "cpu/scratch.h"
#include "cuda/bindings.h"
#include "cuda/missing.h"
#include "decode_attention/decode_attention_bind.h"
#include "divided_attention/divided_attention_bind.h"
#include "kv_append/kv_append_bind.h"
#include "qkv_prologue/qkv_prologue_bind.h"
#include "rearrange/rearrange_bind.h"
#include "vkernels/cpu/isa.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/tiles.h"

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

  vk::apply_rope_bind::bind(m);
  vk::attention_bind::bind(m);
  vk::decode_attention_bind::bind(m);
  vk::divided_attention_bind::bind(m);
  vk::kv_append_bind::bind(m);
  vk::qkv_prologue_bind::bind(m);
  vk::rearrange_bind::bind(m);
#if !defined(VK_CUDA_ABSENT)
  vk::bind_cuda(m);
#endif
}
