#pragma once

#include "bind.h"
#include "kv_append.h"

namespace vk::kv_append_bind {

inline void kv_append_cpu(TensorRef k, TensorRef v, TensorRef count, TensorRef length, TensorRef table,
                          std::vector<TensorRef> storage, std::vector<int64_t> layout) {
  constexpr const char* op = "kv_append";
  check_rank(op, "k", k, 4);
  check_rank(op, "v", v, 4);
  check_unit_stride(op, "k", k);
  check_unit_stride(op, "v", v);
  for (int i = 0; i < 4; ++i) check_size(op, "v", v, i, k.size(i));
  check_rank(op, "count", count, 1);
  check_dtype(op, "count", count, Dtype::i32);
  check_size(op, "count", count, 0, k.size(0));
  check_unit_stride(op, "count", count);
  const int32_t* counts = count.ptr<const int32_t>();
  for (int64_t i = 0; i < k.size(0); ++i)
    VK_CHECK(counts[i] >= 0 && counts[i] <= k.size(1), op, "count", "be at most s", counts[i]);
  const CacheRef cache = checked_cache(op, length, table, storage, layout, k.size(0), k.size(2), k.size(3), counts);
  check_dtype(op, "k", k, cache.dtype);
  check_dtype(op, "v", v, cache.dtype);
  VK_DISPATCH(kv_append, {k, v, counts, cache});
}

inline void bind(py::module_& m) {
  m.def("kv_append", &kv_append_cpu, py::arg("k"), py::arg("v"), py::arg("count"), py::arg("length"), py::arg("table"),
        py::arg("storage"), py::arg("layout"), release_gil());
}

}  // namespace vk::kv_append_bind
