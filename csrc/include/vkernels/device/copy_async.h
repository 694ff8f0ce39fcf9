// Copies from global to shared memory that pass by the registers (cp.async). The thread that waited sees its own
// copies; the others need a barrier after it.
#pragma once

#include "vkernels/device/memory.h"

namespace vk::device {

// 16 bytes; zeros from byte `valid` on. With valid = 0 nothing is read, but `from` must still be a pointer into a
// tensor of the call.
VK_DEVICE void copy_async16(void* shared, const void* from, int valid = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(valid)
               : "memory");
#else
  emulated::copy_async(shared, from, 16, static_cast<size_t>(valid));
#endif
}

// What was started since the last commit becomes one group.
VK_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulated::commit_copies();
#endif
}

// Waits until at most `kGroupsLeft` of the newest groups are still in flight.
template <int kGroupsLeft>
VK_DEVICE void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  emulated::wait_for_copies(kGroupsLeft);
#endif
}

}  // namespace vk::device
