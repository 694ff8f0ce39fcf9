// Barriers of a block and of a warp.
#pragma once

#include "vkernels/device/kernel.h"

namespace vk::device {

// Every thread of the block, none of which may have left.
VK_DEVICE void sync_block(Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulated::meet_block(0, 0, true, site);
#endif
}

// Barrier 1..15: opens when `threads` (a multiple of 32) have come by sync_barrier or arrive_at_barrier.
VK_DEVICE void sync_barrier(int index, int threads, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
#else
  emulated::meet_block(index, threads, true, site);
#endif
}

VK_DEVICE void arrive_at_barrier(int index, int threads, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(threads) : "memory");
#else
  emulated::meet_block(index, threads, false, site);
#endif
}

VK_DEVICE void sync_warp(uint32_t mask = kWholeWarp, Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncwarp(mask);
#else
  emulated::meet_warp("sync_warp", false, site, mask, nullptr, [](void* const(&)[32]) {});
#endif
}

}  // namespace vk::device
