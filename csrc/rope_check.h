// Refusals shared by the ops that rotate: after these, native code may index with what it was given. Values are looked
// at on the CPU only; a CUDA kernel leaves alone the pairs whose axis is not there.
#pragma once

#include <cmath>

#include "bind.h"
#include "vkernels/rope.h"

namespace vk {

inline void check_positions(const char* op, const TensorRef& pos) {
  constexpr double limit = 2147483648.0;
  for (int64_t a = 0; a < pos.size(0); ++a)
    for (int64_t b = 0; b < pos.size(1); ++b)
      for (int64_t s = 0; s < pos.size(2); ++s) {
        const int64_t at = a * pos.stride(0) + b * pos.stride(1) + s * pos.stride(2);
        double p = 0;
        switch (pos.dtype) {
          case Dtype::i32:
            continue;
          case Dtype::i64:
            p = static_cast<double>(pos.ptr<const int64_t>()[at]);
            break;
          case Dtype::f32:
            p = pos.ptr<const float>()[at];
            break;
          default:
            p = pos.ptr<const double>()[at];
        }
        VK_CHECK(p > -limit && p < limit, op, "pos", "be finite and below 2^31 in magnitude", p);
      }
}

// What does not depend on values: b x s rows of heads of size d.
inline void check_rope_shapes(const char* op, const RopeArgs& r, int64_t b, int64_t s, int64_t d) {
  if (r.cos.given) {
    for (const auto& [name, table] : {std::pair{"cos", r.cos}, std::pair{"sin", r.sin}}) {
      check_rank(op, name, table, r.apart() ? 4 : 3);
      check_dtype(op, name, table, Dtype::f32);
      check_unit_stride(op, name, table);
      VK_CHECK(table.size(0) == 1 || table.size(0) == b, op, name, "have b or 1 rows of tables", shape_text(table));
      check_size(op, name, table, 1, s);
      check_size(op, name, table, table.rank - 1, r.pairs());
      if (r.apart()) check_size(op, name, table, 2, 2);
    }
    VK_CHECK(!r.apart() || r.blocks == 0, op, "layout", "pair neighbours where each has an angle of its own", r.blocks);
  } else {
    check_rank(op, "pos", r.pos, 3);
    check_rank(op, "axis", r.axis, 2);
    check_rank(op, "freq", r.freq, 1);
    check_dtype(op, "axis", r.axis, Dtype::i32);
    check_dtype(op, "freq", r.freq, Dtype::i64);
    check_unit_stride(op, "axis", r.axis);
    check_unit_stride(op, "freq", r.freq);
    check_size(op, "axis", r.axis, 1, r.freq.size(0));
    VK_CHECK(r.axis.size(0) >= 1, op, "axis", "have a row", shape_text(r.axis));
    VK_CHECK(r.pos.size(0) <= 4, op, "pos", "have at most 4 axes", shape_text(r.pos));
    VK_CHECK(r.pos.size(1) == 1 || r.pos.size(1) == b, op, "pos", "have b or 1 rows", shape_text(r.pos));
    check_size(op, "pos", r.pos, 2, s);
    VK_CHECK(r.pos.dtype == Dtype::i32 || r.pos.dtype == Dtype::i64 || r.pos.dtype == Dtype::f32 ||
                 r.pos.dtype == Dtype::f64,
             op, "pos", "be int32, int64, float32 or float64", static_cast<int>(r.pos.dtype));
  }
  VK_CHECK(r.pairs() <= kMaxPairs, op, "freq", "have at most 1024 pairs", r.pairs());
  VK_CHECK(r.offset >= 0 && r.offset + 2 * r.pairs() <= d, op, "offset", "leave the rotary part inside the head",
           r.offset);
  VK_CHECK(r.blocks >= 0 && r.blocks <= kMaxPairs && (r.blocks == 0 || r.pairs() % r.blocks == 0), op, "layout",
           "divide the pairs into equal blocks", r.blocks);
}

inline void check_rope(const char* op, const RopeArgs& r, int64_t b, int64_t s, int64_t d) {
  check_rope_shapes(op, r, b, s, d);
  if (r.cos.given) return;
  for (int64_t h = 0; h < r.axis.size(0); ++h)
    for (int64_t j = 0; j < r.axis.size(1); ++j) {
      const int32_t a = r.axis.ptr<const int32_t>()[h * r.axis.stride(0) + j];
      VK_CHECK(a >= -1 && a < r.pos.size(0), op, "axis", "name an axis of pos", a);
    }
  check_positions(op, r.pos);
}

}  // namespace vk
