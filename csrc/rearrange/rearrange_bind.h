#pragma once

#include "rearrange_check.h"

namespace vk::rearrange_bind {

using namespace rearrange;

// Row numbers, row pointers and shapes of a plan: everything that becomes an address. Returns n_out.
inline int64_t check_plan(const TensorRef& ptr, const TensorRef& idx, const TensorRef& weight, int64_t n_rows,
                          int64_t b) {
  const int64_t n_out = check_plan_shapes(ptr, idx, weight, b), nnz = idx.size(1);
  const int32_t lowest = ptr.given ? 0 : -1;
  for (int64_t i = 0; i < idx.size(0); ++i) {
    const int32_t* row = idx.ptr<const int32_t>() + i * idx.stride(0);
    int32_t low = 0, high = -1;
    for (int64_t k = 0; k < nnz; ++k) {
      low = row[k] < low ? row[k] : low;
      high = row[k] > high ? row[k] : high;
    }
    VK_CHECK(low >= lowest && high < n_rows, kOp, "idx", "hold rows below " + std::to_string(n_rows),
             low < lowest ? low : high);
    if (!ptr.given) continue;
    const int32_t* start = ptr.ptr<const int32_t>() + i * ptr.stride(0);
    bool rises = start[0] >= 0 && start[n_out] <= nnz;
    for (int64_t r = 0; r < n_out; ++r) rises &= start[r] <= start[r + 1];
    VK_CHECK(rises, kOp, "ptr", "rise from 0 to at most " + std::to_string(nnz), start[n_out]);
  }
  return n_out;
}

inline void set_sources(RearrangeRowsParams& p, const std::vector<TensorRef>& x) {
  VK_CHECK(!x.empty() && x.size() <= RearrangeRowsParams::kMaxSources, kOp, "x", "be 1 to 8 tensors", x.size());
  for (const TensorRef& t : x) p.x[p.sources++] = t;
}

// Checks everything but the outputs; returns (b, n_out, c).
inline std::array<int64_t, 3> check_forward(const RearrangeRowsParams& p, int64_t b) {
  const int64_t c = p.x[0].rank >= 3 ? p.x[0].size(-1) : 0;
  const int64_t n_out = check_plan(p.ptr, p.idx, p.weight, check_sources(p, b, c), b);
  check_epilogue(p, b, n_out, c);
  return {b, n_out, c};
}

// Scatter targets: inside y, and no two output rows of a sample on the same one (they would race).
inline void check_targets(const TensorRef& rows, int64_t n_out, int64_t n_target) {
  for (int64_t i = 0; i < rows.size(0); ++i) {
    std::vector<bool> taken(static_cast<size_t>(n_target));
    const int32_t* row = rows.ptr<const int32_t>() + i * rows.stride(0);
    for (int64_t k = 0; k < n_out; ++k) {
      if (row[k] < 0) continue;
      VK_CHECK(row[k] < n_target, kOp, "rows", "lie below " + std::to_string(n_target), row[k]);
      VK_CHECK(!taken[static_cast<size_t>(row[k])], kOp, "rows", "name no row twice", row[k]);
      taken[static_cast<size_t>(row[k])] = true;
    }
  }
}

inline void rows_cpu(const std::vector<TensorRef>& x, TensorRef ptr, TensorRef idx, TensorRef weight, TensorRef bias,
                     TensorRef gate, TensorRef residual, TensorRef norm_weight, TensorRef norm_bias, TensorRef rows,
                     int reduce, int norm, float scale, float eps, bool accumulate, TensorRef y, TensorRef sum) {
  RearrangeRowsParams p;
  set_sources(p, x);
  p.ptr = ptr, p.idx = idx, p.weight = weight, p.bias = bias, p.gate = gate, p.residual = residual;
  p.norm_weight = norm_weight, p.norm_bias = norm_bias, p.rows = rows, p.y = y, p.sum = sum;
  p.reduce = reduce, p.norm = norm, p.scale = scale, p.eps = eps, p.accumulate = accumulate;
  check_rank(kOp, "y", y, 3);
  check_unit_stride(kOp, "y", y);
  const auto [b, n_out, c] = check_forward(p, y.size(0));
  check_results(p, b, n_out, c);
  if (rows.given) check_targets(rows, n_out, y.size(1));
  VK_DISPATCH(rearrange_rows, p);
}

inline void rows_bwd_cpu(const std::vector<TensorRef>& x, TensorRef ptr, TensorRef idx, TensorRef weight,
                         TensorRef bias, TensorRef gate, TensorRef residual, TensorRef norm_weight, TensorRef norm_bias,
                         int reduce, int norm, float scale, float eps, TensorRef dy, TensorRef dsum, TensorRef du,
                         TensorRef dv, TensorRef partial) {
  RearrangeRowsBwdParams q;
  RearrangeRowsParams& p = q.forward;
  set_sources(p, x);
  p.ptr = ptr, p.idx = idx, p.weight = weight, p.bias = bias, p.gate = gate, p.residual = residual;
  p.norm_weight = norm_weight, p.norm_bias = norm_bias;
  p.reduce = reduce, p.norm = norm, p.scale = scale, p.eps = eps;
  q.dy = dy, q.dsum = dsum, q.du = du, q.dv = dv, q.partial = partial;
  check_rank(kOp, "dy", dy, 3);
  const auto [b, n_out, c] = check_forward(q.forward, dy.size(0));
  check_gradients(q, b, n_out, c);
  VK_DISPATCH(rearrange_rows_bwd, q);
}

inline void max_bwd_cpu(TensorRef x, TensorRef ptr, TensorRef idx, TensorRef dy, TensorRef dx) {
  check_rank(kOp, "x", x, 3);
  VK_CHECK(ptr.given, kOp, "ptr", "be given", "nothing");
  const int64_t n_out = check_plan(ptr, idx, {}, x.size(1), x.size(0));
  check_rows("x", x, x.size(0), x.size(1), x.size(2));
  check_rows("dy", dy, x.size(0), n_out, x.size(2));
  check_rows("dx", dx, x.size(0), x.size(1), x.size(2));
  check_dtype(kOp, "dx", dx, Dtype::f32);
  VK_DISPATCH(rearrange_max_bwd, {x, ptr, idx, dy, dx});
}

inline void affine_cpu(TensorRef x, std::vector<int64_t> axes, std::vector<int64_t> sizes, std::vector<int64_t> steps,
                       TensorRef y) {
  const RearrangeAffineParams p = checked_affine(x, axes, sizes, steps, y);
  if (p.rank < 0) return;
  VK_DISPATCH(rearrange_affine, p);
}

inline void bind(py::module_& m) {
  m.def("rearrange_rows", &rows_cpu, release_gil());
  m.def("rearrange_rows_bwd", &rows_bwd_cpu, release_gil());
  m.def("rearrange_max_bwd", &max_bwd_cpu, release_gil());
  m.def("rearrange_affine", &affine_cpu, release_gil());
}

}  // namespace vk::rearrange_bind
