// Division by a number that is known at the launch: a multiplication instead of the twenty instructions of a division.
#pragma once

#include <cstdint>

#include "vkernels/host_device.h"

namespace vk::device {

// For 0 <= x < 2^31 and 1 <= divisor < 2^31.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(uint32_t(d)) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }
};

VK_HD int quotient(int x, const Divisor& by) {
  const uint32_t high = uint32_t(uint64_t(uint32_t(x)) * by.magic >> 32);
  return int((high + uint32_t(x)) >> by.shift);
}
VK_HD int remainder(int x, const Divisor& by) { return x - quotient(x, by) * int(by.divisor); }

}  // namespace vk::device
