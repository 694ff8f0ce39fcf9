// Nothing but q, k and v is saved. The first kernel walks the keys twice, for each query's normaliser and sum of p * dp
// and for dq; what it leaves of them the second one reads, for dk and dv.
#pragma once

#include "tiled_turn_cuda.h"

namespace vk {
namespace {

VK_DEVICE int64_t stats_row(const Tiled& p, const Block& b, int head) {
  return (int64_t(b.sequence) * p.n + head) * (p.where.length + p.cls);
}

// Normaliser and sum of p * dp of a lane's two rows, each lane over the columns it has seen; no word between lanes
// until all have passed.
struct Seen {
  float top[2] = {kNothing, kNothing}, total[2] = {0, 0}, mixed[2] = {0, 0};
};

template <int N>
VK_DEVICE void see(Seen& row, const FragmentC (&s)[N], const FragmentC (&dp)[N], float scale, int live) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = row.top[half];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i)
      if (8 * (i / 2) + s[i / 2].column(lane(), i % 2) < live) top = fmaxf(top, s[i / 2].value[2 * half + i % 2]);
    const float base = base_of(top, scale), keep = exp2_fast(row.top[half] * scale - base);
    row.top[half] = top;
    row.total[half] *= keep;
    row.mixed[half] *= keep;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const bool seen = 8 * (i / 2) + s[i / 2].column(lane(), i % 2) < live;
      const int at = 2 * half + i % 2;
      const float weight = seen ? exp2_fast(fmaf(s[i / 2].value[at], scale, -base)) : 0.0f;
      row.total[half] += weight;
      row.mixed[half] += weight * dp[i / 2].value[at];
    }
  }
}

// What the four lanes of a row have seen together.
VK_DEVICE Stats together(const Seen& row, int half, float scale) {
  const float top = max_over_lanes<4>(row.top[half]), base = base_of(top, scale);
  const float keep = exp2_fast(row.top[half] * scale - base);
  const float total = sum_over_lanes<4>(row.total[half] * keep), mixed = sum_over_lanes<4>(row.mixed[half] * keep);
  return {base + log2_fast(total), mixed / total};
}

// The rows of a block are queries of one head: their dq and their stats.
template <bool kInRegisters, class Traits>
VK_DEVICE void as_queries(const Tiled& p, const Block& b, const Room<Traits, 2>& room, int head) {
  using T = typename Traits::T;
  const auto kv = others<T>(b, p.k, p.v, quotient(head, p.per_key));
  const auto stage_of = [&](int i) { return p.tiles > 1 ? i % 2 : 0; };
  const auto comes = [&](int i) {  // in the second walk, too, unless all tiles stay
    return i < p.tiles || (p.tiles > 2 && i < 2 * p.tiles);
  };
  const auto start = [&](int i) {
    if (comes(i)) copy_others(p, b, room, stage_of(i), i < p.tiles ? i : i - p.tiles, kv);
    commit_copies();
  };
  copy_held<Traits>(p, b, rows_in(room, 0), p.q, head);
  copy_held<Traits>(p, b, rows_in(room, 1), p.o, head);
  commit_copies();
  start(0);
  turn_held(p, b, room);

  Held<Traits, kInRegisters> q, g;
  Seen row;
  float cls_s[2], cls_dp[2], lse[2], delta[2];
  Sums<Traits> dq{};
  for (int i = 0; i < 2 * p.tiles; ++i) {
    const int stage = stage_of(i), tile = i < p.tiles ? i : i - p.tiles;
    const int live = live_rows(p, tile);
    const auto k = others_in(room, stage, 0), v = others_in(room, stage, 1);
    start(i + 1);
    wait_for_copies<1>();
    sync_block();
    if (comes(i)) turn_others(p, b, room, stage, tile);
    if (i == 0) {
      hold(q, rows_in(room, 0));
      hold(g, rows_in(room, 1));
      if (p.cls) {  // a key more, seen by one lane of four
        multiply_row(cls_s, q, cls_in(room, stage, 0));
        multiply_row(cls_dp, g, cls_in(room, stage, 1));
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (lane() % 4 == 0) row.top[half] = cls_s[half], row.total[half] = 1, row.mixed[half] = cls_dp[half];
      }
    }
    if (i == p.tiles) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Stats all = together(row, half, p.scale_log2);
        lse[half] = all.lse;
        delta[half] = all.delta;
      }
      if (p.cls) {
        float ds[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ds[half] = exp2_fast(fmaf(cls_s[half], p.scale_log2, -lse[half])) * (cls_dp[half] - delta[half]);
        mix_row<Traits>(dq, ds, cls_in(room, stage, 0));
      }
    }
#pragma unroll 1
    for (int from = 0; from < live; from += 16) {
      FragmentC s[2], dp[2];
      multiply_rows(s, p, q, sixteen<Traits>(k, from));
      multiply_rows(dp, p, g, sixteen<Traits>(v, from));
      if (i < p.tiles) {
        see(row, s, dp, p.scale_log2, live - from);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float weight = exp2_fast(fmaf(s[j].value[e], p.scale_log2, -lse[e / 2]));
          const bool seen = from + 8 * j + s[j].column(lane(), e) < live;
          dp[j].value[e] = seen ? weight * (dp[j].value[e] - delta[e / 2]) : 0.0f;
        }
      mix_rows<Traits>(dq, p, as_operand<T>(dp[0], dp[1]), sixteen<Traits>(k, from));
    }
    sync_block();  // the stage is filled again next
  }

  const int cls = cls_half(p, b);
  float factor[2];
  Stats* stats = p.stats + stats_row(p, b, head) + b.first;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // the CLS's gradient is that of a mean
    const float share = 1.0f / float(half == cls ? p.where.outer : 1);
    factor[half] = share * p.scale;
    const int at = lane() / 4 + 8 * half;
    if (lane() % 4 == 0 && b.first + at < p.where.length + p.cls)
      store(stats + at, Stats{lse[half], delta[half] * share});
  }
  if (p.angles)
    store_turned(p, b, dq, p.scale, room, p.dq, head);
  else
    store_sums<Traits>(p, b, dq, factor, rows_in(room, 0), p.dq, head, part_of(p, b, p.part, p.n, head));
}

// Weights and ds of 16 keys (rows) and 8 queries (columns), in place of scores and dp. Queries from `live` on see
// nothing.
VK_DEVICE void weigh(FragmentC& s, FragmentC& dp, const Stats* stats, int live, float scale) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = s.column(lane(), e);
    const Stats of = query < live ? load(stats + query) : Stats{-kNothing, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& weight = s.value[2 * half + e];
      weight = exp2_fast(fmaf(weight, scale, -of.lse));
      dp.value[2 * half + e] = weight * (dp.value[2 * half + e] - of.delta);
    }
  }
}

// The rows of a block are keys: their dk and dv from all heads they serve.
template <class Traits>
VK_DEVICE void as_keys(const Tiled& p, const Block& b, const Room<Traits, 2>& room) {
  using T = typename Traits::T;
  const int per_key = int(p.per_key.divisor), end = (b.head + 1) * per_key;
  const auto start = [&](int stage, int head, int tile) {
    if (head < end) copy_others(p, b, room, stage, tile, others<T>(b, p.q, p.o, head));
    commit_copies();
  };
  copy_held<Traits>(p, b, rows_in(room, 0), p.k, b.head);
  copy_held<Traits>(p, b, rows_in(room, 1), p.v, b.head);
  commit_copies();
  start(0, end - per_key, 0);
  turn_held(p, b, room);

  const Held<Traits, false> k{rows_in(room, 0), {}}, v{rows_in(room, 1), {}};  // registers are for the sums
  Sums<Traits> dk{}, dv{};
  for (int stage = 0, head = end - per_key, tile = 0; head < end; stage ^= 1) {
    const int live = live_rows(p, tile);
    const auto q = others_in(room, stage, 0), g = others_in(room, stage, 1);
    const Stats* stats = p.stats + stats_row(p, b, head);
    const int next_head = tile + 1 < p.tiles ? head : head + 1, next_tile = tile + 1 < p.tiles ? tile + 1 : 0;
    start(stage ^ 1, next_head, next_tile);
    wait_for_copies<1>();
    sync_block();
    turn_others(p, b, room, stage, tile);
    if (p.cls && tile == 0) {  // a query more, whose output is a mean
      float weight[2], ds[2];
      const Stats of = load(stats + p.where.length);
      const float share = 1.0f / float(p.where.outer);
      multiply_row(weight, k, cls_in(room, stage, 0));
      multiply_row(ds, v, cls_in(room, stage, 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[half] = exp2_fast(fmaf(weight[half], p.scale_log2, -of.lse));
        ds[half] = weight[half] * (ds[half] * share - of.delta);
        weight[half] *= share;
      }
      mix_row<Traits>(dk, ds, cls_in(room, stage, 0));
      mix_row<Traits>(dv, weight, cls_in(room, stage, 1));
    }
#pragma unroll 1
    for (int from = 0; from < live; from += 16) {
      FragmentC s[2], dp[2];
      multiply_rows(s, p, k, sixteen<Traits>(q, from));
      multiply_rows(dp, p, v, sixteen<Traits>(g, from));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int first = from + 8 * j;
        weigh(s[j], dp[j], stats + tile * p.tile_rows + first, live - first, p.scale_log2);
      }
      mix_rows<Traits>(dv, p, as_operand<T>(s[0], s[1]), sixteen<Traits>(g, from));
      mix_rows<Traits>(dk, p, as_operand<T>(dp[0], dp[1]), sixteen<Traits>(q, from));
    }
    sync_block();  // the stage is filled again next
    head = next_head;
    tile = next_tile;
  }
  const float scale[2] = {p.scale, p.scale}, one[2] = {1, 1};
  if (p.angles)
    store_turned(p, b, dk, p.scale, room, p.dk, b.head);
  else
    store_sums<Traits>(p, b, dk, scale, rows_in(room, 0), p.dk, b.head, part_of(p, b, p.part_k, p.m, b.head));
  store_sums<Traits>(p, b, dv, one, rows_in(room, 1), p.dv, b.head, part_of(p, b, p.part_v, p.m, b.head));
}

template <class Traits>
VK_KERNEL(kMostThreads, Traits::kBlocks)
tiled_dq(const Tiled p) {
  const Block b = block_of(p);
  as_queries<Traits::kSteps <= 6>(p, b, Room<Traits, 2>::at(p, b), b.head);
}

template <class Traits>
VK_KERNEL(kMostThreads, Traits::kBlocks)
tiled_dkv(const Tiled p) {
  const Block b = block_of(p);
  as_keys(p, b, Room<Traits, 2>::at(p, b));
}

// Both in one launch, where a block has all rows of a sequence: what the second half reads, the first has brought
// close.
template <class Traits>
VK_KERNEL(kMostThreads, Traits::kBlocks)
tiled_backward(const Tiled p) {
  const Block b = block_of(p);
  const auto room = Room<Traits, 2>::at(p, b);
  const int per_key = int(p.per_key.divisor);
#pragma unroll 1
  for (int head = b.head * per_key; head < (b.head + 1) * per_key; ++head) {
    as_queries<false>(p, b, room, head);
    sync_block();  // stats are there, and shared memory is filled again
  }
  as_keys(p, b, room);
}

// The CLS rows of up to three tensors: the sum of what the sequences left, in their order; 0 where they leave nothing.
struct ClsRows {
  struct {
    const float* part;  // b heads outer d; null: nothing
    Heads to;
    Divisor heads;
    int rows;  // b heads
  } of[3];
  int outer, columns;
};

template <class T>
VK_KERNEL(128)
sum_cls(const ClsRows p) {
  const auto& x = p.of[block_y()];
  if (block_x() >= x.rows) return;
  const int sample = quotient(int(block_x()), x.heads), head = int(block_x()) - sample * int(x.heads.divisor);
  for (int column = thread_index(); column < p.columns; column += thread_count()) {
    float sum = 0;
    if (x.part)
      for (int i = 0; i < p.outer; ++i) sum += load(x.part + (block_x() * p.outer + i) * p.columns + column);
    store(row_at<T>(x.to, sample, 0, head) + column, narrow_one<T>(sum));
  }
}

}  // namespace
}  // namespace vk
