#include "qkv_prologue.h"
#include "rope_check.h"

namespace vk {
namespace {

constexpr const char* kOp = "qkv_prologue";
constexpr int64_t kMost = int64_t{1} << 20;

// layout: n, m, d, blocks, offset, post, all_heads
QkvPrologueParams checked(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef q, TensorRef k,
                          TensorRef v, TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps,
                          const std::vector<int64_t>& layout) {
  VK_CHECK(layout.size() == 7, kOp, "layout", "have 7 numbers", layout.size());
  const int64_t n = layout[0], m = layout[1], d = layout[2];
  for (const int64_t size : {n, m, d})
    VK_CHECK(size >= 1 && size <= kMost, kOp, "layout", "hold sizes of 1 to 2^20", size);
  QkvPrologueParams p{qkv, bias, {q_norm, k_norm}, {q, k, v}, {}, eps, layout[5] != 0, layout[6] != 0};
  check_rank(kOp, "qkv", qkv, 3);
  check_size(kOp, "qkv", qkv, 2, (n + 2 * m) * d);
  check_unit_stride(kOp, "qkv", qkv);
  VK_CHECK(qkv.dtype <= Dtype::f16, kOp, "qkv", "be float32, bfloat16 or float16", static_cast<int>(qkv.dtype));
  const char* names[3] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    const TensorRef& x = p.out[i];
    check_rank(kOp, names[i], x, 4);
    check_dtype(kOp, names[i], x, qkv.dtype);
    check_unit_stride(kOp, names[i], x);
    check_size(kOp, names[i], x, 0, qkv.size(0));
    check_size(kOp, names[i], x, 1, qkv.size(1));
    check_size(kOp, names[i], x, 2, i == 0 ? n : m);
    check_size(kOp, names[i], x, 3, d);
  }
  const int64_t columns[3] = {(n + 2 * m) * d, p.all_heads ? n * d : d, p.all_heads ? m * d : d};
  const TensorRef given[3] = {bias, q_norm, k_norm};
  const char* arguments[3] = {"bias", "q_norm", "k_norm"};
  for (int i = 0; i < 3; ++i) {
    if (!given[i].given) continue;
    check_rank(kOp, arguments[i], given[i], 1);
    check_dtype(kOp, arguments[i], given[i], Dtype::f32);
    check_unit_stride(kOp, arguments[i], given[i]);
    check_size(kOp, arguments[i], given[i], 0, columns[i]);
  }
  if (pos.given) {
    p.rope = {pos, axis, freq, {}, {}, scale, false, layout[3], layout[4]};
    check_rope(kOp, p.rope, qkv.size(0), qkv.size(1), d);
    VK_CHECK(n % p.rope.heads() == 0 && m % p.rope.heads() == 0, kOp, "axis", "have a divisor of n and m heads",
             p.rope.heads());
  }
  return p;
}

void forward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef q, TensorRef k, TensorRef v,
             TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps, std::vector<int64_t> layout) {
  const QkvPrologueParams p = checked(qkv, bias, q_norm, k_norm, q, k, v, pos, axis, freq, scale, eps, layout);
  VK_DISPATCH(qkv_prologue, p);
}

void backward(TensorRef qkv, TensorRef bias, TensorRef q_norm, TensorRef k_norm, TensorRef dq, TensorRef dk,
              TensorRef dv, TensorRef pos, TensorRef axis, TensorRef freq, double scale, double eps,
              std::vector<int64_t> layout, TensorRef dqkv, TensorRef partials, TensorRef sums) {
  QkvPrologueBackwardParams p;
  p.forward = checked(qkv, bias, q_norm, k_norm, dq, dk, dv, pos, axis, freq, scale, eps, layout);
  p.dqkv = dqkv;
  p.partials = partials;
  p.sums = sums;
  check_rank(kOp, "dqkv", dqkv, 3);
  check_dtype(kOp, "dqkv", dqkv, qkv.dtype);
  check_unit_stride(kOp, "dqkv", dqkv);
  for (int i = 0; i < 3; ++i) check_size(kOp, "dqkv", dqkv, i, qkv.size(i));
  int64_t columns = 0;
  for (const TensorRef& x : {bias, q_norm, k_norm}) columns += x.given ? x.size(0) : 0;
  check_rank(kOp, "partials", partials, 2);
  check_rank(kOp, "sums", sums, 1);
  check_size(kOp, "partials", partials, 0, kPartials);
  check_size(kOp, "partials", partials, 1, columns);
  check_size(kOp, "sums", sums, 0, columns);
  for (const TensorRef& x : {partials, sums}) {
    check_dtype(kOp, "partials", x, Dtype::f32);
    check_unit_stride(kOp, "partials", x);
  }
  VK_DISPATCH(qkv_prologue_bwd, p);
}

}  // namespace

void bind_qkv_prologue(py::module_& m) {
  m.def("qkv_prologue", &forward, release_gil());
  m.def("qkv_prologue_bwd", &backward, release_gil());
  m.attr("QKV_PROLOGUE_PARTIALS") = kPartials;
}

}  // namespace vk
