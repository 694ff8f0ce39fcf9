// What every kernel source includes first. Compiled by nvcc, a function of this folder is one instruction; compiled by
// g++ (tests only) it is its plain C++ twin, and the threads of a block are fibres (docs/cuda-on-cpu.md).
#pragma once

#include <cstdint>
#include <cstring>

#include "vkernels/half.h"

#if defined(__CUDACC__)
// Threads of a block at most, and how many blocks a multiprocessor must be able to hold.
#define VK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define VK_DEVICE __device__ static __forceinline__
#define VK_MEMBER __device__ __forceinline__  // a function of an object
#else
#include "vkernels/device/emulated.h"
#define VK_KERNEL(...) void
#define VK_DEVICE [[maybe_unused]] static inline
#define VK_MEMBER inline
#endif

namespace vk::device {

// Where a collective was called, so that the twins notice threads that meet at different places.
#if defined(__CUDACC__)
struct Site {
  __device__ static constexpr Site here() { return {}; }
};
#else
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#endif

inline constexpr int kWarp = 32;
inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// Blocks are one-dimensional here; grids use x for what can be large (2^31 - 1) and y for what cannot (65,535).
VK_DEVICE int thread_index() {
#if defined(__CUDACC__)
  return static_cast<int>(threadIdx.x);
#else
  return emulated::self().thread;
#endif
}

VK_DEVICE int thread_count() {
#if defined(__CUDACC__)
  return static_cast<int>(blockDim.x);
#else
  return emulated::self().threads;
#endif
}

VK_DEVICE int64_t block_x() {
#if defined(__CUDACC__)
  return blockIdx.x;
#else
  return emulated::self().block_x;
#endif
}

VK_DEVICE int block_y() {
#if defined(__CUDACC__)
  return static_cast<int>(blockIdx.y);
#else
  return static_cast<int>(emulated::self().block_y);
#endif
}

VK_DEVICE int64_t blocks_x() {
#if defined(__CUDACC__)
  return gridDim.x;
#else
  return emulated::self().blocks_x;
#endif
}

// The same number, as if it were new: what a loop computes from it is computed in every turn and holds no registers
// between them.
VK_DEVICE int anew(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

VK_DEVICE int lane() { return thread_index() % kWarp; }
VK_DEVICE int warp() { return thread_index() / kWarp; }

}  // namespace vk::device
