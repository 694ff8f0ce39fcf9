#pragma once

#include "attention.h"
#include "vkernels/device/stream.h"

namespace vk {

void attention_forward_cuda(const AttentionParams& p, const device::Stream& stream);

}  // namespace vk
