// Who sees whom on the device: where tokens lie, which keys a tile of queries walks, which pairs of a product count.
// Whatever index tensors hold, nothing outside a tensor is named.
#pragma once

#include "attention.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/memory.h"
#include "vkernels/device/sync.h"
#include "vkernels/mask.h"

namespace vk::device {

inline constexpr int kFar = 1 << 30;  // no index lies beyond
inline constexpr int kRelations = attention::kMaxRelations;

VK_HD int min_of(int a, int b) { return a < b ? a : b; }
VK_HD int max_of(int a, int b) { return a > b ? a : b; }

// Queries or keys. Indices are in processing order; packed groups lie end to end, otherwise a place knows its group.
struct Side {
  const int32_t *rows, *count;  // row map and live tokens of a sample, or null
  int64_t rows_b, count_b;      // 0 where samples share them
  int64_t group, token;         // strides, in rows
  int tokens, length;           // rows that exist; tokens of a group
  int all;                      // indices of a place
  // Of a mask with a box: a line of `length` for each relation of a sample; which tokens skip it, or null.
  const int32_t* attributes;
  const uint8_t* global;
  int64_t attributes_b, global_b;
};

struct Mask {
  Side q, k;
  bool packed;
  const int32_t* ranges;
  int64_t ranges_b;
  int intervals;  // 1 without ranges: every live key
  int relations;  // of the box: a_k - a_q from bounds[2 a] to bounds[2 a + 1]
  int bounds[2 * kRelations];
};

// Which tile of which head of which group of which sample a block computes.
struct alignas(16) Place {
  int tile, group, head;
  int64_t sample;
  int live_q, live_k;
};

VK_DEVICE int live_tokens(const Side& s, int64_t sample) {
  if (!s.count) return s.all;
  const int count = load(s.count + sample * s.count_b);
  return max_of(0, min_of(count, s.all));
}

VK_DEVICE int token_row(const Side& s, const Mask& m, const Place& at, int i) {
  if (s.rows) {
    const int row = load(s.rows + at.sample * s.rows_b + i);
    return max_of(0, min_of(row, s.tokens - 1));
  }
  const int group = m.packed ? i / s.length : at.group, token = m.packed ? i - group * s.length : i;
  return static_cast<int>(group * s.group + token * s.token);
}

// Half-open key interval `index` of live query i, inside the live keys.
VK_DEVICE KeyRange interval_of(const Mask& m, const Place& at, int i, int index) {
  const int group = m.packed ? i / m.q.length : 0, inner = i - group * m.q.length, base = group * m.k.length;
  KeyRange r{0, m.packed ? m.k.length : at.live_k};
  if (m.ranges) {
    const uint32_t entry = unsigned(inner) * unsigned(m.intervals) + unsigned(index);
    const int32_t* row = m.ranges + at.sample * m.ranges_b + int64_t(entry) * 2;
    r = {max_of(load(row), 0), min_of(load(row + 1), r.end)};
    if (r.begin >= r.end) r = {0, 0};
  }
  return {base + r.begin, base + r.end};
}

// What a tile of queries sees of one interval: keys outside [first, last) meet none of its live queries, keys in
// [core_first, core_last) are seen by all of them. A live query that sees nothing empties the core.
struct alignas(16) Span {
  int first, last, core_first, core_last;
};

VK_DEVICE Span span_of(KeyRange r, bool live) {
  const bool sees = live && r.begin < r.end;
  return {sees ? r.begin : kFar, sees ? r.end : 0, sees ? r.begin : 0, sees ? r.end : live ? 0 : kFar};
}

VK_DEVICE Span joined(const Span& a, const Span& b) {
  return {min_of(a.first, b.first), max_of(a.last, b.last), max_of(a.core_first, b.core_first),
          min_of(a.core_last, b.core_last)};
}

VK_DEVICE Span joined_over_warp(const Span& s) {
  return {min_over_warp(s.first), max_over_warp(s.last), max_over_warp(s.core_first), min_over_warp(s.core_last)};
}

// The keys of one interval in steps of a block: `before` steps that need the mask, `core` that do not, the rest.
struct alignas(16) KeyRun {
  int first, last, before, core;
};

template <int kKeys>
VK_DEVICE int steps_of(const KeyRun& run) {
  return run.first < run.last ? (run.last - run.first + kKeys - 1) / kKeys : 0;
}

template <int kKeys>
VK_DEVICE KeyRun run_of(const Span& s) {
  KeyRun run{s.first, s.last, 0, 0};
  if (s.first >= s.last) return run;
  run.before = min_of((max_of(s.core_first - s.first, 0) + kKeys - 1) / kKeys, steps_of<kKeys>(run));
  run.core = max_of(max_of(min_of(s.core_last, s.last) - s.first, 0) / kKeys - run.before, 0);
  return run;
}

// A block of keys [first, limit) of an interval.
struct KeyBlock {
  int first, limit, interval;
  bool masked;
};

// What step `step` of all runs meets; runs lie in shared memory.
template <int kKeys>
VK_DEVICE KeyBlock key_block(const KeyRun* runs, int step) {
  int index = 0;
  KeyRun run = load_shared(runs);
  while (step >= steps_of<kKeys>(run)) {
    step -= steps_of<kKeys>(run);
    run = load_shared(runs + ++index);
  }
  const bool core = step >= run.before && step < run.before + run.core;
  return {run.first + step * kKeys, run.last, index, !core};
}

// Scores without their bit become -inf.
template <int N>
VK_DEVICE void hide(FragmentC (&s)[N], uint32_t bits, float hidden) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!(bits >> (4 * n + e) & 1u)) s[n].value[e] = hidden;
}

inline int64_t sample_stride(const TensorRef& t) { return !t || t.size(0) == 1 ? 0 : t.stride(0); }

inline void add_box(Side& side, const TensorRef& attributes, const TensorRef& global) {
  side.attributes = attributes.ptr<const int32_t>(), side.attributes_b = sample_stride(attributes);
  side.global = global.ptr<const uint8_t>(), side.global_b = sample_stride(global);
}

inline Side side_on_device(const TensorRef& rows, const TensorRef& count, int64_t group, int64_t token, int64_t tokens,
                           int64_t length) {
  Side side{};
  side.rows = rows.ptr<const int32_t>(), side.rows_b = sample_stride(rows);
  side.count = count.ptr<const int32_t>(), side.count_b = sample_stride(count);
  side.group = group, side.token = token;
  side.tokens = int(tokens), side.length = side.all = int(length);
  return side;
}

// Groups that fit a tile of `tile` tokens more than once are packed: whole groups share it.
inline Mask mask_on_device(const AttentionParams& a, int tile) {
  const AttentionMask& x = a.mask;
  const AttentionLayout& l = x.layout;
  Mask m{};
  m.q = side_on_device(x.q_rows, x.q_count, l.q_group, l.q_token, a.q.size(1), l.len_q);
  m.k = side_on_device(x.k_rows, x.k_count, l.k_group, l.k_token, a.k.size(1), l.len_k);
  const int64_t longest = l.len_q > l.len_k ? l.len_q : l.len_k;
  m.packed = l.groups > 1 && l.len_q > 0 && l.len_k > 0 && 2 * longest <= tile;
  if (m.packed) m.q.all = int(l.groups * l.len_q), m.k.all = int(l.groups * l.len_k);
  m.ranges = x.ranges.ptr<const int32_t>();
  m.ranges_b = sample_stride(x.ranges);
  m.intervals = x.ranges ? int(x.ranges.size(2) / 2) : 1;
  add_box(m.q, x.q_attr, x.q_global);
  add_box(m.k, x.k_attr, x.k_global);
  m.relations = x.q_attr ? int(x.q_attr.size(1)) : 0;
  for (int i = 0; i < 2 * m.relations; ++i) m.bounds[i] = int(x.bounds[i]);
  return m;
}

}  // namespace vk::device
