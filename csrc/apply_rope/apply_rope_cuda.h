#pragma once

#include "apply_rope.h"
#include "vkernels/device/stream.h"

namespace vk {

void apply_rope_cuda(const ApplyRopeParams& p, const device::Stream& stream);

}  // namespace vk
