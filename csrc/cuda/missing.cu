#include <cuda_runtime.h>

#include "missing.h"

namespace vk {

static std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The static runtime looks for the driver when it is first asked, so a machine without one loads the library.
std::optional<std::string> cuda_missing() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no NVIDIA driver is installed (libcuda.so.1 is not found)";
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver knows CUDA " + version_text(driver) + ", vkernels was built with CUDA " +
           version_text(runtime);
  return std::nullopt;
}

}  // namespace vk
