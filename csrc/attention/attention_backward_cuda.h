// Gradients without atomics, the same bits every run: a tile of queries sums its own, then a tile of keys sums its own.
//
// query_gradients  walks the keys like the forward, and leaves lse and delta = rowsum(dout out) - dlse behind.
// note_spans       what each block of queries sees, where a mask has intervals.
// key_gradients    walks the blocks of queries that see its keys, for all query heads of the group.
//
// Two sources instantiate them side by side: with windows and without.
#pragma once

#include "attention_cuda.h"
#include "attention_key_notes.h"
#include "attention_loop.h"
#include "vkernels/device/launch.h"

namespace vk {

using namespace device;

struct BackwardParams {
  Problem problem;
  Rows dout;
  const void* out;          // b s_q n d
  const float *lse, *dlse;  // b n s_q; dlse may be null, and has its own strides
  int64_t dlse_b, dlse_n, dlse_s;
  Stats stats;
  Span* spans;  // b intervals blocks
  int blocks;   // of queries
  float scale;
  void *dq, *dk, *dv;  // b s n d, b s m d
};

inline constexpr int kSpanned = 64;  // queries of a block of note_spans

void launch_note_spans(const BackwardParams& p, int64_t samples, const Stream& stream);

// Where a mask has windows.
void attention_backward_windows(const AttentionParams& p, const AttentionWorkspace& room, const Stream& stream);

namespace {

template <class T, int kHeadSize, bool kWithBox>
struct QueryTraits {
  using Element = T;
  static constexpr bool kBoxed = kWithBox;
  static constexpr int kD = kHeadSize, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kM = 2, kQueries = kWarps * kM * 16, kKeys = 32;
  using Queries = Tile<T, kQueries, kD>;
  using Keys = Tile<T, kKeys, kD>;
  using Loads = Ring<Tile<T, 2 * kKeys, kD>, 2>;  // keys, then their values
  static constexpr size_t kStats = 2 * kQueries * sizeof(float);
  using Window = Sight<kQueries, kKeys>;
  static constexpr size_t kWindow = kBoxed ? Window::kBytes : 0;
  static constexpr size_t kSharedBytes =
      2 * Queries::kBytes + Loads::kBytes + kStats + kWindow + Notes<kQueries, kKeys>::kBytes;
};

template <class T, int kHeadSize, bool kWithBox>
struct KeyTraits {
  using Element = T;
  static constexpr bool kBoxed = kWithBox;
  static constexpr int kD = kHeadSize, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kM = kHeadSize == 64 ? 2 : 1, kKeys = kWarps * kM * 16, kQueries = 64;
  static constexpr int kPart = kHeadSize == 64 ? 16 : kHeadSize == 128 ? 32 : 64;  // queries of a product: registers
  using Keys = Tile<T, kKeys, kD>;
  using Queries = Tile<T, kQueries, kD>;
  using Loads = Ring<Tile<T, 2 * kQueries, kD>, 2>;  // queries, then dout
  using Window = Sight<kKeys, kQueries>;
  static constexpr size_t kWindow = kBoxed ? Window::kBytes : 0;
  static constexpr size_t kSharedBytes = 2 * Keys::kBytes + Loads::kBytes + kWindow + KeyNotes<kKeys, kQueries>::kBytes;
};

template <class Traits>
struct QueryRooms {
  typename Traits::Queries q, dout;
  typename Traits::Loads ring;
  float *lse, *delta;  // of the tile's queries
  typename Traits::Window sight;
  Notes<Traits::kQueries, Traits::kKeys> notes;
};

template <class Traits>
VK_DEVICE QueryRooms<Traits> query_rooms() {
  using T = typename Traits::Element;
  char* dout = shared_memory() + Traits::Queries::kBytes;
  char* ring = dout + Traits::Queries::kBytes;
  float* stats = reinterpret_cast<float*>(ring + Traits::Loads::kBytes);
  char* sight = ring + Traits::Loads::kBytes + Traits::kStats;
  return {{reinterpret_cast<T*>(shared_memory())},
          {reinterpret_cast<T*>(dout)},
          {ring},
          stats,
          stats + Traits::kQueries,
          sight_at<Traits::kQueries, Traits::kKeys>(sight),
          notes_at<Traits::kQueries, Traits::kKeys>(sight + Traits::kWindow)};
}

// Keys and values of step `step`.
template <class Traits>
VK_DEVICE void start_keys(const Problem& p, const QueryRooms<Traits>& room, int step, int steps) {
  if (step < steps) {
    const auto pair = slot_of(room.ring, step);
    const typename Traits::Keys keys{pair.data}, values{pair.data + Traits::kKeys * Traits::kD};
    copy_keys<Traits::kThreads>(p.k, p.d, p.share, room.notes, step, keys);
    copy_keys<Traits::kThreads>(p.v, p.d, p.share, room.notes, step, values);
  }
  commit_copies();
  note_keys(p.mask, room.notes, step + 1, steps);
  if constexpr (Traits::kBoxed) note_boxed_keys(p.mask, room.notes, room.sight, step + 1, steps);
}

// A quarter of rowsum(dout out) of row r of the tile: every fourth vector from the lane's on.
template <class Traits>
VK_DEVICE float part_of_delta(const BackwardParams& p, const Place& at, const QueryRooms<Traits>& room, int r) {
  using T = typename Traits::Element;
  const Problem& problem = p.problem;
  const int row = load_shared(room.notes.rows + r);
  if (row < 0) return 0;
  const T* out = static_cast<const T*>(p.out) +
                 ((at.sample * problem.mask.q.tokens + row) * problem.schedule.heads + at.head) * problem.d;
  float sum = 0;
  for (int vector = lane() % 4; 8 * vector < problem.d; vector += 4) {
    float x[8], y[8];
    widen<T>(load16(out + 8 * vector), x);
    widen<T>(load_shared(reinterpret_cast<const Vector*>(vector_at(room.dout, r, vector))), y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  }
  return sum;
}

// lse in base 2 and delta of this warp's queries: into shared memory, and in processing order for the keys' kernel.
template <class Traits>
VK_DEVICE void note_stats(const BackwardParams& p, const QueryRooms<Traits>& room) {
  const Place at = load_shared(room.notes.place);
  const QueryTile tile = load_shared(room.notes.tile);
  const Mask& mask = p.problem.mask;
  const int64_t line = stats_line(p.stats, p.problem.schedule, at, at.head);
  for (int r = warp() * Traits::kM * 16 + lane() / 4; r < (warp() + 1) * Traits::kM * 16; r += 8) {
    const int i = tile.first + r, row = load_shared(room.notes.rows + r);
    float delta = sum_over_lanes<4>(part_of_delta(p, at, room, r)), lse = -kNothing;
    if (row >= 0 && i < at.live_q) {
      lse = lse_to_subtract(load(p.lse + (at.sample * p.problem.schedule.heads + at.head) * mask.q.tokens + row));
      if (p.dlse) delta -= load(p.dlse + at.sample * p.dlse_b + at.head * p.dlse_n + row * p.dlse_s);
    }
    if (lse == -kNothing) delta = 0;
    if (lane() % 4 != 0) continue;
    store_shared(room.lse + r, lse);
    store_shared(room.delta + r, delta);
    if (row < 0 && (i < mask.q.all || i >= p.stats.length)) continue;
    store(p.stats.lse + line + i, lse);
    store(p.stats.delta + line + i, delta);
  }
  sync_warp();
}

// Scores become weights, products of dout and values become gradients of scores.
template <int N>
VK_DEVICE void turn_rows(FragmentC (&s)[N], const float* lse, int row, float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float subtract = load_shared(lse + row + lane() / 4 + 8 * half);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) s[n].value[e] = exp2_fast(fmaf(s[n].value[e], scale, -subtract));
  }
}
template <int N>
VK_DEVICE void differentiate_rows(FragmentC (&dp)[N], const FragmentC (&p)[N], const float* delta, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float subtract = load_shared(delta + row + lane() / 4 + 8 * half);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) dp[n].value[e] = p[n].value[e] * (dp[n].value[e] - subtract);
  }
}

template <class Traits>
VK_KERNEL(Traits::kThreads, 2)
query_gradients(const BackwardParams params) {
  using T = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kKeys / 8, kThreads = Traits::kThreads;
  const Problem& p = params.problem;
  const QueryRooms<Traits> room = query_rooms<Traits>();
  const int steps = plan_walk<kThreads>(p.mask, p.schedule, room.notes), first = warp() * kM * 16;
  if constexpr (Traits::kBoxed) note_boxed_keys(p.mask, room.notes, room.sight, 0, steps);
  copy_queries<kThreads>(p.q, p.d, room.notes, room.q);
  copy_queries<kThreads>(params.dout, p.d, room.notes, room.dout);
  start_keys(p, room, 0, steps);
  wait_for_copies<0>();
  sync_block();
  note_stats(params, room);

  FragmentC acc[kM][Traits::kD / 8] = {};
  for (int step = 0; step < steps; ++step) {
    const auto pair = wait_for(room.ring, step);
    start_keys(p, room, step + 1, steps);
    if constexpr (Traits::kBoxed)
      if (!queries_see<kM * 16>(p.mask, room.notes, room.sight, step, first)) continue;
    const typename Traits::Keys keys{pair.data}, values{pair.data + Traits::kKeys * Traits::kD};
    FragmentC s[kM][kN] = {}, ds[kM][kN] = {};
    multiply_rows<T>(s, room.q, first, keys);
    multiply_rows<T>(ds, room.dout, first, values);
    const KeyBlock block = key_block<Traits::kKeys>(room.notes.runs, step);
    FragmentA weights[kM][kN / 2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      turn_rows(s[m], room.lse, first + 16 * m, p.scale);
      if constexpr (Traits::kBoxed)
        hide(s[m], seen_bits<kN>(room.sight, first + 16 * m, 0), 0.0f);
      else if (block.masked)
        hide(s[m], counting<kN>(room.notes, block, first + 16 * m), 0.0f);
      differentiate_rows(ds[m], s[m], room.delta, first + 16 * m);
      round_weights<T>(weights[m], ds[m]);
    }
    mix_rows<T>(acc, weights, keys, p.d);
  }
  const float by[2] = {params.scale, params.scale};
#pragma unroll
  for (int m = 0; m < kM; ++m) rescale(acc[m], by);
  store_queries<T>(p, params.dq, room.notes, room.q, first, acc);
}

template <class Traits>
struct KeyRooms {
  typename Traits::Keys k, v;
  typename Traits::Loads ring;
  typename Traits::Window sight;
  KeyNotes<Traits::kKeys, Traits::kQueries> notes;
};

template <class Traits>
VK_DEVICE KeyRooms<Traits> key_rooms() {
  using T = typename Traits::Element;
  char* v = shared_memory() + Traits::Keys::kBytes;
  char* ring = v + Traits::Keys::kBytes;
  char* sight = ring + Traits::Loads::kBytes;
  return {{reinterpret_cast<T*>(shared_memory())},
          {reinterpret_cast<T*>(v)},
          {ring},
          sight_at<Traits::kKeys, Traits::kQueries>(sight),
          key_notes_at<Traits::kKeys, Traits::kQueries>(sight + Traits::kWindow)};
}

template <class Traits>
VK_DEVICE void note_step(const Problem& p, const KeyRooms<Traits>& room, int interval, int step, int count) {
  note_queries(p.mask, room.notes, interval, step, count, p.share);
  if constexpr (Traits::kBoxed) note_boxed_queries(p.mask, room.notes, room.sight, step, count, p.share);
}

// Queries and dout of step `step` of a run: block step % count of its list, for query head step / count.
template <class Traits>
VK_DEVICE void start_queries(const BackwardParams& p, const KeyRooms<Traits>& room, int interval, int step, int count) {
  if (step < count * p.problem.share) {
    const auto pair = slot_of(room.ring, step);
    const typename Traits::Queries q{pair.data}, dout{pair.data + Traits::kQueries * Traits::kD};
    const int head = load_shared(room.notes.place).head * p.problem.share + step / count;
    copy_block<Traits::kThreads>(p.problem.q, p.problem.d, head, room.notes, step, q);
    copy_block<Traits::kThreads>(p.dout, p.problem.d, head, room.notes, step, dout);
    copy_stats(p.stats, p.problem.schedule, head, room.notes, step, count);
  }
  commit_copies();
  note_step(p.problem, room, interval, step + 1, count);
}

// The same with queries as columns.
template <int N>
VK_DEVICE void turn_columns(FragmentC (&s)[N], const float* lse, float scale) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float subtract = load_shared(lse + 8 * n + lane() % 4 * 2 + e);
#pragma unroll
      for (int i = e; i < 4; i += 2) s[n].value[i] = exp2_fast(fmaf(s[n].value[i], scale, -subtract));
    }
}
template <int N>
VK_DEVICE void differentiate_columns(FragmentC (&dp)[N], const FragmentC (&p)[N], const float* delta) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float subtract = load_shared(delta + 8 * n + lane() % 4 * 2 + e);
#pragma unroll
      for (int i = e; i < 4; i += 2) dp[n].value[i] = p[n].value[i] * (dp[n].value[i] - subtract);
    }
}

// kPart queries of a step, from `part` on, with scores as keys times queries: weights meet dout and q unturned.
template <class Traits>
VK_DEVICE void add_part(const BackwardParams& params, const KeyRooms<Traits>& room, int step, bool masked, int part,
                        FragmentC (&dk)[Traits::kM][Traits::kD / 8], FragmentC (&dv)[Traits::kM][Traits::kD / 8]) {
  using T = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kPart / 8;
  const Problem& p = params.problem;
  const int first = warp() * kM * 16;
  T* pair = slot_of(room.ring, step).data + part * Traits::kD;
  const Tile<T, Traits::kPart, Traits::kD> q{pair}, dout{pair + Traits::kQueries * Traits::kD};
  const float* lse = room.notes.stats + step % 2 * 2 * Traits::kQueries + part;
  FragmentC s[kM][kN] = {}, ds[kM][kN] = {};
  FragmentA weights[kM][kN / 2];
  multiply_rows<T>(s, room.k, first, q);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    turn_columns(s[m], lse, p.scale);
    if constexpr (Traits::kBoxed)
      hide(s[m], seen_bits<kN>(room.sight, first + 16 * m, part), 0.0f);
    else if (masked)
      hide(s[m], counted<kN>(p.schedule, room.notes, step, part, first + 16 * m), 0.0f);
    round_weights<T>(weights[m], s[m]);
  }
  multiply_rows<T>(ds, room.v, first, dout);
  mix_rows<T>(dv, weights, dout, p.d);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    differentiate_columns(ds[m], s[m], lse + Traits::kQueries);
    round_weights<T>(weights[m], ds[m]);
  }
  mix_rows<T>(dk, weights, q, p.d);
}

template <class Traits>
VK_KERNEL(Traits::kThreads, 2)
key_gradients(const BackwardParams params) {
  using T = typename Traits::Element;
  constexpr int kM = Traits::kM, kThreads = Traits::kThreads;
  const Problem& p = params.problem;
  const KeyRooms<Traits> room = key_rooms<Traits>();
  note_place<kThreads>(p.mask, p.schedule, room.notes);
  copy_own_keys<kThreads>(p, p.k, room.notes, room.k);
  copy_own_keys<kThreads>(p, p.v, room.notes, room.v);
  FragmentC dk[kM][Traits::kD / 8] = {}, dv[kM][Traits::kD / 8] = {};
  for (int interval = 0; interval < p.mask.intervals; ++interval)
    for (int chunk = 0; chunk < params.blocks; chunk += kThreads) {
      const int count =
          list_blocks<kThreads, Traits::kBoxed>(p, params.spans, params.blocks, interval, chunk, room.notes);
      note_step(p, room, interval, 0, count);
      sync_block();
      start_queries(params, room, interval, 0, count);
      for (int step = 0; step < count * p.share; ++step) {
        wait_for(room.ring, step);
        start_queries(params, room, interval, step + 1, count);
        if constexpr (Traits::kBoxed)
          if (!keys_seen<kM * 16>(p.mask, p.schedule, room.notes, room.sight, step, warp() * kM * 16)) continue;
        const bool masked = load_shared(room.notes.list + step % count).masked;
#pragma unroll 1
        for (int part = 0; part < Traits::kQueries; part += Traits::kPart)
          add_part(params, room, step, masked, part, dk, dv);
      }
    }
  wait_for_copies<0>();
  sync_block();
  const float by[2] = {params.scale, params.scale};
#pragma unroll
  for (int m = 0; m < kM; ++m) rescale(dk[m], by);
  store_keys<T>(p, params.dk, room.notes, room.k, warp() * kM * 16, dk);
  store_keys<T>(p, params.dv, room.notes, room.v, warp() * kM * 16, dv);
}

template <class T, int kHeadSize, bool kBoxed>
void run(const AttentionParams& a, const AttentionWorkspace& room, const Stream& stream) {
  using Mine = QueryTraits<T, kHeadSize, kBoxed>;
  using Theirs = KeyTraits<T, kHeadSize, kBoxed>;
  BackwardParams p{};
  p.problem = problem_of(a, Mine::kQueries, Theirs::kKeys, false);
  p.dout = rows_of(a.dout);
  p.out = a.o.data, p.lse = a.lse.ptr<const float>(), p.dlse = a.dlse.ptr<const float>();
  if (a.dlse) p.dlse_b = a.dlse.stride(0), p.dlse_n = a.dlse.stride(1), p.dlse_s = a.dlse.stride(2);
  p.stats = stats_in(room.stats.ptr<float>(), p.problem, a);
  p.spans = room.spans.ptr<Span>();
  p.blocks = (p.problem.mask.q.all + Theirs::kQueries - 1) / Theirs::kQueries;
  p.scale = float(a.scale);
  p.dq = a.dq.data, p.dk = a.dk.data, p.dv = a.dv.data;
  if (a.q.numel() > 0)
    launch("attention, query_gradients", query_gradients<Mine>,
           {blocks_of(p.problem.schedule), 1, Mine::kThreads, Mine::kSharedBytes}, stream, p);
  if (a.k.numel() == 0) return;
  p.problem = problem_of(a, Theirs::kKeys, Theirs::kKeys, true);
  const Mask& mask = p.problem.mask;
  if (mask.packed)  // the queries of the groups of a tile, and up to three before them
    p.blocks = (p.problem.schedule.step / mask.k.length * mask.q.length + 3 + Theirs::kQueries - 1) / Theirs::kQueries;
  static_assert(Theirs::kQueries == kSpanned);
  if (mask.ranges && !mask.packed) launch_note_spans(p, a.q.size(0), stream);
  launch("attention, key_gradients", key_gradients<Theirs>,
         {blocks_of(p.problem.schedule), 1, Theirs::kThreads, Theirs::kSharedBytes}, stream, p);
}

template <class T, bool kBoxed>
void by_head_size(const AttentionParams& a, const AttentionWorkspace& room, const Stream& stream) {
  const int64_t d = a.q.size(3);
  if (d <= 64) return run<T, 64, kBoxed>(a, room, stream);
  if (d <= 80) return run<T, 80, kBoxed>(a, room, stream);
  if (d <= 96) return run<T, 96, kBoxed>(a, room, stream);
  run<T, 128, kBoxed>(a, room, stream);
}

}  // namespace
}  // namespace vk
