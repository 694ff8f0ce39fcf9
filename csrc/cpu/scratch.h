#pragma once

#include <cstdint>

namespace vk {

int64_t scratch_bytes();  // what scratch() holds for all threads together

}  // namespace vk
