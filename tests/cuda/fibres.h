// The emulator's own controls, for the tests that drive it.
#pragma once

#include <cstdint>
#include <vector>

#include "vkernels/device/kernel.h"
#include "vkernels/tensor.h"

namespace vk::emulated {

// The tensors of the next call: only their elements may be touched. Empty: anything.
void allow(const std::vector<TensorRef>& tensors);

void set_order(Order order);

// Switches from thread to thread since the library was loaded.
int64_t switches();

}  // namespace vk::emulated
