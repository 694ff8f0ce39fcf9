#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/tensor.h"

namespace vk {

struct ApplyRopeParams {
  TensorRef x;    // b s n d
  TensorRef cos;  // b|1 s r, float
  TensorRef sin;
  TensorRef out;  // like x
};

VK_DECLARE_KERNEL(void apply_rope(const ApplyRopeParams& p))

}  // namespace vk
