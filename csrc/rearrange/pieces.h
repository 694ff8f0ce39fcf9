// What the CPU kernels of rearrange take at a time.
#pragma once

#include <cstdint>

namespace vk {

inline constexpr int64_t kGrainBytes = 64 << 10;  // of a task
template <int kBytes>
inline constexpr int64_t kTurnedSide = kBytes >= 4 ? 32 : 64;  // elements of a tile whose columns become rows

}  // namespace vk
