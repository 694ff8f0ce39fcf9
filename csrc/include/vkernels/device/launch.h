// The host's side of a kernel: where it runs, and a launch that says what went wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "vkernels/device/kernel.h"
#include "vkernels/device/noted.h"
#include "vkernels/device/stream.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace vk::device {

struct Grid {
  int64_t x;  // up to 2^31 - 1
  int64_t y;  // up to 65,535
  int threads;
  size_t shared_bytes = 0;
};

inline constexpr int64_t kMaxBlocks = 0x7fffffff;

// Starts `kernel` on the stream and returns; nothing where the grid is empty. No synchronisation, no allocation: it can
// be captured into a CUDA graph.
template <class Params>
void launch(const char* name, void (*kernel)(Params), const Grid& grid, const Stream& stream, const Params& params) {
  if (grid.x <= 0 || grid.y <= 0) return;
  if (grid.x > kMaxBlocks || grid.y > 65535)
    throw std::runtime_error(std::string(name) + ": a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " blocks is too large");
  if (noted_launches != nullptr) {
    noted_launches->push_back({name, grid.x, grid.y, grid.threads, grid.shared_bytes});
    return;
  }
#if defined(__CUDACC__)
  const auto check = [&](cudaError_t status, const char* what) {
    if (status != cudaSuccess)
      throw std::runtime_error(std::string(name) + ": the kernel could not be " + what + ": " +
                               cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
  };
  check(cudaSetDevice(stream.device), "sent to its device");
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)),
          "given its shared memory");
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(function, dim3(unsigned(grid.x), unsigned(grid.y)), dim3(unsigned(grid.threads)), arguments,
                         grid.shared_bytes, static_cast<cudaStream_t>(stream.handle)),
        "launched");
#else
  (void)stream;
  using Call = std::tuple<void (*)(Params), const Params*>;
  const Call call(kernel, &params);
  emulated::run(
      name, {grid.x, grid.y, grid.threads, grid.shared_bytes},
      [](const void* c) { std::get<0> (*static_cast<const Call*>(c))(*std::get<1>(*static_cast<const Call*>(c))); },
      &call);
#endif
}

}  // namespace vk::device
