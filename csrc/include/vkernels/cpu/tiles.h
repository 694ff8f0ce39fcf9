// The sizes CPU kernels are cut to, for `explain`. They are read off the constants the kernels are compiled with, so
// every instruction set has its own.
#pragma once

#include <cstdint>

#include "vkernels/cpu/isa.h"

namespace vk {

struct TileSize {
  const char *op, *what;
  int64_t size;
};
struct TileSizes {
  const TileSize* first;
  int64_t count;
};

VK_DECLARE_KERNEL(TileSizes tile_sizes())

}  // namespace vk
