// What attention refuses whatever the backend; no value of a tensor is looked at.
#pragma once

#include <tuple>
#include <utility>

#include "attention.h"
#include "vkernels/check.h"

namespace vk::attention {

inline constexpr const char* op = "attention";
inline constexpr int64_t kMaxIntervals = 3, kMaxLength = int64_t{1} << 30;

inline void check_contiguous(const char* name, const TensorRef& t) {
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    VK_CHECK(t.size(i) <= 1 || t.numel() == 0 || t.stride(i) == stride, op, name, "be contiguous", shape_text(t));
    stride *= t.size(i);
  }
}

// A mask tensor: p in {1, b}, the sizes that follow, contiguous but for the batch.
inline void check_mask_tensor(const char* name, const TensorRef& t, Dtype dtype, int64_t b,
                              std::vector<int64_t> sizes) {
  check_rank(op, name, t, static_cast<int>(sizes.size()) + 1);
  check_dtype(op, name, t, dtype);
  VK_CHECK(t.size(0) == 1 || t.size(0) == b, op, name, "have batch 1 or b", shape_text(t));
  for (size_t i = 0; i < sizes.size(); ++i) check_size(op, name, t, static_cast<int>(i) + 1, sizes[i]);
  check_contiguous(name, t);
}

// The groups cover every token row exactly once: either stride is 1 and the other steps over it.
inline void check_cover(const char* name, int64_t groups, int64_t length, int64_t group, int64_t token,
                        int64_t tokens) {
  const bool covers =
      groups * length == tokens &&
      (tokens == 0 ||
       ((groups == 1 || length == 1 || (group == 1 && token == groups) || (token == 1 && group == length)) &&
        (length == 1 || groups > 1 || token == 1) && (groups == 1 || length > 1 || group == 1)));
  VK_CHECK(covers, op, name, "cover every token row exactly once", groups * length);
}

inline AttentionMask make_mask(const TensorRef& q, const TensorRef& k, const std::vector<int64_t>& layout,
                               TensorRef q_rows, TensorRef k_rows, TensorRef q_count, TensorRef k_count,
                               TensorRef ranges, TensorRef q_attr, TensorRef k_attr, std::vector<int64_t> bounds,
                               TensorRef q_global, TensorRef k_global) {
  VK_CHECK(layout.size() == 7, op, "layout", "hold 7 numbers", layout.size());
  const AttentionLayout l{layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6]};
  const int64_t b = q.size(0), s_q = q.size(1), s_k = k.size(1);
  VK_CHECK(l.groups >= 0 && l.len_q >= 0 && l.len_k >= 0 && l.groups <= kMaxLength && l.len_q <= kMaxLength &&
               l.len_k <= kMaxLength,
           op, "layout", "hold sizes from 0 to 2^30", l.groups);
  if (q_rows || k_rows)
    VK_CHECK(l.groups == 1 && l.len_q == s_q && l.len_k == s_k, op, "layout", "be one group where rows are mapped",
             l.groups);
  if (!q_rows) check_cover("layout", l.groups, l.len_q, l.q_group, l.q_token, s_q);
  if (!k_rows) check_cover("layout", l.groups, l.len_k, l.k_group, l.k_token, s_k);
  if (q_rows) check_mask_tensor("q_rows", q_rows, Dtype::i32, b, {s_q});
  if (k_rows) check_mask_tensor("k_rows", k_rows, Dtype::i32, b, {s_k});
  VK_CHECK(!q_count || q_rows, op, "q_count", "come with q_rows", "no q_rows");
  VK_CHECK(!k_count || k_rows, op, "k_count", "come with k_rows", "no k_rows");
  if (q_count) check_mask_tensor("q_count", q_count, Dtype::i32, b, {});
  if (k_count) check_mask_tensor("k_count", k_count, Dtype::i32, b, {});
  if (ranges) {
    check_rank(op, "ranges", ranges, 3);
    VK_CHECK(ranges.size(2) % 2 == 0 && ranges.size(2) >= 2 && ranges.size(2) <= 2 * kMaxIntervals, op, "ranges",
             "hold 1 to 3 intervals per query", shape_text(ranges));
    check_mask_tensor("ranges", ranges, Dtype::i32, b, {l.len_q, ranges.size(2)});
  }
  VK_CHECK(bool(q_attr) == bool(k_attr), op, "k_attr", "be given with q_attr", "one of them");
  if (q_attr) {
    check_rank(op, "q_attr", q_attr, 3);
    const int64_t relations = q_attr.size(1);
    VK_CHECK(relations >= 1 && relations <= kMaxRelations && int64_t(bounds.size()) == 2 * relations, op, "bounds",
             "hold a pair per attribute, at most 8", bounds.size());
    for (int64_t x : bounds) VK_CHECK(x >= -kMaxLength && x <= kMaxLength, op, "bounds", "lie within 2^30 of zero", x);
    check_mask_tensor("q_attr", q_attr, Dtype::i32, b, {relations, l.len_q});
    check_mask_tensor("k_attr", k_attr, Dtype::i32, b, {relations, l.len_k});
    if (q_global) check_mask_tensor("q_global", q_global, Dtype::u8, b, {l.len_q});
    if (k_global) check_mask_tensor("k_global", k_global, Dtype::u8, b, {l.len_k});
  }
  return {l, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, std::move(bounds), q_global, k_global};
}

inline void check_inputs(const TensorRef& q, const TensorRef& k, const TensorRef& v, const TensorRef& o,
                         const TensorRef& lse) {
  check_rank(op, "q", q, 4);
  VK_CHECK(q.dtype == Dtype::f32 || q.dtype == Dtype::bf16 || q.dtype == Dtype::f16, op, "q",
           "have dtype float32, bfloat16, float16", static_cast<int>(q.dtype));
  for (const auto& [name, t] : {std::pair{"k", k}, std::pair{"v", v}, std::pair{"o", o}}) {
    check_rank(op, name, t, 4);
    check_dtype(op, name, t, q.dtype);
    check_unit_stride(op, name, t);
  }
  check_unit_stride(op, "q", q);
  for (int i : {0, 3}) check_size(op, "k", k, i, q.size(i));
  for (int i = 0; i < 4; ++i) check_size(op, "v", v, i, k.size(i));
  for (int i = 0; i < 4; ++i) check_size(op, "o", o, i, q.size(i));
  VK_CHECK(q.size(3) >= 1, op, "q", "have a head size of at least 1", shape_text(q));
  VK_CHECK(q.size(1) <= kMaxLength && k.size(1) <= kMaxLength, op, "q", "have at most 2^30 tokens", q.size(1));
  VK_CHECK(k.size(2) > 0 ? q.size(2) % k.size(2) == 0 : q.size(2) == 0, op, "q",
           "have a multiple of the key heads as heads", q.size(2));
  check_contiguous("o", o);
  check_rank(op, "lse", lse, 3);
  check_dtype(op, "lse", lse, Dtype::f32);
  check_size(op, "lse", lse, 0, q.size(0));
  check_size(op, "lse", lse, 1, q.size(2));
  check_size(op, "lse", lse, 2, q.size(1));
  check_contiguous("lse", lse);
}

inline void check_gradients(const TensorRef& q, const TensorRef& k, const TensorRef& lse, const TensorRef& dout,
                            const TensorRef& dlse, const TensorRef& dq, const TensorRef& dk, const TensorRef& dv) {
  for (const auto& [name, t, like] :
       {std::tuple{"dout", dout, q}, std::tuple{"dq", dq, q}, std::tuple{"dk", dk, k}, std::tuple{"dv", dv, k}}) {
    check_rank(op, name, t, 4);
    check_dtype(op, name, t, q.dtype);
    check_unit_stride(op, name, t);
    for (int i = 0; i < 4; ++i) check_size(op, name, t, i, like.size(i));
    if (t.data != dout.data) check_contiguous(name, t);
  }
  if (dlse) {
    check_rank(op, "dlse", dlse, 3);
    check_dtype(op, "dlse", dlse, Dtype::f32);
    for (int i = 0; i < 3; ++i) check_size(op, "dlse", dlse, i, lse.size(i));
  }
}

}  // namespace vk::attention
