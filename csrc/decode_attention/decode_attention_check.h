// What decode_attention refuses whatever the backend; no value of a tensor is looked at.
#pragma once

#include <cmath>

#include "decode_attention.h"

namespace vk {

// Heads of keys and values, from the storage.
inline int64_t check_decode_attention(const TensorRef& q, const std::vector<TensorRef>& storage, double scale,
                                      int64_t window, const std::vector<int64_t>& layout, const TensorRef& o,
                                      const TensorRef& lse) {
  constexpr const char* op = "decode_attention";
  check_rank(op, "q", q, 4);
  check_unit_stride(op, "q", q);
  VK_CHECK(q.size(1) >= 1 && q.size(1) <= 8, op, "q", "hold 1 to 8 tokens", q.size(1));
  VK_CHECK(q.dtype == Dtype::f32 || q.dtype == Dtype::bf16 || q.dtype == Dtype::f16, op, "q",
           "have dtype float32, bfloat16 or float16", static_cast<int>(q.dtype));
  check_rank(op, "o", o, 4);
  check_dtype(op, "o", o, q.dtype);
  for (int i = 0; i < 4; ++i) check_size(op, "o", o, i, q.size(i));
  check_rank(op, "lse", lse, 3);
  check_dtype(op, "lse", lse, Dtype::f32);
  check_size(op, "lse", lse, 0, q.size(0));
  check_size(op, "lse", lse, 1, q.size(2));
  check_size(op, "lse", lse, 2, q.size(1));
  VK_CHECK(window >= 0, op, "window", "be at least 0", window);
  VK_CHECK(std::isfinite(scale), op, "scale", "be finite", scale);
  VK_CHECK(storage.size() == 10, op, "storage", "hold 10 tensors", storage.size());
  const TensorRef& heads = layout.size() == 6 && layout[0] ? storage[2] : storage[0];
  const int64_t m = heads.given && heads.rank > 1 ? heads.size(1) : 0;
  VK_CHECK(m > 0 && q.size(2) % m == 0 && q.size(2) > 0, op, "q", "have a multiple of the cache's heads", q.size(2));
  return m;
}

}  // namespace vk
