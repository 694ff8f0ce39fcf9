// What rearrange refuses whatever the backend; no value of a tensor is looked at.
#pragma once

#include <vector>

#include "bind.h"
#include "rearrange.h"

namespace vk {

inline bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::bf16 || t == Dtype::f16; }

inline int bytes_of(Dtype t) {
  switch (t) {
    case Dtype::f64:
    case Dtype::i64:
      return 8;
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::bf16:
    case Dtype::f16:
      return 2;
    default:
      return 1;
  }
}

namespace rearrange {
constexpr const char* kOp = "rearrange";

inline void check_vector(const char* name, const TensorRef& t, int64_t c) {
  if (!t.given) return;
  check_rank(kOp, name, t, 1);
  check_dtype(kOp, name, t, Dtype::f32);
  check_size(kOp, name, t, 0, c);
  check_unit_stride(kOp, name, t);
}

inline void check_rows(const char* name, const TensorRef& t, int64_t b, int64_t n, int64_t c) {
  check_rank(kOp, name, t, 3);
  check_unit_stride(kOp, name, t);
  VK_CHECK(is_float(t.dtype), kOp, name, "have a float dtype", static_cast<int>(t.dtype));
  check_size(kOp, name, t, 0, b);
  check_size(kOp, name, t, 1, n);
  check_size(kOp, name, t, 2, c);
}

// Row pointers and row numbers of a plan, their shapes. Returns n_out.
inline int64_t check_plan_shapes(const TensorRef& ptr, const TensorRef& idx, const TensorRef& weight, int64_t b) {
  check_rank(kOp, "idx", idx, 2);
  check_dtype(kOp, "idx", idx, Dtype::i32);
  check_unit_stride(kOp, "idx", idx);
  const int64_t p = idx.size(0), nnz = idx.size(1);
  VK_CHECK(p == 1 || p == b, kOp, "idx", "have 1 or b samples", shape_text(idx));
  if (weight.given) {
    check_rank(kOp, "weight", weight, 2);
    check_dtype(kOp, "weight", weight, Dtype::f32);
    check_unit_stride(kOp, "weight", weight);
    check_size(kOp, "weight", weight, 0, p);
    check_size(kOp, "weight", weight, 1, nnz);
  }
  if (!ptr.given) return nnz;
  check_rank(kOp, "ptr", ptr, 2);
  check_dtype(kOp, "ptr", ptr, Dtype::i32);
  check_unit_stride(kOp, "ptr", ptr);
  check_size(kOp, "ptr", ptr, 0, p);
  VK_CHECK(ptr.size(1) >= 1, kOp, "ptr", "have n_out + 1 entries", shape_text(ptr));
  return ptr.size(1) - 1;
}

inline bool is_move(const RearrangeRowsParams& p) {
  return !p.ptr.given && !p.weight.given && !p.bias.given && !p.gate.given && !p.residual.given && p.norm == 0 &&
         p.scale == 1.0f && !p.accumulate && !p.sum.given;
}

// Rows of all sources.
inline int64_t check_sources(const RearrangeRowsParams& p, int64_t b, int64_t c) {
  int64_t n_rows = 0;
  for (int i = 0; i < p.sources; ++i) {
    const TensorRef& t = p.x[i];
    VK_CHECK(t.given && t.rank >= 3, kOp, "x", "have at least 3 axes", shape_text(t));
    VK_CHECK(t.size(0) == b || t.size(0) == 1, kOp, "x", "have 1 or b samples", shape_text(t));
    VK_CHECK(t.dtype == p.x[0].dtype, kOp, "x", "have one dtype", static_cast<int>(t.dtype));
    check_size(kOp, "x", t, t.rank - 1, c);
    check_unit_stride(kOp, "x", t);
    int64_t rows = 1;
    for (int d = 1; d + 1 < t.rank; ++d) rows *= t.size(d);
    n_rows += rows;
  }
  return n_rows;
}

// Everything but the sources, the values of the plan, and the outputs.
inline void check_epilogue(const RearrangeRowsParams& p, int64_t b, int64_t n_out, int64_t c) {
  check_vector("bias", p.bias, c);
  check_vector("gate", p.gate, c);
  check_vector("norm_weight", p.norm_weight, c);
  check_vector("norm_bias", p.norm_bias, c);
  if (p.residual.given) check_rows("residual", p.residual, b, n_out, c);
  VK_CHECK(p.norm >= 0 && p.norm <= 2, kOp, "norm", "be 0, 1 or 2", p.norm);
  VK_CHECK(p.reduce == 0 || p.reduce == 1, kOp, "reduce", "be 0 or 1", p.reduce);
  VK_CHECK(is_move(p) || is_float(p.x[0].dtype), kOp, "x", "have a float dtype to be reduced or scaled",
           static_cast<int>(p.x[0].dtype));
}

// Results of the forward but for the values of rows.
inline void check_results(const RearrangeRowsParams& p, int64_t b, int64_t n_out, int64_t c) {
  check_size(kOp, "y", p.y, 2, c);
  if (p.rows.given) {
    check_rank(kOp, "rows", p.rows, 2);
    check_dtype(kOp, "rows", p.rows, Dtype::i32);
    check_unit_stride(kOp, "rows", p.rows);
    VK_CHECK(p.rows.size(0) == 1 || p.rows.size(0) == b, kOp, "rows", "have 1 or b samples", shape_text(p.rows));
    check_size(kOp, "rows", p.rows, 1, n_out);
  } else {
    check_size(kOp, "y", p.y, 1, n_out);
  }
  VK_CHECK(p.y.dtype == p.x[0].dtype || (is_float(p.y.dtype) && is_float(p.x[0].dtype)), kOp, "y",
           "have the dtype of x or a float dtype", static_cast<int>(p.y.dtype));
  if (p.sum.given) check_rows("sum", p.sum, b, n_out, c);
}

inline void check_gradients(const RearrangeRowsBwdParams& q, int64_t b, int64_t n_out, int64_t c) {
  VK_CHECK(is_float(q.forward.x[0].dtype), kOp, "x", "have a float dtype", static_cast<int>(q.forward.x[0].dtype));
  check_rows("dy", q.dy, b, n_out, c);
  if (q.dsum.given) check_rows("dsum", q.dsum, b, n_out, c);
  check_rows("du", q.du, b, n_out, c);
  if (q.dv.given) check_rows("dv", q.dv, b, n_out, c);
  check_rank(kOp, "partial", q.partial, 3);
  check_dtype(kOp, "partial", q.partial, Dtype::f32);
  check_size(kOp, "partial", q.partial, 1, 4);
  check_size(kOp, "partial", q.partial, 2, c);
  VK_CHECK(q.partial.stride(1) == c && q.partial.stride(2) == 1, kOp, "partial", "be contiguous",
           shape_text(q.partial));
}

// The move itself, or a rank of -1 where nothing is to be moved.
inline RearrangeAffineParams checked_affine(const TensorRef& x, const std::vector<int64_t>& axes,
                                            const std::vector<int64_t>& sizes, const std::vector<int64_t>& steps,
                                            const TensorRef& y) {
  RearrangeAffineParams p;
  const size_t rank = axes.size();
  VK_CHECK(x.given && y.given && x.rank >= 1, kOp, "x", "be a tensor with axes", x.rank);
  VK_CHECK(rank == sizes.size() && rank == steps.size() && rank < RearrangeAffineParams::kMaxFactors, kOp, "axes",
           "have at most 11 factors, each with a size and a step", rank);
  VK_CHECK(x.dtype == y.dtype, kOp, "y", "have the dtype of x", static_cast<int>(y.dtype));
  std::array<int64_t, TensorRef::kMaxRank> reach{};
  int64_t total = 1, y_stride = 1;
  for (size_t i = rank; i-- > 0;) {
    VK_CHECK(sizes[i] >= 0 && steps[i] >= 0 && axes[i] >= -1 && axes[i] < x.rank, kOp, "axes",
             "name axes of x with sizes and steps that are not negative", axes[i]);
    p.sizes[i] = sizes[i];
    p.x_strides[i] = axes[i] < 0 ? 0 : steps[i] * x.stride(static_cast<int>(axes[i]));
    p.y_strides[i] = y_stride;
    y_stride *= sizes[i];
    total *= sizes[i];
    if (axes[i] >= 0) reach[static_cast<size_t>(axes[i])] += (sizes[i] - 1) * steps[i];
  }
  VK_CHECK(total == y.numel(), kOp, "sizes", "multiply to the size of y", total);
  p.rank = -1;
  if (total == 0) return p;
  for (int d = 0; d < x.rank; ++d)
    VK_CHECK(reach[static_cast<size_t>(d)] < x.size(d), kOp, "steps", "stay inside x", reach[static_cast<size_t>(d)]);
  int64_t stride = 1;
  for (int d = y.rank - 1; d >= 0; --d) {
    VK_CHECK(y.size(d) == 1 || y.stride(d) == stride, kOp, "y", "be contiguous", shape_text(y));
    stride *= y.size(d);
  }
  p.x = x.ptr<const char>();
  p.y = y.ptr<char>();
  p.element_bytes = bytes_of(x.dtype);
  p.rank = static_cast<int>(rank);
  return p;
}

}  // namespace rearrange
}  // namespace vk
