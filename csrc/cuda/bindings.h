// The CUDA side of vkernels._C.
#pragma once

#include "bind.h"

namespace vk {
void bind_cuda(py::module_& m);
}
