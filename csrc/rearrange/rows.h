// Shared by the forward and the backward of rearrange: where an input row lies, how rows are loaded, stored, reduced.
// Include only from *_cpu.cpp files.
#pragma once

#include "pieces.h"
#include "rearrange.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace {

constexpr int64_t kCacheBytes = 24 << 20;  // outputs larger than this bypass the caches

VK_INLINE int element_bytes(Dtype t) {
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

// Input rows of all sources, numbered one after the other.
struct Rows {
  int64_t first[RearrangeRowsParams::kMaxSources + 1];
  const TensorRef* x;

  explicit Rows(const RearrangeRowsParams& p) : x(p.x) {
    first[0] = 0;
    for (int s = 0; s < p.sources; ++s) {
      int64_t rows = 1;
      for (int d = 1; d + 1 < x[s].rank; ++d) rows *= x[s].size(d);
      first[s + 1] = first[s] + rows;
    }
  }
  const char* at(int64_t batch, int64_t row) const {
    int s = 0;
    while (row >= first[s + 1]) ++s;
    const TensorRef& t = x[s];
    row -= first[s];
    int64_t offset = t.size(0) == 1 ? 0 : batch * t.stride(0);
    for (int d = t.rank - 2; d > 1; --d) {
      offset += row % t.size(d) * t.stride(d);
      row /= t.size(d);
    }
    offset += row * t.stride(1);
    return t.ptr<const char>() + offset * element_bytes(t.dtype);
  }
};

template <class F>
VK_INLINE void with_type(Dtype t, const F& body) {
  switch (t) {
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::f16:
      return body(f16{});
    default:
      return body(float{});
  }
}

template <class T>
VK_INLINE void load_row(const T* x, float* v, int64_t c) {
  for (int64_t i = 0; i < c; i += kLanes) store(v + i, load(x + i, c - i), c - i);
}
VK_INLINE void load_row(const TensorRef& t, int64_t i0, int64_t i1, float* v) {
  with_type(t.dtype, [&](auto type) {
    using T = decltype(type);
    load_row(t.ptr<const T>() + (t.size(0) == 1 ? 0 : i0 * t.stride(0)) + i1 * t.stride(1), v, t.size(2));
  });
}
template <class T>
VK_INLINE void store_row(T* y, const float* v, int64_t c, bool stream) {
  int64_t i = 0;
  if (stream)
    for (; i + kLanes <= c; i += kLanes) store_streaming(y + i, load(v + i));
  for (; i < c; i += kLanes) store(y + i, load(v + i, c - i), c - i);
}
VK_INLINE void store_row(const TensorRef& t, int64_t i0, int64_t i1, const float* v, bool stream) {
  with_type(t.dtype, [&](auto type) {
    using T = decltype(type);
    store_row(t.ptr<T>() + i0 * t.stride(0) + i1 * t.stride(1), v, t.size(2), stream);
  });
}

VK_INLINE void prefetch(const char* p) {
#if defined(__x86_64__)
  _mm_prefetch(p, _MM_HINT_T0);
#endif
}

// Moves one row while the lines of the next one are fetched.
VK_INLINE void copy_row(char* y, const char* x, int64_t bytes, [[maybe_unused]] bool stream,
                        [[maybe_unused]] const char* next) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (stream && (reinterpret_cast<uintptr_t>(y) & 63) == 0) {
    for (; i + 64 <= bytes; i += 64) {
      if (next) prefetch(next + i);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i), _mm512_loadu_si512(x + i));
    }
  } else {
    for (; i + 64 <= bytes; i += 64) {
      if (next) prefetch(next + i);
      _mm512_storeu_si512(y + i, _mm512_loadu_si512(x + i));
    }
  }
#elif defined(__AVX2__)
  if (stream && (reinterpret_cast<uintptr_t>(y) & 31) == 0)
    for (; i + 32 <= bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(y + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
#endif
  memcpy(y + i, x + i, static_cast<size_t>(bytes - i));
}

struct Taps {
  const int32_t* idx;
  const float* weight;  // null: ones
  int64_t count;
};
VK_INLINE Taps taps_of(const RearrangeRowsParams& p, int64_t batch, int64_t row) {
  const int64_t i = p.idx.size(0) == 1 ? 0 : batch;
  const int32_t* idx = p.idx.ptr<const int32_t>() + i * p.idx.stride(0);
  const float* weight = p.weight.given ? p.weight.ptr<const float>() + i * p.weight.stride(0) : nullptr;
  int64_t begin = row, end = row + 1;
  if (p.ptr.given) {
    const int32_t* ptr = p.ptr.ptr<const int32_t>() + i * p.ptr.stride(0) + row;
    begin = ptr[0];
    end = ptr[1];
  } else if (idx[row] < 0) {
    end = begin;
  }
  return {idx + begin, weight ? weight + begin : nullptr, end - begin};
}

VK_INLINE f32v joined(f32v acc, f32v value, int reduce) {
  return reduce == 1 ? (value > acc || value != value ? value : acc) : acc + value;
}

// v = sum (or max) of the taps, in float, while the first row of the next task is fetched. Blocks of kBlock vectors
// keep the accumulators in registers.
template <class T>
VK_INLINE void reduce_taps(const Rows& rows, int64_t batch, const Taps& t, int reduce, float* v, int64_t c,
                           const char* next = nullptr) {
  if (t.count == 0) {
    for (int64_t i = 0; i < c; ++i) v[i] = 0.0f;
    return;
  }
  constexpr int kBlock = 4;
  constexpr int64_t kBatch = 8;  // taps whose addresses are resolved at once
  for (int64_t k0 = 0; k0 < t.count; k0 += kBatch) {
    const T* x[kBatch];
    float w[kBatch];
    const int n = static_cast<int>(t.count - k0 < kBatch ? t.count - k0 : kBatch);
    for (int k = 0; k < n; ++k) {
      x[k] = reinterpret_cast<const T*>(rows.at(batch, t.idx[k0 + k]));
      w[k] = t.weight ? t.weight[k0 + k] : 1.0f;
    }
    int64_t i = 0;
    for (; i + kBlock * kLanes <= c; i += kBlock * kLanes) {
      f32v acc[kBlock];
      for (int j = 0; j < kBlock; ++j) acc[j] = k0 > 0 ? load(v + i + j * kLanes) : load(x[0] + i + j * kLanes) * w[0];
      for (int k = k0 > 0 ? 0 : 1; k < n; ++k)
        for (int j = 0; j < kBlock; ++j) acc[j] = joined(acc[j], load(x[k] + i + j * kLanes) * w[k], reduce);
      for (int j = 0; j < kBlock; ++j) store(v + i + j * kLanes, acc[j]);
      if (next) {
        for (int64_t byte = 0; byte < int64_t(sizeof(T)) * kBlock * kLanes; byte += 64)
          prefetch(next + i * int64_t(sizeof(T)) + byte);
      }
    }
    for (; i < c; i += kLanes) {
      const int64_t left = c - i;
      f32v acc = k0 > 0 ? load(v + i, left) : load(x[0] + i, left) * w[0];
      for (int k = k0 > 0 ? 0 : 1; k < n; ++k) acc = joined(acc, load(x[k] + i, left) * w[k], reduce);
      store(v + i, acc, left);
    }
  }
}

// The first input row of a task, or null.
VK_INLINE const char* first_row(const RearrangeRowsParams& p, const Rows& rows, int64_t batch, int64_t row) {
  const Taps t = taps_of(p, batch, row);
  return t.count > 0 ? rows.at(batch, t.idx[0]) : nullptr;
}

// u = residual + scale * gate * (v + bias), in place.
VK_INLINE void add_scale(const RearrangeRowsParams& p, const float* residual, float* v, int64_t c) {
  const float* bias = p.bias.given ? p.bias.ptr<const float>() : nullptr;
  const float* gate = p.gate.given ? p.gate.ptr<const float>() : nullptr;
  for (int64_t i = 0; i < c; i += kLanes) {
    const int64_t n = c - i;
    f32v u = load(v + i, n);
    if (bias) u = u + load(bias + i, n);
    if (gate) u = u * load(gate + i, n);
    u = u * p.scale;
    if (residual) u = u + load(residual + i, n);
    store(v + i, u, n);
  }
}

struct Stats {
  float mean, rstd;
};
// Two passes over a row that lies in L1; four accumulators hide the adder's latency.
VK_INLINE Stats stats_of(const float* u, int64_t c, int norm, float eps) {
  constexpr int kChains = 4;
  float mean = 0.0f;
  if (norm == 1) {
    f32v total[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= c; i += kChains * kLanes)
      for (int j = 0; j < kChains; ++j) total[j] = total[j] + load(u + i + j * kLanes);
    for (; i < c; i += kLanes) total[0] = total[0] + load(u + i, c - i);
    mean = reduce_add((total[0] + total[1]) + (total[2] + total[3])) / static_cast<float>(c);
  }
  f32v square[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= c; i += kChains * kLanes)
    for (int j = 0; j < kChains; ++j) {
      const f32v d = load(u + i + j * kLanes) - mean;
      square[j] = square[j] + d * d;
    }
  float tail = 0.0f;
  for (; i < c; ++i) tail += (u[i] - mean) * (u[i] - mean);
  const float variance = (reduce_add((square[0] + square[1]) + (square[2] + square[3])) + tail) / static_cast<float>(c);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

// y = (u - mean) * rstd * weight + bias, straight from scratch to the output.
template <class T>
VK_INLINE void store_normed(T* y, const float* u, const Stats& s, const float* weight, const float* bias, int64_t c,
                            bool stream) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) {
    f32v v = (load(u + i) - s.mean) * s.rstd;
    if (weight) v = v * load(weight + i);
    if (bias) v = v + load(bias + i);
    if (stream)
      store_streaming(y + i, v);
    else
      store(y + i, v);
  }
  if (i < c) {
    f32v v = (load(u + i, c - i) - s.mean) * s.rstd;
    if (weight) v = v * load(weight + i, c - i);
    if (bias) v = v + load(bias + i, c - i);
    store(y + i, v, c - i);
  }
}

}  // namespace
}  // namespace vk::VK_ISA
