// vkernels._C.cuda_launches(call): what the CUDA kernels that `call` uses would be launched with. Nothing runs, so
// neither a GPU nor a driver is needed.
#pragma once

#include "bind.h"
#include "vkernels/device/noted.h"

namespace vk {

inline void bind_launches(py::module_& m) {
  m.def("cuda_launches", [](const py::function& call) {
    std::vector<device::NotedLaunch> noted;
    struct Noting {
      explicit Noting(std::vector<device::NotedLaunch>* to) { device::noted_launches = to; }
      ~Noting() { device::noted_launches = nullptr; }
    };
    {
      const Noting noting(&noted);
      call();
    }
    py::list launches;
    for (const device::NotedLaunch& x : noted)
      launches.append(py::make_tuple(x.name, x.blocks_x, x.blocks_y, x.threads, x.shared_bytes));
    return launches;
  });
}

}  // namespace vk
