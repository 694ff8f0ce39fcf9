// Gradients of one attention problem in one pass, no atomics: bit-equal from run to run.
//
//   P = exp2(c S - lse2)    dP = dO V^T    dS = P (dP - delta)    delta = rowsum(dO O) - dlse
//   dQ += dS K              dK += dS^T Q   dV += P^T dO
//
// A block of kBlock queries meets a slab of kBackSlab keys: strip by strip S and dP, from them P and dS, and at once
// dQ; then, with the block's P and dS still in L2, dK and dV with keys as the rows of the product. dQ of a block and
// dK, dV of a chunk of keys are float in scratch until they are complete.
#pragma once

#include "vkernels/cpu/attention_core.h"

namespace vk::VK_ISA {

template <class T>
struct AttentionGradients {
  const T* dout = nullptr;      // laid out like o, strides below
  const float* dlse = nullptr;  // laid out like lse; null: zero
  T* dq = nullptr;
  T* dk = nullptr;
  T* dv = nullptr;
  int64_t dout_token = 0, dout_head = 0, dlse_token = 1, dlse_head = 0, dq_token = 0, dq_head = 0;
  int64_t dk_token = 0, dv_token = 0;
};

inline constexpr int kBlock = 64;
inline constexpr int64_t kBackSlab = 128;
inline constexpr int64_t kBackRow = kBackSlab + 16;
inline constexpr int64_t kBackChunkBytes = 4 << 20;

// Sums of products of two rows.
template <class T>
VK_INLINE float dot(const T* a, const T* b, int64_t d) {
  f32v sum{};
  for (int64_t j = 0; j < d; j += kLanes) sum += load(a + j, d - j) * load(b + j, d - j);
  return reduce_add(sum);
}

// What every interval of a strip leaves of one slab.
enum class Sight { none, part, all };

template <int kRows>
VK_INLINE Sight sight(const StripRanges<kRows>* ranges, int intervals, const BoxRows& box, const BoxStrip<kRows>& strip,
                      const BoxChunk& keys, int64_t from, int64_t to) {
  bool any = false, all = false;
  for (int r = 0; r < intervals; ++r) {
    any |= ranges[r].min_begin < to && ranges[r].max_end > from;
    all |= ranges[r].max_begin <= from && ranges[r].min_end >= to;
  }
  if (!any || !box.relations) return !any ? Sight::none : all ? Sight::all : Sight::part;
  for (int64_t panel = from / kPanel; panel * kPanel < to; ++panel)
    if (strip.sees(box, keys, panel)) return Sight::part;
  return Sight::none;
}

// Gradients from queries [q_begin, q_end) and keys [k_begin, k_end): of the queries if `want_q`, of the keys and values
// if `want_kv`. Whoever is wanted must be given every partner it sees. Uses scratch slot 0.
template <class Products, class T>
static void attention_backward(const AttentionProblem<T>& p, const AttentionGradients<T>& g, int64_t q_begin,
                               int64_t q_end, int64_t k_begin, int64_t k_end, bool want_q, bool want_kv) {
  constexpr bool kPairs = Products::kPairs;
  constexpr int kUnit = kPairs ? 2 : 1;
  constexpr int kRows = Products::kRows, kStrips = kBlock / kRows;
  const int64_t d = p.d, d_words = round_up(words<kPairs>(d), Products::kStepUnit), d_pad = round_up(d, kLanes),
                d_panels = round_up(d, kPanel);
  const int64_t key_bytes = 4 * (2 * d_words + d_panels / kUnit + 2 * d_pad);
  int64_t chunk = kBackChunkBytes / key_bytes / kBackSlab * kBackSlab;
  chunk = chunk < kBackSlab ? kBackSlab : chunk;
  const int64_t whole = round_up(k_end - k_begin, kPanel);
  chunk = chunk < whole ? chunk : whole;
  const int64_t blocks = (q_end - q_begin + kBlock - 1) / kBlock;
  const int64_t states = chunk < whole ? blocks * p.heads : 1;
  const int64_t row_panel = kBlock / kUnit * kPanel;

  float *k_columns, *v_columns, *k_rows, *dk, *dv, *q_strips, *do_strips, *q_rows, *do_rows, *s, *dp, *probability,
      *dscore, *dscore_row, *turned, *dq_all, *lse2, *delta;
  KeyRange* spans;
  BoxChunk keys;
  const auto take = [&](Arena arena) {
    k_columns = arena.take<float>(chunk * d_words);
    v_columns = arena.take<float>(chunk * d_words);
    k_rows = arena.take<float>(chunk / kUnit * d_panels);
    dk = arena.take<float>(chunk * d_pad);
    dv = arena.take<float>(chunk * d_pad);
    q_strips = arena.take<float>(kBlock * d_words);
    do_strips = arena.take<float>(kBlock * d_words);
    q_rows = arena.take<float>(kBlock / kUnit * d_panels);
    do_rows = arena.take<float>(kBlock / kUnit * d_panels);
    s = arena.take<float>(kRows * kBackRow);
    dp = arena.take<float>(kRows * kBackRow);
    probability = arena.take<float>(kBlock / kUnit * kBackRow);
    dscore = arena.take<float>(kBlock / kUnit * kBackRow);
    dscore_row = arena.take<float>(kRows * kBackRow / kUnit);
    turned = arena.take<float>(Products::kTurned ? kBackSlab * kBlock / kUnit : 0);
    dq_all = arena.take<float>(states * kBlock * d_pad);
    lse2 = arena.take<float>(kBlock);
    delta = arena.take<float>(kBlock);
    if (p.box.relations) keys.take(arena, p.box.relations, chunk);
    spans = arena.take<KeyRange>(blocks);
    return arena.used;
  };
  Arena arena;
  arena.base = static_cast<char*>(scratch(0, take(arena)));
  take(arena);

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = q_begin + block * kBlock;
    spans[block] = key_span(p, row, row + kBlock < q_end ? row + kBlock : q_end);
  }
  const Scale scale(p.scale);
  const int intervals = p.ranges ? p.intervals : 1;
  StripRanges<kRows> ranges[kStrips][kMaxIntervals];
  BoxStrip<kRows> strip_box[kStrips];
  Sight sights[kStrips];
  int64_t begin = k_begin;
  do {
    const int64_t end = begin + chunk < k_end ? begin + chunk : k_end;
    const int64_t padded = round_up(end - begin, kPanel), k_panel = padded / kUnit * kPanel;
    const bool first = begin == k_begin, last = end == k_end;
    const auto k_row = [&](int64_t i) { return p.k + p.k_rows[begin + i] * p.k_token; };
    const auto v_row = [&](int64_t i) { return p.v + p.k_rows[begin + i] * p.v_token; };
    pack_columns<kPairs>(k_row, end - begin, d, d_words, k_columns);
    pack_columns<kPairs>(v_row, end - begin, d, d_words, v_columns);
    if (want_q) pack_rows<kPairs>(k_row, end - begin, padded, d, k_rows, k_panel);
    if (want_kv) memset(dk, 0, sizeof(float) * static_cast<size_t>(padded * d_pad));
    if (want_kv) memset(dv, 0, sizeof(float) * static_cast<size_t>(padded * d_pad));
    if (p.box.relations && end > begin) keys.load(p.box, begin, end);

    const bool ends = want_q && (first || last);  // gradients of queries begin, or are complete
    for (int64_t block = 0; block < blocks; ++block) {
      if (!ends && (spans[block].begin >= end || spans[block].end <= begin)) continue;
      const int64_t row = q_begin + block * kBlock, rows = q_end - row < kBlock ? q_end - row : kBlock;
      const int strips = static_cast<int>((rows + kRows - 1) / kRows);
      const int64_t block_rows = round_up(rows, kRows);
      int64_t seen_begin = padded, seen_end = 0;
      for (int t = 0; t < strips; ++t) {
        const int64_t at = row + t * kRows, count = q_end - at < kRows ? q_end - at : kRows;
        for (int r = 0; r < intervals; ++r) {
          const StripRanges<kRows>& range = ranges[t][r] =
              strip_ranges<kRows>(p, at, count, r, static_cast<int32_t>(begin), static_cast<int32_t>(end));
          if (range.max_end <= range.min_begin) continue;
          seen_begin = range.min_begin < seen_begin ? range.min_begin : seen_begin;
          seen_end = range.max_end > seen_end ? range.max_end : seen_end;
        }
        if (p.box.relations) strip_box[t].load(p.box, at, count);
      }
      seen_begin = seen_begin / kPanel * kPanel;
      seen_end = round_up(seen_end, kPanel);
      if (seen_begin >= seen_end && !ends) continue;

      for (int64_t head = 0; head < p.heads; ++head) {
        float* dq = dq_all + (states > 1 ? block * p.heads + head : 0) * kBlock * d_pad;
        if (first && want_q) memset(dq, 0, sizeof(float) * static_cast<size_t>(kBlock * d_pad));
        const T *q = p.q + head * p.q_head, *dout = g.dout + head * g.dout_head, *o = p.o + head * p.o_head;
        for (int t = 0; t < strips && seen_begin < seen_end; ++t) {
          const int64_t at = row + t * kRows, count = q_end - at < kRows ? q_end - at : kRows;
          pack_strip<kPairs, kRows>(q, p.q_token, p.q_rows, at, count, d, d_words, scale.sign,
                                    q_strips + t * kRows * d_words);
          pack_strip<kPairs, kRows>(dout, g.dout_token, p.q_rows, at, count, d, d_words, 1.0f,
                                    do_strips + t * kRows * d_words);
          for (int i = 0; i < kRows; ++i) {
            const int64_t token = p.q_rows[i < count ? at + i : at];
            const float lse = i < count ? p.lse[head * p.lse_head + token] : -kInf;
            const bool sees = lse != -kInf;
            lse2[t * kRows + i] = sees ? lse * kLog2e : kInf;  // +inf makes every probability of the row 0
            delta[t * kRows + i] = sees ? dot(dout + token * g.dout_token, o + token * p.o_token, d) -
                                              (g.dlse ? g.dlse[head * g.dlse_head + token * g.dlse_token] : 0.0f)
                                        : 0.0f;
          }
        }
        if (want_kv) {
          pack_rows<kPairs>([&](int64_t i) { return q + p.q_rows[row + i] * p.q_token; }, rows, block_rows, d, q_rows,
                            row_panel);
          pack_rows<kPairs>([&](int64_t i) { return dout + p.q_rows[row + i] * g.dout_token; }, rows, block_rows, d,
                            do_rows, row_panel);
        }

        for (int64_t from = seen_begin; from < seen_end; from += kBackSlab) {
          const int64_t to = from + kBackSlab < seen_end ? from + kBackSlab : seen_end, count = to - from;
          int low = strips, high = 0;  // strips that see some of the slab
          for (int t = 0; t < strips; ++t) {
            sights[t] = sight(ranges[t], intervals, p.box, strip_box[t], keys, from, to);
            if (sights[t] == Sight::none) continue;
            low = t < low ? t : low;
            high = t + 1;
          }
          for (int t = low; t < high; ++t) {
            float* p_block = probability + t * kRows / kUnit * kBackRow;
            float* ds_block = dscore + t * kRows / kUnit * kBackRow;
            if (sights[t] == Sight::none) {
              memset(p_block, 0, sizeof(float) * kRows / kUnit * kBackRow);
              memset(ds_block, 0, sizeof(float) * kRows / kUnit * kBackRow);
              continue;
            }
            Products::product(q_strips + t * kRows * d_words, d_words, k_columns + from * d_words, kPanel * d_words,
                              d_words, s, kBackRow, count, false);
            Products::product(do_strips + t * kRows * d_words, d_words, v_columns + from * d_words, kPanel * d_words,
                              d_words, dp, kBackRow, count, false);
            if (sights[t] == Sight::part)
              for (int i = 0; i < kRows; ++i)
                for (int64_t j = 0; j < count; j += kLanes)
                  store(s + i * kBackRow + j, masked(load(s + i * kBackRow + j), ranges[t], intervals, p.box,
                                                     strip_box[t], keys, i, from + j));
            for (int i = 0; i < kRows; i += kUnit) {
              const f32v shift = splat(lse2[t * kRows + i]), offset = splat(delta[t * kRows + i]);
              for (int64_t j = 0; j < count; j += kLanes) {
                const int64_t at = i * kBackRow + j;
                const f32v p0 = power_of_two<kPairs>(load(s + at) * scale.c - shift);
                const f32v ds0 = p0 * (load(dp + at) - offset);
                if constexpr (kPairs) {
                  const int64_t at1 = at + kBackRow;
                  const f32v p1 = power_of_two<kPairs>(load(s + at1) * scale.c - lse2[t * kRows + i + 1]);
                  const f32v ds1 = p1 * (load(dp + at1) - delta[t * kRows + i + 1]);
                  store(p_block + i / 2 * kBackRow + j, interleave(p0, p1));
                  store(ds_block + i / 2 * kBackRow + j, interleave(ds0, ds1));
                  store(reinterpret_cast<bf16*>(dscore_row) + at, ds0);
                  store(reinterpret_cast<bf16*>(dscore_row) + at1, ds1);
                } else {
                  store(p_block + at, p0);
                  store(ds_block + at, ds0);
                }
              }
            }
            if (want_q)
              Products::product(kPairs ? dscore_row : ds_block, kBackRow / kUnit, k_rows + from / kUnit * kPanel,
                                k_panel, count / kUnit, dq + t * kRows * d_pad, d_pad, d, true);
          }
          if (!want_kv || low >= high) continue;
          const int64_t q_from = low * kRows / kUnit, q_steps = (high - low) * kRows / kUnit;
          Products::product_turned(dscore + q_from * kBackRow, kBackRow, count, q_rows + q_from * kPanel, row_panel,
                                   q_steps, dk + from * d_pad, d_pad, d, turned);
          Products::product_turned(probability + q_from * kBackRow, kBackRow, count, do_rows + q_from * kPanel,
                                   row_panel, q_steps, dv + from * d_pad, d_pad, d, turned);
        }
        for (int64_t i = 0; want_q && last && i < rows; ++i) {
          T* to = g.dq + head * g.dq_head + p.q_rows[row + i] * g.dq_token;
          for (int64_t j = 0; j < d; j += kLanes) store(to + j, load(dq + i * d_pad + j) * p.scale, d - j);
        }
      }
    }
    for (int64_t i = 0; want_kv && i < end - begin; ++i) {
      const int64_t token = p.k_rows[begin + i];
      for (int64_t j = 0; j < d; j += kLanes) {
        store(g.dk + token * g.dk_token + j, load(dk + i * d_pad + j) * p.scale, d - j);
        store(g.dv + token * g.dv_token + j, load(dv + i * d_pad + j), d - j);
      }
    }
    begin = end;
  } while (begin < k_end);
}

}  // namespace vk::VK_ISA
