#pragma once

#include "rearrange_check.h"
#include "rearrange_cuda.h"

namespace vk::rearrange_cuda_bind {

using namespace rearrange;
using device::Stream;

inline Stream stream_of(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

inline void set_sources(RearrangeRowsParams& p, const std::array<TensorRef, 4>& x) {
  VK_CHECK(x[0].given, kOp, "x", "be 1 to 4 tensors", 0);
  for (const TensorRef& t : x)
    if (t.given) p.x[p.sources++] = t;
}

inline int row_axes(const TensorRef& t) {
  int count = 0;
  int64_t runs_on = 0;
  for (int d = 1; d + 1 < t.rank; ++d) {
    if (t.size(d) == 1) continue;
    count += count == 0 || runs_on != t.size(d) * t.stride(d);
    runs_on = t.stride(d);
  }
  return count;
}

// Everything but the outputs; returns n_out. Values of the plan are the kernel's to check.
inline int64_t check_forward(const RearrangeRowsParams& p, int64_t b) {
  const int64_t c = p.x[0].rank >= 3 ? p.x[0].size(-1) : 0;
  const int64_t n_rows = check_sources(p, b, c);
  VK_CHECK(n_rows < INT32_MAX, kOp, "x", "have fewer than 2^31 rows", n_rows);
  for (int i = 0; i < p.sources; ++i)
    VK_CHECK(row_axes(p.x[i]) <= kMostRowAxes, kOp, "x", "have rows on at most 3 axes", shape_text(p.x[i]));
  const int64_t n_out = check_plan_shapes(p.ptr, p.idx, p.weight, b);
  check_epilogue(p, b, n_out, c);
  VK_CHECK(p.norm == 0 || c <= kWidestRow, kOp, "x", "have at most 8192 channels under a norm", c);
  return n_out;
}

inline void rows_on_gpu(TensorRef x0, TensorRef x1, TensorRef x2, TensorRef x3, TensorRef ptr, TensorRef idx,
                        TensorRef weight, TensorRef bias, TensorRef gate, TensorRef residual, TensorRef norm_weight,
                        TensorRef norm_bias, TensorRef rows, TensorRef y, TensorRef sum, int reduce, int norm,
                        float scale, float eps, bool accumulate, int device, uintptr_t stream) {
  RearrangeRowsParams p;
  set_sources(p, {x0, x1, x2, x3});
  p.ptr = ptr, p.idx = idx, p.weight = weight, p.bias = bias, p.gate = gate, p.residual = residual;
  p.norm_weight = norm_weight, p.norm_bias = norm_bias, p.rows = rows, p.y = y, p.sum = sum;
  p.reduce = reduce, p.norm = norm, p.scale = scale, p.eps = eps, p.accumulate = accumulate;
  check_rank(kOp, "y", y, 3);
  check_unit_stride(kOp, "y", y);
  const int64_t n_out = check_forward(p, y.size(0));
  check_results(p, y.size(0), n_out, p.x[0].size(-1));
  rearrange_rows_cuda(p, stream_of(device, stream));
}

inline void rows_bwd_on_gpu(TensorRef x0, TensorRef x1, TensorRef x2, TensorRef x3, TensorRef ptr, TensorRef idx,
                            TensorRef weight, TensorRef bias, TensorRef gate, TensorRef residual, TensorRef norm_weight,
                            TensorRef norm_bias, TensorRef dy, TensorRef dsum, TensorRef du, TensorRef dv,
                            TensorRef partial, int reduce, int norm, float scale, float eps, int device,
                            uintptr_t stream) {
  RearrangeRowsBwdParams q;
  RearrangeRowsParams& p = q.forward;
  set_sources(p, {x0, x1, x2, x3});
  p.ptr = ptr, p.idx = idx, p.weight = weight, p.bias = bias, p.gate = gate, p.residual = residual;
  p.norm_weight = norm_weight, p.norm_bias = norm_bias;
  p.reduce = reduce, p.norm = norm, p.scale = scale, p.eps = eps;
  q.dy = dy, q.dsum = dsum, q.du = du, q.dv = dv, q.partial = partial;
  check_rank(kOp, "dy", dy, 3);
  const int64_t n_out = check_forward(p, dy.size(0)), c = p.x[0].size(-1);
  check_gradients(q, dy.size(0), n_out, c);
  const int64_t sums = 4 * c * (bias.given + gate.given + norm_weight.given + norm_bias.given);
  VK_CHECK(c <= kWidestRow, kOp, "x", "have at most 8192 channels for a gradient of the epilogue", c);
  VK_CHECK(sums <= kMostSumBytes, kOp, "x", "have sums of at most 128 KB for its parameters", sums);
  rearrange_rows_bwd_cuda(q, stream_of(device, stream));
}

inline void affine_on_gpu(TensorRef x, TensorRef y, std::vector<int64_t> axes, std::vector<int64_t> sizes,
                          std::vector<int64_t> steps, int device, uintptr_t stream) {
  const RearrangeAffineParams p = checked_affine(x, axes, sizes, steps, y);
  if (p.rank >= 0) rearrange_affine_cuda(p, stream_of(device, stream));
}

inline void bind(py::module_& m) {
  m.def("rearrange_rows_cuda", &rows_on_gpu, release_gil());
  m.def("rearrange_rows_bwd_cuda", &rows_bwd_on_gpu, release_gil());
  m.def("rearrange_affine_cuda", &affine_on_gpu, release_gil());
}

}  // namespace vk::rearrange_cuda_bind
