#pragma once

#include "bind.h"
#include "decode_attention_check.h"

namespace vk::decode_attention_bind {

inline void decode_attention_cpu(TensorRef q, TensorRef length, TensorRef table, std::vector<TensorRef> storage,
                                 double scale, int64_t window, std::vector<int64_t> layout, TensorRef o,
                                 TensorRef lse) {
  const int64_t m = check_decode_attention(q, storage, scale, window, layout, o, lse);
  const CacheRef cache =
      checked_cache("decode_attention", length, table, storage, layout, q.size(0), m, q.size(3), nullptr);
  VK_DISPATCH(decode_attention, {q, cache, static_cast<float>(scale), window, o, lse});
}

inline void bind(py::module_& m) {
  m.def("decode_attention", &decode_attention_cpu, py::arg("q"), py::arg("length"), py::arg("table"),
        py::arg("storage"), py::arg("scale"), py::arg("window"), py::arg("layout"), py::arg("o"), py::arg("lse"),
        release_gil());
}

}  // namespace vk::decode_attention_bind
