#pragma once

#include "kv_append.h"
#include "vkernels/device/stream.h"

namespace vk {

struct KvAppendCudaParams {
  TensorRef k, v;   // b s m d, the cache's dtype
  TensorRef count;  // b int32
  CacheRef cache;
};

void kv_append_cuda(const KvAppendCudaParams& p, const device::Stream& stream);

}  // namespace vk
