#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/kv_cache.h"

namespace vk {

struct KvAppendParams {
  TensorRef k, v;        // b s m d, the cache's dtype
  const int32_t* count;  // b: real tokens of each sequence
  CacheRef cache;
};

VK_DECLARE_KERNEL(void kv_append(const KvAppendParams& p))

}  // namespace vk
