#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/cpu/short_attention.h"

namespace vk {

struct DividedAttention {
  ShortAttention groups;
  bool zero_first = false;  // token row 0 is in no group: its output and gradients are zero
};

VK_DECLARE_KERNEL(void divided_attention_forward(const DividedAttention& p))
VK_DECLARE_KERNEL(void divided_attention_backward(const DividedAttention& p))

}  // namespace vk
