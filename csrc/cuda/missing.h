#pragma once

#include <optional>
#include <string>

namespace vk {

// Why the CUDA kernels cannot run here, in a sentence; nothing where they can.
#if defined(VK_CUDA_ABSENT)  // what setup.py says when it builds without them
inline std::optional<std::string> cuda_missing() { return VK_CUDA_ABSENT; }
#else
std::optional<std::string> cuda_missing();
#endif

}  // namespace vk
