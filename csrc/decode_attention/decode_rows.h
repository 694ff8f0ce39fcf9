// What decode_attention_cpu.cpp takes at a time. Include only from *_cpu.cpp files.
#pragma once

#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA::decode {

inline constexpr int kRows = kLanes == 16 ? 4 : 2;  // query rows of one pass
inline constexpr int64_t kRun = 128;                // most tokens of one step, and the largest group

}  // namespace vk::VK_ISA::decode
