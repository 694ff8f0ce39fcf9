// What every backend refuses of a KVCache's storage; no value of a tensor is looked at.
#pragma once

#include <utility>

#include "vkernels/kv_cache.h"

namespace vk {

inline void check_storage(const char* op, const char* name, const TensorRef& t, Dtype dtype,
                          const std::vector<int64_t>& sizes) {
  check_rank(op, name, t, static_cast<int>(sizes.size()));
  check_dtype(op, name, t, dtype);
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    check_size(op, name, t, i, sizes[static_cast<size_t>(i)]);
    VK_CHECK(t.numel() == 0 || t.size(i) == 1 || t.stride(i) == stride, op, name, "be contiguous", shape_text(t));
    stride *= t.size(i);
  }
}

inline CacheRef checked_cache_shapes(const char* op, const TensorRef& length, const TensorRef& table,
                                     const std::vector<TensorRef>& storage, const std::vector<int64_t>& layout,
                                     int64_t b, int64_t m, int64_t d) {
  VK_CHECK(storage.size() == 10, op, "storage", "hold 10 tensors", storage.size());
  VK_CHECK(layout.size() == 6, op, "layout", "hold 6 numbers", layout.size());
  for (const int64_t x : layout) VK_CHECK(x >= 0 && x < int64_t{1} << 31, op, "layout", "hold numbers below 2^31", x);
  CacheRef c{};
  c.k_rows = storage[0], c.v_rows = storage[1], c.k_codes = storage[2], c.k_scale = storage[3];
  c.v_codes = storage[4], c.v_scale = storage[5], c.k_recent = storage[6], c.v_recent = storage[7];
  c.k_sink = storage[8], c.v_sink = storage[9];
  c.layout = {layout[0], layout[1], layout[2], layout[3], layout[4], layout[5]};
  c.b = b, c.m = m, c.d = d;
  const CacheLayout& l = c.layout;
  VK_CHECK(l.bits == 0 || l.bits == 2 || l.bits == 4 || l.bits == 8, op, "bits", "be 0, 2, 4 or 8", l.bits);
  const bool group_fits = l.bits ? l.group == 32 || l.group == 64 || l.group == 128 : l.group == 1;
  VK_CHECK(group_fits, op, "group", "be 32, 64 or 128, or 1 at full precision", l.group);
  VK_CHECK(l.residual % l.group == 0 && (l.bits || l.residual == 0), op, "residual", "be a multiple of group",
           l.residual);
  VK_CHECK(l.page > 0 && l.page % l.group == 0, op, "page", "be a positive multiple of group", l.page);
  VK_CHECK(l.ring % l.group == 0, op, "ring", "be a multiple of group", l.ring);
  VK_CHECK(d > 0 && d <= 256 && m > 0, op, "k", "have heads of size 1 to 256", d);

  check_rank(op, "length", length, 1);
  check_rank(op, "table", table, 2);
  for (const auto& [name, t] : {std::pair{"length", length}, std::pair{"table", table}}) {
    check_dtype(op, name, t, Dtype::i32);
    check_size(op, name, t, 0, b);
    check_unit_stride(op, name, t);
  }
  VK_CHECK(table.numel() == 0 || table.size(0) == 1 || table.stride(0) == table.size(1), op, "table", "be contiguous",
           shape_text(table));
  c.length = length.ptr<const int32_t>();
  c.table = table.ptr<const int32_t>();
  c.table_pages = table.size(1);

  const TensorRef& pool = l.bits ? c.k_codes : c.k_rows;
  VK_CHECK(pool.given && pool.rank >= 1, op, l.bits ? "k_codes" : "k_rows", "be given", "nothing");
  const int64_t pages = pool.size(0);
  if (l.bits) {
    const int64_t groups = l.page / l.group;
    check_storage(op, "k_codes", c.k_codes, Dtype::i32, {pages, m, groups, code_words(d, l.bits), l.group});
    check_storage(op, "v_codes", c.v_codes, Dtype::i32, {pages, m, groups, code_words(l.group, l.bits), c.d_pad()});
    check_storage(op, "k_scale", c.k_scale, Dtype::f16, {pages, m, groups, 2, d});
    check_storage(op, "v_scale", c.v_scale, Dtype::f16, {pages, m, groups, 2, c.channel_groups(), l.group});
    c.dtype = c.k_recent.dtype;
    check_storage(op, "k_recent", c.k_recent, c.dtype, {b, m, l.residual + l.group, d});
    check_storage(op, "v_recent", c.v_recent, c.dtype, {b, m, l.residual + l.group, d});
  } else {
    c.dtype = c.k_rows.dtype;
    check_storage(op, "k_rows", c.k_rows, c.dtype, {pages, m, l.page, d});
    check_storage(op, "v_rows", c.v_rows, c.dtype, {pages, m, l.page, d});
  }
  const bool is_float = c.dtype == Dtype::f32 || c.dtype == Dtype::bf16 || c.dtype == Dtype::f16;
  VK_CHECK(is_float, op, "cache", "hold float32, bfloat16 or float16", static_cast<int>(c.dtype));
  if (l.sinks) {
    check_storage(op, "k_sink", c.k_sink, c.dtype, {b, m, l.sinks, d});
    check_storage(op, "v_sink", c.v_sink, c.dtype, {b, m, l.sinks, d});
  }
  VK_CHECK(l.ring <= c.table_pages * l.page, op, "ring", "fit the pages of the table", l.ring);
  return c;
}

}  // namespace vk
