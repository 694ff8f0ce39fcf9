#pragma once

#include "divided_attention.h"
#include "vkernels/device/stream.h"

namespace vk {

void divided_attention_forward_cuda(const DividedAttention& p, const device::Stream& stream);
void divided_attention_backward_cuda(const DividedAttention& p, const device::Stream& stream);

}  // namespace vk
