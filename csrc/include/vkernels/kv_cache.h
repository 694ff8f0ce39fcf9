// The storage of a KVCache (vkernels/kv_cache.py, STORAGE) as kernels see it, and its checks.
#pragma once

#include <string>
#include <vector>

#include "vkernels/check.h"
#include "vkernels/quantize.h"

namespace vk {

struct CacheRef {
  TensorRef k_rows, v_rows;      // pages m page d
  TensorRef k_codes, k_scale;    // pages m page/group words(d) group; pages m page/group 2 d
  TensorRef v_codes, v_scale;    // pages m page/group words(group) d_pad; pages m page/group 2 channel_groups group
  TensorRef k_recent, v_recent;  // b m residual+group d
  TensorRef k_sink, v_sink;      // b m sinks d
  const int32_t* table;          // b table_pages
  const int32_t* length;         // b
  CacheLayout layout;
  int64_t b, m, d, table_pages;
  Dtype dtype;

  int64_t d_pad() const { return (d + 15) / 16 * 16; }
  int64_t channel_groups() const { return (d + layout.group - 1) / layout.group; }
};

// Everything a kernel relies on. `count` (b) more tokens are about to be written, or null.
CacheRef checked_cache(const char* op, const TensorRef& length, const TensorRef& table,
                       const std::vector<TensorRef>& storage, const std::vector<int64_t>& layout, int64_t b, int64_t m,
                       int64_t d, const int32_t* count);

}  // namespace vk
