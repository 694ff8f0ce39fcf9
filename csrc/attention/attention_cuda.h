#pragma once

#include "attention.h"
#include "vkernels/device/stream.h"

namespace vk {

// Memory of a backward pass that nobody looks at afterwards.
struct AttentionWorkspace {
  TensorRef stats;  // float, 2 b n groups (len_q rounded up to 4)
  TensorRef spans;  // int32, 4 b R ceil(len_q / 32), where there are ranges
};

void attention_forward_cuda(const AttentionParams& p, const device::Stream& stream);
void attention_backward_cuda(const AttentionParams& p, const AttentionWorkspace& room, const device::Stream& stream);

}  // namespace vk
