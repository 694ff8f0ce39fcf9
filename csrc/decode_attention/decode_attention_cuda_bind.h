#pragma once

#include "bind.h"
#include "decode_attention_check.h"
#include "decode_attention_cuda.h"
#include "kv_cache_check.h"

namespace vk::decode_attention_cuda_bind {

constexpr const char* kOp = "decode_attention";

// Rows are read 16 bytes at a time.
inline void check_aligned(const char* name, const TensorRef& t) {
  VK_CHECK(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, kOp, name, "start at a multiple of 16 bytes",
           reinterpret_cast<uintptr_t>(t.data) % 16);
}

inline void check_work(const DecodeWorkspace& work, const CacheRef& c, int64_t shared) {
  VK_CHECK(work.splits >= 1 && work.splits <= 512, kOp, "splits", "be 1 to 512", work.splits);
  for (const auto& [name, t, dtype, least] :
       {std::tuple{"part", &work.part, Dtype::f32, decode_part_floats(c, shared, work.splits)},
        std::tuple{"counter", &work.counter, Dtype::i32, decode_programs(c, shared)}}) {
    check_rank(kOp, name, *t, 1);
    check_dtype(kOp, name, *t, dtype);
    check_unit_stride(kOp, name, *t);
    VK_CHECK(t->numel() >= least, kOp, name, "have at least " + std::to_string(least) + " elements", t->numel());
    check_aligned(name, *t);
  }
}

inline void decode_attention_on_gpu(TensorRef q, TensorRef length, TensorRef table, TensorRef k_rows, TensorRef v_rows,
                                    TensorRef k_codes, TensorRef k_scale, TensorRef v_codes, TensorRef v_scale,
                                    TensorRef k_recent, TensorRef v_recent, TensorRef k_sink, TensorRef v_sink,
                                    TensorRef o, TensorRef lse, TensorRef part, TensorRef counter, double scale,
                                    int64_t window, std::vector<int64_t> layout, int64_t splits, int device,
                                    uintptr_t stream) {
  const std::vector<TensorRef> storage{k_rows,  v_rows,   k_codes,  k_scale, v_codes,
                                       v_scale, k_recent, v_recent, k_sink,  v_sink};
  const int64_t m = check_decode_attention(q, storage, scale, window, layout, o, lse);
  const CacheRef c = checked_cache_shapes(kOp, length, table, storage, layout, q.size(0), m, q.size(3));
  VK_CHECK(q.dtype != Dtype::f32 && q.dtype == c.dtype, kOp, "q", "have the cache's dtype, bfloat16 or float16",
           static_cast<int>(q.dtype));
  VK_CHECK(c.d % 8 == 0 && c.d <= 128, kOp, "q", "have heads of a multiple of 8 up to 128", c.d);
  const int64_t room = c.table_pages * c.layout.page, shared = q.size(2) / m * q.size(1);
  VK_CHECK(room > 0 && room < (int64_t{1} << 31) - (1 << 16), kOp, "table", "give a sequence 1 to 2^31 - 2^16 tokens",
           room);
  VK_CHECK(q.size(2) < INT32_MAX / 8 && c.m < INT32_MAX, kOp, "q", "have fewer than 2^28 heads", q.size(2));
  VK_CHECK(q.size(0) == 0 || (c.layout.bits ? c.k_codes : c.k_rows).size(0) > 0, kOp, "k_rows", "have pages", 0);
  const char* names[] = {"k_rows",  "v_rows",   "k_codes",  "k_scale", "v_codes",
                         "v_scale", "k_recent", "v_recent", "k_sink",  "v_sink"};
  for (size_t i = 0; i < storage.size(); ++i)
    if (storage[i].given) check_aligned(names[i], storage[i]);
  check_aligned("o", o);
  const DecodeWorkspace work{part, counter, splits};
  check_work(work, c, shared);
  decode_attention_cuda({q, c, static_cast<float>(scale), window, o, lse}, work,
                        {device, reinterpret_cast<void*>(stream)});
}

inline void bind(py::module_& m) { m.def("decode_attention_cuda", &decode_attention_on_gpu, release_gil()); }

}  // namespace vk::decode_attention_cuda_bind
