#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/kv_cache.h"

namespace vk {

struct DecodeAttentionParams {
  TensorRef q;  // b s n d
  CacheRef cache;
  float scale;
  int64_t window;  // tokens a query sees, itself included; 0: all
  TensorRef o;     // b s n d, contiguous
  TensorRef lse;   // b n s, float, contiguous
};

VK_DECLARE_KERNEL(void decode_attention(const DecodeAttentionParams& p))

}  // namespace vk
