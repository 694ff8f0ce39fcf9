#pragma once

#include "bind.h"
#include "kv_append_cuda.h"
#include "kv_cache_check.h"

namespace vk::kv_append_cuda_bind {

inline void kv_append_on_gpu(TensorRef k, TensorRef v, TensorRef count, TensorRef length, TensorRef table,
                             TensorRef k_rows, TensorRef v_rows, TensorRef k_codes, TensorRef k_scale,
                             TensorRef v_codes, TensorRef v_scale, TensorRef k_recent, TensorRef v_recent,
                             TensorRef k_sink, TensorRef v_sink, std::vector<int64_t> layout, int device,
                             uintptr_t stream) {
  constexpr const char* op = "kv_append";
  check_rank(op, "k", k, 4);
  check_rank(op, "v", v, 4);
  check_unit_stride(op, "k", k);
  check_unit_stride(op, "v", v);
  for (int i = 0; i < 4; ++i) check_size(op, "v", v, i, k.size(i));
  VK_CHECK(k.size(3) % 8 == 0, op, "k", "have heads of a multiple of 8 elements", k.size(3));
  VK_CHECK(k.size(2) < INT32_MAX / 512, op, "k", "have fewer than 2^22 heads", k.size(2));
  check_rank(op, "count", count, 1);
  check_dtype(op, "count", count, Dtype::i32);
  check_size(op, "count", count, 0, k.size(0));
  check_unit_stride(op, "count", count);
  const std::vector<TensorRef> storage{k_rows,  v_rows,   k_codes,  k_scale, v_codes,
                                       v_scale, k_recent, v_recent, k_sink,  v_sink};
  for (const TensorRef& t : storage)
    VK_CHECK(!t.given || reinterpret_cast<uintptr_t>(t.data) % 16 == 0, op, "storage",
             "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(t.data) % 16);
  const CacheRef cache = checked_cache_shapes(op, length, table, storage, layout, k.size(0), k.size(2), k.size(3));
  check_dtype(op, "k", k, cache.dtype);
  check_dtype(op, "v", v, cache.dtype);
  kv_append_cuda({k, v, count, cache}, {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) { m.def("kv_append_cuda", &kv_append_on_gpu, release_gil()); }

}  // namespace vk::kv_append_cuda_bind
