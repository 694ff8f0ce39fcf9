// Forward of rearrange over rows. One task is a range of output rows; a row is gathered into float scratch that stays
// in L1, goes through bias, gate, residual and norm there, and leaves once. A plain move never leaves its own dtype.
#include "rows.h"

namespace vk::VK_ISA {
namespace {

bool has_epilogue(const RearrangeRowsParams& p) {
  return p.bias.given || p.gate.given || p.residual.given || p.norm != 0 || p.scale != 1.0f || p.sum.given ||
         p.accumulate;
}

// Where output row r of a sample goes, or -1.
VK_INLINE int64_t target(const RearrangeRowsParams& p, int64_t batch, int64_t row) {
  if (!p.rows.given) return row;
  return p.rows.ptr<const int32_t>()[(p.rows.size(0) == 1 ? 0 : batch) * p.rows.stride(0) + row];
}

void move_rows(const RearrangeRowsParams& p, int64_t b, int64_t n_out) {
  const Rows rows(p);
  const int64_t bytes = p.y.size(2) * element_bytes(p.y.dtype);
  const bool stream = b * n_out * bytes > kCacheBytes;
  parallel_for(0, b * n_out, kGrainBytes / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / n_out, row = task % n_out;
      const int64_t to = target(p, batch, row);
      if (to < 0) continue;
      char* y = p.y.ptr<char>() + (batch * p.y.stride(0) + to * p.y.stride(1)) * element_bytes(p.y.dtype);
      const Taps taps = taps_of(p, batch, row);
      if (taps.count == 0) {
        memset(y, 0, static_cast<size_t>(bytes));
        continue;
      }
      const char* next = task + 1 < end ? first_row(p, rows, (task + 1) / n_out, (task + 1) % n_out) : nullptr;
      copy_row(y, rows.at(batch, taps.idx[0]), bytes, stream, next);
    }
    if (stream) streaming_fence();
  });
}

template <class T>
void reduce_rows(const RearrangeRowsParams& p, int64_t b, int64_t n_out) {
  const Rows rows(p);
  const int64_t c = p.y.size(2);
  const bool epilogue = has_epilogue(p);
  const bool stream = b * n_out * c * element_bytes(p.y.dtype) > kCacheBytes && !p.accumulate;
  const int64_t padded = (c + kLanes - 1) / kLanes * kLanes;
  const float* norm_weight = p.norm_weight.given ? p.norm_weight.ptr<const float>() : nullptr;
  const float* norm_bias = p.norm_bias.given ? p.norm_bias.ptr<const float>() : nullptr;
  parallel_for(0, b * n_out, kGrainBytes / (4 * c + 1) + 1, [&](int64_t begin, int64_t end) {
    float* v = static_cast<float*>(scratch(0, static_cast<size_t>(padded) * 8));
    float* extra = v + padded;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / n_out, row = task % n_out;
      const int64_t to = target(p, batch, row);
      if (to < 0 && !p.sum.given) continue;
      const char* next = task + 1 < end ? first_row(p, rows, (task + 1) / n_out, (task + 1) % n_out) : nullptr;
      reduce_taps<T>(rows, batch, taps_of(p, batch, row), p.reduce, v, c, next);
      if (epilogue) {
        if (p.residual.given) load_row(p.residual, batch, row, extra);
        add_scale(p, p.residual.given ? extra : nullptr, v, c);
        if (p.sum.given) store_row(p.sum, batch, row, v, stream);
        if (p.norm) {
          const Stats s = stats_of(v, c, p.norm, p.eps);
          if (to >= 0 && !p.accumulate) {
            with_type(p.y.dtype, [&](auto type) {
              using Y = decltype(type);
              Y* y = p.y.ptr<Y>() + batch * p.y.stride(0) + to * p.y.stride(1);
              store_normed(y, v, s, norm_weight, norm_bias, c, stream);
            });
            continue;
          }
          store_normed(v, v, s, norm_weight, norm_bias, c, false);
        }
        if (p.accumulate && to >= 0) {
          load_row(p.y, batch, to, extra);
          for (int64_t i = 0; i < c; ++i) v[i] += extra[i];
        }
      }
      if (to >= 0) store_row(p.y, batch, to, v, stream);
    }
    if (stream) streaming_fence();
  });
}

}  // namespace

void rearrange_rows(const RearrangeRowsParams& p) {
  const int64_t b = p.y.size(0);
  const int64_t n_out = p.ptr.given ? p.ptr.size(1) - 1 : p.idx.size(1);
  if (b == 0 || n_out == 0 || p.y.size(2) == 0) return;
  if (!p.ptr.given && !p.weight.given && !has_epilogue(p) && p.x[0].dtype == p.y.dtype) return move_rows(p, b, n_out);
  with_type(p.x[0].dtype, [&](auto type) { reduce_rows<decltype(type)>(p, b, n_out); });
}

}  // namespace vk::VK_ISA
