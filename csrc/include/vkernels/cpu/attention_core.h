// softmax(q k^T scale) v for one problem: the query heads that share one key/value head, over one group of tokens.
// Include only from *_cpu.cpp files.
//
//                 keys of a chunk, packed once: kPanel columns at a time
//                +--------+--------+--------+----
//   kStrip rows  |   S    |   S    |   S    |  ...   S strip of up to kSlab keys stays in L1, then
//   of queries   +--------+--------+--------+----    max, exp2, sum, and acc += P V; online over slabs
//
// Only panels that some row of the strip can see are visited; only slabs that some row sees in part are compared.
#pragma once

#include "vkernels/cpu/products.h"
#include "vkernels/mask.h"

namespace vk::VK_ISA {

// Token row of index i in processing order: a stride, or a map.
struct Rows {
  const int32_t* map = nullptr;
  int64_t base = 0, step = 1;
  int64_t operator[](int64_t i) const { return map ? map[i] : base + i * step; }
};

// A finer predicate on top of the ranges: every relation holds, or one of the two is global. Null: none.
struct BoxRows {
  int relations = 0;
  const int32_t* q_attr = nullptr;  // [relation][len_q], relations `q_stride` apart
  const int32_t* k_attr = nullptr;
  int64_t q_stride = 0, k_stride = 0;
  const int64_t* bounds = nullptr;  // [relation] (lo, hi)
  const uint8_t* q_global = nullptr;
  const uint8_t* k_global = nullptr;
};

template <class T>
struct AttentionProblem {
  const T* q = nullptr;  // first query head of the group, token row 0; so are the others
  const T* k = nullptr;
  const T* v = nullptr;
  T* o = nullptr;
  float* lse = nullptr;      // natural log, token stride 1; may be null
  float* first_o = nullptr;  // query 0 of the first head leaves here, as it was summed; the next head's d further on
  int64_t q_token = 0, k_token = 0, v_token = 0, o_token = 0;  // elements from one token row to the next
  int64_t q_head = 0, o_head = 0, lse_head = 0;                // and from one query head to the next
  int64_t heads = 1;                                           // query heads that share k and v
  int64_t d = 0;
  Rows q_rows, k_rows;
  int64_t len_q = 0, len_k = 0;
  float scale = 1;
  const int32_t* ranges = nullptr;  // [len_q][2 * intervals] key intervals; null: every query sees every key
  int64_t range_row = 0;
  int intervals = 1;
  BoxRows box;
};

inline constexpr int kMaxIntervals = 3;
inline constexpr int64_t kChunkBytes = 512 << 10;
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x for x <= 127. Relative error 1e-7, or 1e-4 with kCoarse, which serves where only its rounding to bf16 is used.
template <bool kCoarse>
VK_INLINE f32v power_of_two(f32v x) {
#if defined(__AVX512F__)
  const f32v f = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  f32v p;
  if constexpr (kCoarse) {
    p = splat(7.802451946e-02f);
    p = p * f + 2.260671785e-01f;
    p = p * f + 6.958335221e-01f;
    p = p * f + 9.999252214e-01f;
  } else {
    p = splat(1.877576639e-03f);
    p = p * f + 8.989340472e-03f;
    p = p * f + 5.582631742e-02f;
    p = p * f + 2.401536174e-01f;
    p = p * f + 6.931530731e-01f;
    p = p * f + 9.999999251e-01f;
  }
  return (f32v)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return exp2(x);
#endif
}

// Bump allocation out of one scratch slot: sizes first (base null), then addresses.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class U>
  U* take(int64_t count) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return p;
  }
};

// Keys that queries [begin, end) can see at all, over every interval.
template <class T>
VK_INLINE KeyRange key_span(const AttentionProblem<T>& p, int64_t begin, int64_t end) {
  const int32_t len_k = static_cast<int32_t>(p.len_k);
  if (!p.ranges) return {0, len_k};
  KeyRange span{len_k, 0};
  for (int64_t i = begin; i < end; ++i)
    for (int r = 0; r < p.intervals; ++r) {
      const KeyRange range = key_range(p.ranges + i * p.range_row, r, len_k);
      if (range.begin == range.end) continue;
      span.begin = range.begin < span.begin ? range.begin : span.begin;
      span.end = range.end > span.end ? range.end : span.end;
    }
  return span.end > span.begin ? span : KeyRange{0, 0};
}

// What the rows of a strip see of a chunk through one interval: keys relative to the chunk.
template <int kRows>
struct StripRanges {
  int32_t begin[kRows], end[kRows];
  int32_t min_begin, max_begin, min_end, max_end;
};

template <int kRows, class T>
VK_INLINE StripRanges<kRows> strip_ranges(const AttentionProblem<T>& p, int64_t row, int64_t rows, int interval,
                                          int32_t chunk_begin, int32_t chunk_end) {
  StripRanges<kRows> s;
  s.min_begin = s.min_end = chunk_end - chunk_begin;
  s.max_begin = s.max_end = 0;
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = row + (i < rows ? i : rows - 1);
    KeyRange r = key_range(p.ranges ? p.ranges + at * p.range_row : nullptr, interval, static_cast<int32_t>(p.len_k));
    r.begin = (r.begin > chunk_begin ? r.begin : chunk_begin) - chunk_begin;
    r.end = (r.end < chunk_end ? r.end : chunk_end) - chunk_begin;
    if (r.end <= r.begin) r = {0, 0};
    s.begin[i] = r.begin;
    s.end[i] = r.end;
    if (r.end > r.begin && r.begin < s.min_begin) s.min_begin = r.begin;
    if (r.begin > s.max_begin) s.max_begin = r.begin;
    if (r.end < s.min_end) s.min_end = r.end;
    if (r.end > s.max_end) s.max_end = r.end;
  }
  return s;
}

// Attributes of a chunk's keys, padded to whole panels, with the box around each panel.
struct BoxChunk {
  int32_t* attr = nullptr;     // [relation][kPanel * panels]
  int32_t* global = nullptr;   // [kPanel * panels], all bits or none
  KeyRange* around = nullptr;  // [relation][panels], inclusive
  uint8_t* any_global = nullptr;
  int64_t padded = 0, panels = 0;

  void take(Arena& arena, int relations, int64_t capacity) {
    attr = arena.take<int32_t>(relations * capacity);
    global = arena.take<int32_t>(capacity);
    around = arena.take<KeyRange>(relations * (capacity / kPanel));
    any_global = arena.take<uint8_t>(capacity / kPanel);
  }
  void load(const BoxRows& box, int64_t begin, int64_t end) {
    padded = round_up(end - begin, kPanel);
    panels = padded / kPanel;
    for (int a = 0; a < box.relations; ++a)
      for (int64_t panel = 0; panel < panels; ++panel) {
        KeyRange bounds{INT32_MAX, INT32_MIN};
        for (int64_t i = panel * kPanel; i < (panel + 1) * kPanel; ++i) {
          const int64_t key = begin + i < end ? begin + i : end - 1;
          const int32_t x = box.k_attr[a * box.k_stride + key];
          attr[a * padded + i] = x;
          if (x < bounds.begin) bounds.begin = x;
          if (x > bounds.end) bounds.end = x;
        }
        around[a * panels + panel] = bounds;
      }
    for (int64_t panel = 0; panel < panels; ++panel) {
      any_global[panel] = 0;
      for (int64_t i = panel * kPanel; i < (panel + 1) * kPanel; ++i) {
        const bool set = box.k_global && begin + i < end && box.k_global[begin + i];
        global[i] = set ? -1 : 0;
        any_global[panel] |= set;
      }
    }
  }
};

// The attributes of a strip's queries and the box around them.
inline constexpr int kMaxRelations = 8;
template <int kRows>
struct BoxStrip {
  int32_t attr[kMaxRelations][kRows];
  int32_t global[kRows];
  KeyRange around[kMaxRelations];
  bool any_global;

  void load(const BoxRows& box, int64_t row, int64_t rows) {
    any_global = false;
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = row + (i < rows ? i : rows - 1);
      global[i] = box.q_global && box.q_global[at] ? -1 : 0;
      any_global |= global[i] != 0;
      for (int a = 0; a < box.relations; ++a) {
        const int32_t x = attr[a][i] = box.q_attr[a * box.q_stride + at];
        if (i == 0 || x < around[a].begin) around[a].begin = x;
        if (i == 0 || x > around[a].end) around[a].end = x;
      }
    }
  }
  bool sees(const BoxRows& box, const BoxChunk& keys, int64_t panel) const {
    if (any_global || keys.any_global[panel]) return true;
    for (int a = 0; a < box.relations; ++a)
      if (!may_relate(around[a], keys.around[a * keys.panels + panel], static_cast<int32_t>(box.bounds[2 * a]),
                      static_cast<int32_t>(box.bounds[2 * a + 1])))
        return false;
    return true;
  }
};

// visit(begin, end) for every slab of panels the strip can see through one interval.
template <int kRows, class Visit>
VK_INLINE void for_each_slab(const StripRanges<kRows>& s, const BoxRows& box, const BoxStrip<kRows>& strip,
                             const BoxChunk& keys, int64_t slab, const Visit& visit) {
  if (s.max_end <= s.min_begin) return;
  const int64_t end = round_up(s.max_end, kPanel);
  int64_t at = s.min_begin / kPanel * kPanel;
  while (at < end) {
    int64_t stop = at + slab < end ? at + slab : end;
    if (box.relations) {
      if (!strip.sees(box, keys, at / kPanel)) {
        at += kPanel;
        continue;
      }
      int64_t seen = at + kPanel;
      while (seen < stop && strip.sees(box, keys, seen / kPanel)) seen += kPanel;
      stop = seen;
    }
    visit(at, stop);
    at = stop;
  }
}

// -inf where row i of the strip does not see key `at` + lane through any of the intervals.
template <int kRows>
VK_INLINE f32v masked(f32v score, const StripRanges<kRows>* ranges, int intervals, const BoxRows& box,
                      const BoxStrip<kRows>& strip, const BoxChunk& keys, int i, int64_t at) {
  const i32v key = iota() + static_cast<int32_t>(at);
  i32v visible{};
  for (int r = 0; r < intervals; ++r) visible |= (key >= ranges[r].begin[i]) & (key < ranges[r].end[i]);
  if (box.relations) {
    i32v inside = i32v{} - 1;
    for (int a = 0; a < box.relations; ++a) {
      i32v x;
      memcpy(&x, keys.attr + a * keys.padded + at, sizeof x);
      x -= strip.attr[a][i];
      inside &= (x >= static_cast<int32_t>(box.bounds[2 * a])) & (x <= static_cast<int32_t>(box.bounds[2 * a + 1]));
    }
    i32v global;
    memcpy(&global, keys.global + at, sizeof global);
    visible &= inside | global | strip.global[i];
  }
  return visible ? score : splat(-kInf);
}

// Sign and magnitude apart, so that a masked score stays -inf whatever the scale: s = sign * q.k, exponent = c * s.
struct Scale {
  float sign, c;
  explicit Scale(float scale)
      : sign(scale > 0   ? 1.0f
             : scale < 0 ? -1.0f
                         : 0.0f),
        c(scale == 0 ? 1.0f : std::fabs(scale) * kLog2e) {}
};

// One strip's rows as `width` words, zeros past `rows` and past d.
template <bool kPairs, int kRows, class T>
VK_INLINE void pack_strip(const T* x, int64_t token, const Rows& map, int64_t row, int64_t rows, int64_t d,
                          int64_t width, float sign, float* out) {
  using Element = std::conditional_t<kPairs, T, float>;
  const int64_t count = width * (kPairs ? 2 : 1);
  for (int i = 0; i < kRows; ++i) {
    const T* from = i < rows ? x + map[row + i] * token : nullptr;
    Element* to = reinterpret_cast<Element*>(out + i * width);
    for (int64_t at = 0; at < count; at += kLanes)
      store(to + at, from && at < d ? load(from + at, d - at) * sign : f32v{}, count - at);
  }
}

// One slab of a strip: p = exp2(c s - c max), old sums and accumulators rescaled to the new maximum.
template <bool kPairs>
VK_INLINE void softmax_row(float* s, void* p, int64_t keys, float c, float& row_max, float& row_sum, float* acc,
                           int64_t d_pad) {
  f32v top = load(s), top2 = load(s + kLanes);
  for (int64_t j = kPanel; j < keys; j += kPanel) {
    top = max(top, load(s + j));
    top2 = max(top2, load(s + j + kLanes));
  }
  const float block_max = reduce_max(max(top, top2));
  if (block_max > row_max) {
    if (row_max > -kInf) {
      const float alpha = power_of_two<false>(splat((row_max - block_max) * c))[0];
      row_sum *= alpha;
      for (int64_t j = 0; j < d_pad; j += kLanes) store(acc + j, load(acc + j) * alpha);
    }
    row_max = block_max;
  }
  const f32v shift = splat(row_max > -kInf ? row_max * c : 0.0f);
  f32v sum{}, sum2{};
  for (int64_t j = 0; j < keys; j += kPanel) {
    const f32v a = power_of_two<false>(load(s + j) * c - shift);
    const f32v b = power_of_two<false>(load(s + j + kLanes) * c - shift);
    sum += a;
    sum2 += b;
    if constexpr (kPairs) {
      store(static_cast<bf16*>(p) + j, a);
      store(static_cast<bf16*>(p) + j + kLanes, b);
    } else {
      store(static_cast<float*>(p) + j, a);
      store(static_cast<float*>(p) + j + kLanes, b);
    }
  }
  row_sum += reduce_add(sum + sum2);
}

// Queries [q_begin, q_end) of every head of the problem, in processing order. Uses scratch slot 0.
template <class Products, class T>
static void attention_forward(const AttentionProblem<T>& p, int64_t q_begin, int64_t q_end) {
  constexpr bool kPairs = Products::kPairs;
  constexpr int kUnit = kPairs ? 2 : 1;  // elements per word
  constexpr int kRows = Products::kRows;
  constexpr int64_t kSlab = Products::kSlab, kSlabRow = kSlab + 16;  // rows not a multiple of 4 KiB apart
  const int64_t d = p.d, q_words = round_up(words<kPairs>(d), Products::kStepUnit), d_pad = round_up(d, kLanes),
                d_panels = round_up(d, kPanel);
  const KeyRange span = key_span(p, q_begin, q_end);
  const int64_t key_bytes = 4 * (q_words + d_panels / kUnit);
  int64_t chunk = kChunkBytes / key_bytes / kSlab * kSlab;
  chunk = chunk < kSlab ? kSlab : chunk;
  const int64_t whole = round_up(span.end - span.begin, kPanel);
  chunk = chunk < whole ? chunk : whole;
  const int64_t strips = (q_end - q_begin + kRows - 1) / kRows;
  const int64_t states = chunk < whole ? strips * p.heads : 1;  // one chunk: a strip is finished before the next

  float *k_panels, *v_panels, *q_strip, *s_strip, *p_strip, *acc_all, *max_all, *sum_all;
  KeyRange* spans;
  BoxChunk keys;
  const auto take = [&](Arena arena) {
    k_panels = arena.take<float>(chunk * q_words);
    v_panels = arena.take<float>(chunk / kUnit * d_panels);
    q_strip = arena.take<float>(kRows * q_words);
    s_strip = arena.take<float>(kRows * kSlabRow);
    p_strip = kPairs ? arena.take<float>(kRows * kSlabRow / 2) : s_strip;
    acc_all = arena.take<float>(states * kRows * d_pad);
    max_all = arena.take<float>(states * kRows);
    sum_all = arena.take<float>(states * kRows);
    spans = arena.take<KeyRange>(strips);
    if (p.box.relations) keys.take(arena, p.box.relations, chunk);
    return arena.used;
  };
  Arena arena;
  arena.base = static_cast<char*>(scratch(0, take(arena)));
  take(arena);

  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t row = q_begin + strip * kRows;
    spans[strip] = key_span(p, row, row + kRows < q_end ? row + kRows : q_end);
  }
  const Scale scale(p.scale);
  BoxStrip<kRows> strip_box;
  int64_t begin = span.begin;
  do {
    const int64_t end = begin + chunk < span.end ? begin + chunk : span.end;
    const int64_t padded = round_up(end - begin, kPanel), v_panel = padded / kUnit * kPanel;
    const bool first = begin == span.begin, last = end == span.end;
    pack_columns<kPairs>([&](int64_t i) { return p.k + p.k_rows[begin + i] * p.k_token; }, end - begin, d, q_words,
                         k_panels);
    pack_rows<kPairs>([&](int64_t i) { return p.v + p.k_rows[begin + i] * p.v_token; }, end - begin, padded, d,
                      v_panels, v_panel);
    if (p.box.relations && end > begin) keys.load(p.box, begin, end);

    for (int64_t strip = 0; strip < strips; ++strip) {
      // A chunk is not for the strips that see none of it: with a narrow mask, almost all.
      const bool sees_chunk = spans[strip].begin < end && spans[strip].end > begin;
      if (!sees_chunk && !first && !last) continue;
      const int64_t row = q_begin + strip * kRows, rows = q_end - row < kRows ? q_end - row : kRows;
      StripRanges<kRows> ranges[kMaxIntervals];
      const int intervals = p.ranges ? p.intervals : 1;
      for (int r = 0; r < intervals; ++r)
        ranges[r] = strip_ranges<kRows>(p, row, rows, r, static_cast<int32_t>(begin), static_cast<int32_t>(end));
      if (p.box.relations) strip_box.load(p.box, row, rows);

      for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t state = states > 1 ? strip * p.heads + head : 0;
        float* acc = acc_all + state * kRows * d_pad;
        float *row_max = max_all + state * kRows, *row_sum = sum_all + state * kRows;
        if (first) {
          memset(acc, 0, sizeof(float) * kRows * static_cast<size_t>(d_pad));
          for (int i = 0; i < kRows; ++i) row_max[i] = -kInf, row_sum[i] = 0;
        }
        pack_strip<kPairs, kRows>(p.q + head * p.q_head, p.q_token, p.q_rows, row, rows, d, q_words, scale.sign,
                                  q_strip);
        for (int r = 0; r < intervals; ++r) {
          const StripRanges<kRows>& range = ranges[r];
          for_each_slab(range, p.box, strip_box, keys, kSlab, [&](int64_t from, int64_t to) {
            Products::product(q_strip, q_words, k_panels + from * q_words, kPanel * q_words, q_words, s_strip, kSlabRow,
                              to - from, false);
            if (p.box.relations || from < range.max_begin || to > range.min_end)
              for (int i = 0; i < rows; ++i)
                for (int64_t j = 0; j < to - from; j += kLanes)
                  store(s_strip + i * kSlabRow + j,
                        masked(load(s_strip + i * kSlabRow + j), &range, 1, p.box, strip_box, keys, i, from + j));
            for (int i = 0; i < rows; ++i)
              softmax_row<kPairs>(s_strip + i * kSlabRow, p_strip + i * kSlabRow / kUnit, to - from, scale.c,
                                  row_max[i], row_sum[i], acc + i * d_pad, d_pad);
            Products::product(p_strip, kSlabRow / kUnit, v_panels + from / kUnit * kPanel, v_panel, (to - from) / kUnit,
                              acc, d_pad, d, true);
          });
        }
        if (!last) continue;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t token = p.q_rows[row + i];
          const bool sees = row_sum[i] > 0 || row_sum[i] != row_sum[i];
          const float inverse = sees ? 1.0f / row_sum[i] : 0.0f;
          const auto leave = [&](auto* o) {
            for (int64_t j = 0; j < d; j += kLanes) store(o + j, load(acc + i * d_pad + j) * inverse, d - j);
          };
          if (p.first_o && row + i == 0)
            leave(p.first_o + head * d);
          else
            leave(p.o + head * p.o_head + token * p.o_token);
          if (p.lse)
            p.lse[head * p.lse_head + token] = sees ? row_max[i] * scale.c * kLn2 + std::log(row_sum[i]) : -kInf;
        }
      }
    }
    begin = end;
  } while (begin < span.end);
}

}  // namespace vk::VK_ISA
