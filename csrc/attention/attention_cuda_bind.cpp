#include "attention_check.h"
#include "attention_cuda.h"
#include "bind.h"

namespace vk {
namespace {

using namespace attention;

// Rows are copied 16 bytes at a time.
void check_vectors(const char* name, const TensorRef& t) {
  bool whole = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) whole = whole && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  VK_CHECK(whole || t.numel() == 0, op, name, "lie at 16-byte addresses, row by row", shape_text(t));
}

void check_call(const TensorRef& q, const TensorRef& k, const TensorRef& v) {
  VK_CHECK(q.dtype == Dtype::bf16 || q.dtype == Dtype::f16, op, "q", "have dtype bfloat16, float16",
           static_cast<int>(q.dtype));
  VK_CHECK(q.size(3) <= 128 && q.size(3) % 8 == 0, op, "q", "have a head size of at most 128 that is a multiple of 8",
           q.size(3));
  for (const auto& [name, t] : {std::pair{"q", q}, std::pair{"k", k}, std::pair{"v", v}}) check_vectors(name, t);
}

void forward(TensorRef q, TensorRef k, TensorRef v, TensorRef o, TensorRef lse, TensorRef q_rows, TensorRef k_rows,
             TensorRef q_count, TensorRef k_count, TensorRef ranges, TensorRef q_attr, TensorRef k_attr,
             TensorRef q_global, TensorRef k_global, double scale, std::vector<int64_t> layout,
             std::vector<int64_t> bounds, int device, uintptr_t stream) {
  check_inputs(q, k, v, o, lse);
  check_call(q, k, v);
  AttentionParams p{q, k, v, o, lse, scale, {}, {}, {}, {}, {}, {}};
  p.mask = make_mask(q, k, layout, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds),
                     q_global, k_global);
  attention_forward_cuda(p, {device, reinterpret_cast<void*>(stream)});
}

}  // namespace

void bind_attention_cuda(py::module_& m) { m.def("attention_cuda", &forward, release_gil()); }

}  // namespace vk
