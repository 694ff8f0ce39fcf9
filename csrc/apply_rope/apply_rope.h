#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/rope.h"

namespace vk {

struct ApplyRopeParams {
  TensorRef x[2];    // q: b s n d; k: b s m d, or absent
  TensorRef out[2];  // like x; may be x itself
  RopeArgs rope;
};

VK_DECLARE_KERNEL(void apply_rope(const ApplyRopeParams& p))

}  // namespace vk
