#include <vector>

#include "bind.h"
#include "rearrange.h"

namespace vk {
namespace {

constexpr const char* kOp = "rearrange";

bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::bf16 || t == Dtype::f16; }

int bytes_of(Dtype t) {
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

void check_vector(const char* name, const TensorRef& t, int64_t c) {
  if (!t.given) return;
  check_rank(kOp, name, t, 1);
  check_dtype(kOp, name, t, Dtype::f32);
  check_size(kOp, name, t, 0, c);
  check_unit_stride(kOp, name, t);
}

void check_rows(const char* name, const TensorRef& t, int64_t b, int64_t n, int64_t c) {
  check_rank(kOp, name, t, 3);
  check_unit_stride(kOp, name, t);
  VK_CHECK(is_float(t.dtype), kOp, name, "have a float dtype", static_cast<int>(t.dtype));
  check_size(kOp, name, t, 0, b);
  check_size(kOp, name, t, 1, n);
  check_size(kOp, name, t, 2, c);
}

// Row numbers, row pointers and shapes of a plan: everything that becomes an address. Returns n_out.
int64_t check_plan(const TensorRef& ptr, const TensorRef& idx, const TensorRef& weight, int64_t n_rows, int64_t b) {
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
  int64_t n_out = nnz;
  if (ptr.given) {
    check_rank(kOp, "ptr", ptr, 2);
    check_dtype(kOp, "ptr", ptr, Dtype::i32);
    check_unit_stride(kOp, "ptr", ptr);
    check_size(kOp, "ptr", ptr, 0, p);
    VK_CHECK(ptr.size(1) >= 1, kOp, "ptr", "have n_out + 1 entries", shape_text(ptr));
    n_out = ptr.size(1) - 1;
  }
  const int32_t lowest = ptr.given ? 0 : -1;
  for (int64_t i = 0; i < p; ++i) {
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

void set_sources(RearrangeRowsParams& p, const std::vector<TensorRef>& x) {
  VK_CHECK(!x.empty() && x.size() <= RearrangeRowsParams::kMaxSources, kOp, "x", "be 1 to 8 tensors", x.size());
  for (const TensorRef& t : x) p.x[p.sources++] = t;
}

// Checks everything but the outputs; returns (b, n_out, c).
std::array<int64_t, 3> check_forward(const RearrangeRowsParams& p, int64_t b) {
  int64_t n_rows = 0;
  const int64_t c = p.x[0].rank >= 3 ? p.x[0].size(-1) : 0;
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
  const int64_t n_out = check_plan(p.ptr, p.idx, p.weight, n_rows, b);
  check_vector("bias", p.bias, c);
  check_vector("gate", p.gate, c);
  check_vector("norm_weight", p.norm_weight, c);
  check_vector("norm_bias", p.norm_bias, c);
  if (p.residual.given) check_rows("residual", p.residual, b, n_out, c);
  VK_CHECK(p.norm >= 0 && p.norm <= 2, kOp, "norm", "be 0, 1 or 2", p.norm);
  VK_CHECK(p.reduce == 0 || p.reduce == 1, kOp, "reduce", "be 0 or 1", p.reduce);
  const bool move = !p.ptr.given && !p.weight.given && !p.bias.given && !p.gate.given && !p.residual.given &&
                    p.norm == 0 && p.scale == 1.0f && !p.accumulate && !p.sum.given;
  VK_CHECK(move || is_float(p.x[0].dtype), kOp, "x", "have a float dtype to be reduced or scaled",
           static_cast<int>(p.x[0].dtype));
  return {b, n_out, c};
}

// Scatter targets: inside y, and no two output rows of a sample on the same one (they would race).
void check_targets(const TensorRef& rows, int64_t b, int64_t n_out, int64_t n_target) {
  check_rank(kOp, "rows", rows, 2);
  check_dtype(kOp, "rows", rows, Dtype::i32);
  check_unit_stride(kOp, "rows", rows);
  VK_CHECK(rows.size(0) == 1 || rows.size(0) == b, kOp, "rows", "have 1 or b samples", shape_text(rows));
  check_size(kOp, "rows", rows, 1, n_out);
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

void rows_cpu(const std::vector<TensorRef>& x, TensorRef ptr, TensorRef idx, TensorRef weight, TensorRef bias,
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
  check_size(kOp, "y", y, 2, c);
  if (rows.given)
    check_targets(rows, b, n_out, y.size(1));
  else
    check_size(kOp, "y", y, 1, n_out);
  VK_CHECK(y.dtype == p.x[0].dtype || (is_float(y.dtype) && is_float(p.x[0].dtype)), kOp, "y",
           "have the dtype of x or a float dtype", static_cast<int>(y.dtype));
  if (sum.given) check_rows("sum", sum, b, n_out, c);
  VK_DISPATCH(rearrange_rows, p);
}

void rows_bwd_cpu(const std::vector<TensorRef>& x, TensorRef ptr, TensorRef idx, TensorRef weight, TensorRef bias,
                  TensorRef gate, TensorRef residual, TensorRef norm_weight, TensorRef norm_bias, int reduce, int norm,
                  float scale, float eps, TensorRef dy, TensorRef dsum, TensorRef du, TensorRef dv, TensorRef partial) {
  RearrangeRowsBwdParams q;
  RearrangeRowsParams& p = q.forward;
  set_sources(p, x);
  p.ptr = ptr, p.idx = idx, p.weight = weight, p.bias = bias, p.gate = gate, p.residual = residual;
  p.norm_weight = norm_weight, p.norm_bias = norm_bias;
  p.reduce = reduce, p.norm = norm, p.scale = scale, p.eps = eps;
  q.dy = dy, q.dsum = dsum, q.du = du, q.dv = dv, q.partial = partial;
  check_rank(kOp, "dy", dy, 3);
  const auto [b, n_out, c] = check_forward(q.forward, dy.size(0));
  VK_CHECK(is_float(q.forward.x[0].dtype), kOp, "x", "have a float dtype", static_cast<int>(q.forward.x[0].dtype));
  check_rows("dy", dy, b, n_out, c);
  if (dsum.given) check_rows("dsum", dsum, b, n_out, c);
  check_rows("du", du, b, n_out, c);
  if (dv.given) check_rows("dv", dv, b, n_out, c);
  check_rank(kOp, "partial", partial, 3);
  check_dtype(kOp, "partial", partial, Dtype::f32);
  check_size(kOp, "partial", partial, 1, 4);
  check_size(kOp, "partial", partial, 2, c);
  VK_CHECK(partial.stride(1) == c && partial.stride(2) == 1, kOp, "partial", "be contiguous", shape_text(partial));
  VK_DISPATCH(rearrange_rows_bwd, q);
}

void max_bwd_cpu(TensorRef x, TensorRef ptr, TensorRef idx, TensorRef dy, TensorRef dx) {
  check_rank(kOp, "x", x, 3);
  VK_CHECK(ptr.given, kOp, "ptr", "be given", "nothing");
  const int64_t n_out = check_plan(ptr, idx, {}, x.size(1), x.size(0));
  check_rows("x", x, x.size(0), x.size(1), x.size(2));
  check_rows("dy", dy, x.size(0), n_out, x.size(2));
  check_rows("dx", dx, x.size(0), x.size(1), x.size(2));
  check_dtype(kOp, "dx", dx, Dtype::f32);
  VK_DISPATCH(rearrange_max_bwd, {x, ptr, idx, dy, dx});
}

void affine_cpu(TensorRef x, std::vector<int64_t> axes, std::vector<int64_t> sizes, std::vector<int64_t> steps,
                TensorRef y) {
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
  if (total == 0) return;
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
  VK_DISPATCH(rearrange_affine, p);
}

}  // namespace

void bind_rearrange(py::module_& m) {
  m.def("rearrange_rows", &rows_cpu, release_gil());
  m.def("rearrange_rows_bwd", &rows_bwd_cpu, release_gil());
  m.def("rearrange_max_bwd", &max_bwd_cpu, release_gil());
  m.def("rearrange_affine", &affine_cpu, release_gil());
}

}  // namespace vk
