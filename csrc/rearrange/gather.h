// Rows of several sources on the GPU: where a row lies, which rows an output row takes, and rows as registers.
//
// A thread holds kVectors times as many neighbouring channels as 16 bytes of the sources have, `lanes` threads hold
// what a block handles of a row. Every row number is checked before it becomes an address: one that names no row reads
// as 0.
#pragma once

#include "vkernels/device/piece.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/warp.h"
#include "vkernels/tensor.h"

namespace vk {
namespace {

using namespace device;

struct RowSource {
  const void* data;
  int64_t first;       // its first row among the rows of all sources
  int64_t b;           // strides over samples and the row axes; 0 over samples that share it
  int64_t s0, s1, s2;  // rows lie on n0 x n1 x n2
  int32_t n1, n2;
};

struct RowPlan {
  static constexpr int kMostSources = 4;
  RowSource x[kMostSources];
  int sources;
  int64_t n_rows, taps, n_out, tasks;  // tasks: rows of all samples
  const int32_t *ptr, *idx;            // ptr null: one tap per row
  const float* weight;                 // null: ones
  int64_t ptr_b, idx_b, weight_b;      // strides over samples
  int64_t c;
  bool max;
  bool loose;                   // rows start at addresses that are no multiple of 16 bytes, or are not whole vectors
  int lanes, row_lanes, parts;  // parts: blocks beside each other that share a row's columns
};

template <class T>
VK_DEVICE const T* row_at(const RowPlan& p, int64_t sample, int32_t number) {
  if (number < 0 || number >= p.n_rows) return nullptr;
  int which = 0;
  while (which + 1 < p.sources && number >= p.x[which + 1].first) ++which;
  const RowSource& x = p.x[which];
  uint32_t row = static_cast<uint32_t>(number - x.first);
  int64_t at = sample * x.b;
  if (x.n2 > 1) at += row % uint32_t(x.n2) * x.s2, row /= uint32_t(x.n2);
  if (x.n1 > 1) at += row % uint32_t(x.n1) * x.s1, row /= uint32_t(x.n1);
  return static_cast<const T*>(x.data) + at + row * x.s0;
}

// Taps first .. last of an output row, inside the taps there are whatever ptr holds.
struct Taps {
  int64_t first, last;
};
VK_DEVICE Taps taps_of(const RowPlan& p, int64_t sample, int64_t row) {
  if (p.ptr == nullptr) return {row, row + 1};
  const int32_t* at = p.ptr + sample * p.ptr_b + row;
  const int64_t begin = load(at), end = load(at + 1);
  const int64_t first = begin < 0 ? 0 : begin < p.taps ? begin : p.taps, last = end < p.taps ? end : p.taps;
  return {first, last > first ? last : first};
}

// Where a thread stands: a task (row of a sample) and its first channel.
struct RowPlace {
  int lane, row_lane;
  int64_t sample, row;
  bool live;
};
VK_DEVICE RowPlace row_place(const RowPlan& p, int64_t task, int64_t end) {
  RowPlace at;
  at.lane = thread_index() % p.lanes, at.row_lane = thread_index() / p.lanes;
  task += at.row_lane;
  at.live = at.row_lane < p.row_lanes && task < end;
  at.sample = at.live ? task / p.n_out : 0;
  at.row = at.live ? task - at.sample * p.n_out : 0;
  return at;
}

template <class T, int kVectorsOfThread>
struct RowTraits {
  using Element = T;
  static constexpr int kWidth = kLanesOf<T>, kVectors = kVectorsOfThread;
  static constexpr int kTaps = kVectors == 1 ? 4 : 1;  // under way at a time
};
// Rows that are held whole: 16 channels a thread.
template <class T>
using WholeRow = RowTraits<T, 16 / kLanesOf<T>>;
template <class Traits>
using RowValues = float[Traits::kVectors][Traits::kWidth];

// First channel of vector k of a thread.
template <class Traits>
VK_DEVICE int64_t channel_of(const RowPlan& p, const RowPlace& at, int k) {
  return ((block_x() % p.parts * Traits::kVectors + k) * p.lanes + at.lane) * Traits::kWidth;
}

template <class T, int kWidth>
VK_DEVICE void load_channels(const RowPlan& p, const T* row, int64_t channel, float (&x)[kWidth]) {
  if (channel >= p.c) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = 0.0f;
  } else if (p.loose) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = channel + i < p.c ? widen_one(load(row + channel + i)) : 0.0f;
  } else if constexpr (sizeof(T) == 4) {
    load_floats(row + channel, x);
  } else {
    widen_piece<T, kWidth>(load_piece<T, kWidth>(row + channel), x);
  }
}

template <class T, int kWidth>
VK_DEVICE void store_channels(const RowPlan& p, T* row, int64_t channel, const float (&x)[kWidth]) {
  if (channel >= p.c) return;
  if (p.loose) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (channel + i < p.c) store(row + channel + i, narrow_one<T>(x[i]));
  } else if constexpr (sizeof(T) == 4) {
    store_floats(row + channel, x);
  } else {
    store_piece<T, kWidth>(row + channel, narrow_piece<T, kWidth>(x));
  }
}

// Rows [b, n, c] of any float type: residual, results, gradients that come in.
struct DenseRows {
  void* data;  // null: absent
  int64_t b, r;
  Dtype dtype;
};

template <class F>
VK_DEVICE void with_row(const DenseRows& x, const RowPlace& at, int64_t row, const F& f) {
  const int64_t offset = at.sample * x.b + row * x.r;
  switch (x.dtype) {
    case Dtype::bf16:
      return f(static_cast<bf16*>(x.data) + offset);
    case Dtype::f16:
      return f(static_cast<f16*>(x.data) + offset);
    default:
      return f(static_cast<float*>(x.data) + offset);
  }
}

// Vector by vector, so that few are held at once. Absent rows change nothing.
template <class Traits>
VK_DEVICE void add_dense(const RowPlan& p, const RowPlace& at, const DenseRows& x, int64_t row, RowValues<Traits>& v) {
  if (x.data == nullptr || !at.live) return;
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k) {
    float more[Traits::kWidth];
    with_row(x, at, row, [&](auto* from) { load_channels(p, from, channel_of<Traits>(p, at, k), more); });
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) v[k][i] += more[i];
  }
}
template <class Traits>
VK_DEVICE void store_dense(const RowPlan& p, const RowPlace& at, const DenseRows& x, int64_t row,
                           const RowValues<Traits>& v) {
  if (x.data == nullptr || !at.live) return;
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
    with_row(x, at, row, [&](auto* to) { store_channels(p, to, channel_of<Traits>(p, at, k), v[k]); });
}

// f(x, vector), channel by channel; null changes nothing.
template <class Traits, class F>
VK_DEVICE void with_channels(const RowPlan& p, const RowPlace& at, const float* vector, RowValues<Traits>& x,
                             const F& f) {
  if (vector == nullptr) return;
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k) {
    float w[Traits::kWidth];
    load_channels(p, vector, channel_of<Traits>(p, at, k), w);
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) f(x[k][i], w[i]);
  }
}

VK_DEVICE float joined(float sum, float x, bool max) { return max ? (x > sum || x != x ? x : sum) : sum + x; }

// Sum (or maximum) of the weighted taps of a row, in the order of the plan. A row without taps is 0.
template <class Traits>
VK_DEVICE void reduce_taps(const RowPlan& p, const RowPlace& at, RowValues<Traits>& v) {
  using T = typename Traits::Element;
  const Taps taps = at.live ? taps_of(p, at.sample, at.row) : Taps{0, 0};
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) v[k][i] = p.max && taps.last > taps.first ? -INFINITY : 0.0f;
  for (int64_t tap = taps.first; tap < taps.last; tap += Traits::kTaps) {
    float weight[Traits::kTaps];
    Vector raw[Traits::kTaps][Traits::kVectors];
#pragma unroll
    for (int j = 0; j < Traits::kTaps; ++j) {
      const bool here = tap + j < taps.last;
      const T* row = here ? row_at<T>(p, at.sample, load(p.idx + at.sample * p.idx_b + tap + j)) : nullptr;
      weight[j] = here && p.weight ? load(p.weight + at.sample * p.weight_b + tap + j) : 1.0f;
#pragma unroll
      for (int k = 0; k < Traits::kVectors; ++k) {
        const int64_t channel = channel_of<Traits>(p, at, k);
        raw[j][k] = {};
        if (row == nullptr || channel >= p.c) continue;
        if (!p.loose) {
          raw[j][k] = load16(row + channel);
        } else {
          T element[Traits::kWidth] = {};
#pragma unroll
          for (int i = 0; i < Traits::kWidth; ++i)
            if (channel + i < p.c) element[i] = load(row + channel + i);
          memcpy(&raw[j][k], element, sizeof(Vector));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Traits::kTaps; ++j) {
      if (tap + j >= taps.last) break;
#pragma unroll
      for (int k = 0; k < Traits::kVectors; ++k) {
        float x[Traits::kWidth];
        widen<T>(raw[j][k], x);
#pragma unroll
        for (int i = 0; i < Traits::kWidth; ++i) v[k][i] = joined(v[k][i], x[i] * weight[j], p.max);
      }
    }
  }
}

// The sum over the threads that hold a row, the same bits in each of them. `scratch`: a float per warp.
VK_DEVICE float sum_over_row(const RowPlan& p, const RowPlace& at, float x, float* scratch) {
  if (p.lanes <= kWarp) return sum_over_group(x, p.lanes);
  x = sum_over_lanes(x);
  if (lane() == 0) store_shared(scratch + warp(), x);
  sync_block();
  x = 0.0f;
  for (int w = 0; w < p.lanes / kWarp; ++w) x += load_shared(scratch + at.row_lane * (p.lanes / kWarp) + w);
  sync_block();  // the scratch is filled again
  return x;
}

struct Statistics {
  float mean, inverse;
};
// Of the channels a row has; root mean square where the norm does not centre.
template <class Traits>
VK_DEVICE Statistics statistics_of(const RowPlan& p, const RowPlace& at, const RowValues<Traits>& u, bool centred,
                                   float eps, float* scratch) {
  Statistics s{0.0f, 0.0f};
  const float c = static_cast<float>(p.c);
  if (centred) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
      for (int i = 0; i < Traits::kWidth; ++i) sum += u[k][i];  // 0 past the last channel
    s.mean = sum_over_row(p, at, sum, scratch) / c;
  }
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) {
      const float apart = u[k][i] - s.mean;
      if (channel_of<Traits>(p, at, k) + i < p.c) squares += apart * apart;
    }
  s.inverse = 1.0f / sqrtf(sum_over_row(p, at, squares, scratch) / c + eps);
  return s;
}

}  // namespace
}  // namespace vk
