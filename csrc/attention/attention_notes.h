// What a block that owns a tile of queries notes down in shared memory, once, so that registers are left for products:
// which rows its queries and keys are, which keys it walks, and who sees which of them.
#pragma once

#include "attention_box.h"
#include "attention_params.h"
#include "vkernels/device/tile.h"

namespace vk::device {

// Indices of a tile of queries that exist.
struct alignas(8) QueryTile {
  int first, end;
};

template <int kQueries, int kKeys>
struct Notes {
  static constexpr size_t kBytes = sizeof(Place) + sizeof(QueryTile) + 3 * sizeof(KeyRun) + 8 * sizeof(Span) +
                                   3 * kQueries * sizeof(KeyRange) + (kQueries + 2 * kKeys) * sizeof(int);
  Place* place;
  QueryTile* tile;
  KeyRun* runs;      // one an interval
  Span* spans;       // one a warp
  KeyRange* ranges;  // intervals kQueries
  int* rows;         // of queries; -1: there is none
  int* key_rows;     // 2 kKeys: of the keys of this step and the next
};

template <class T>
VK_DEVICE T* carve(char*& memory, int count) {
  T* taken = reinterpret_cast<T*>(memory);
  memory += count * sizeof(T);
  return taken;
}

template <int kQueries, int kKeys>
VK_DEVICE Notes<kQueries, kKeys> notes_at(char* memory) {
  Notes<kQueries, kKeys> notes;
  notes.place = carve<Place>(memory, 1);
  notes.runs = carve<KeyRun>(memory, 3);
  notes.spans = carve<Span>(memory, 8);
  notes.tile = carve<QueryTile>(memory, 1);
  notes.ranges = carve<KeyRange>(memory, 3 * kQueries);
  notes.rows = carve<int>(memory, kQueries);
  notes.key_rows = carve<int>(memory, 2 * kKeys);
  return notes;
}

// The intervals of this thread's queries are noted down; what those of its warp span together.
template <int kThreads, int kQueries, int kKeys>
VK_DEVICE Span note_ranges(const Mask& m, const Place& at, const QueryTile& tile, int index,
                           const Notes<kQueries, kKeys>& notes) {
  Span span{kFar, 0, 0, kFar};
  for (int r = thread_index(); r < kQueries; r += kThreads) {
    const int i = tile.first + r;
    const bool live = i < tile.end && i < at.live_q;
    const KeyRange range = live ? interval_of(m, at, i, index) : KeyRange{0, 0};
    store_shared(notes.ranges + index * kQueries + r, range);
    span = joined(span, span_of(range, live));
  }
  return joined_over_warp(span);
}

// The rows of the keys of step `step`, for a copy after the next barrier.
template <int kQueries, int kKeys>
VK_DEVICE void note_keys(const Mask& m, const Notes<kQueries, kKeys>& notes, int step, int steps) {
  if (step >= steps || thread_index() >= kKeys) return;
  static_assert(kKeys <= 64, "a thread notes one key");
  const KeyBlock block = key_block<kKeys>(notes.runs, step);
  const int j = block.first + thread_index();
  const int row = j < block.limit ? token_row(m.k, m, load_shared(notes.place), j) : -1;
  store_shared(notes.key_rows + step % 2 * kKeys + thread_index(), row);
}

// What the box needs of the keys of step `step`, for use after the next barrier.
template <int kQueries, int kKeys>
VK_DEVICE void note_boxed_keys(const Mask& m, const Notes<kQueries, kKeys>& notes, const Sight<kQueries, kKeys>& sight,
                               int step, int steps) {
  if (step >= steps) return;
  const KeyBlock block = key_block<kKeys>(notes.runs, step);
  note_columns(m, m.k, load_shared(notes.place), sight, step, block.first, block.limit);
}

// Notes what kRows queries of the tile from `row` on see of the keys of step `step`; whether they see any.
template <int kRows, int kQueries, int kKeys>
VK_DEVICE bool queries_see(const Mask& m, const Notes<kQueries, kKeys>& notes, const Sight<kQueries, kKeys>& sight,
                           int step, int row) {
  const KeyBlock block = key_block<kKeys>(notes.runs, step);
  const auto inside = [&](int r, int word) {
    const KeyRange range = load_shared(notes.ranges + block.interval * kQueries + r);
    const int first = block.first + 32 * word;
    return bits_between(range.begin - first, range.end - first);
  };
  return note_seen<false, kRows>(m, load_shared(notes.place), sight, step, row, load_shared(notes.tile).first, inside);
}

// Notes everything down for all threads of the block; the number of steps of the walk.
template <int kThreads, int kQueries, int kKeys>
VK_DEVICE int plan_walk(const Mask& m, const Schedule& schedule, const Notes<kQueries, kKeys>& notes) {
  const Place at = place_of(schedule, m, block_x());
  const QueryTile tile{at.tile * schedule.step, min_of(m.q.all, (at.tile + 1) * schedule.step)};
  if (thread_index() == 0) store_shared(notes.place, at);
  if (thread_index() == 0) store_shared(notes.tile, tile);
  for (int r = thread_index(); r < kQueries; r += kThreads)
    store_shared(notes.rows + r, tile.first + r < tile.end ? token_row(m.q, m, at, tile.first + r) : -1);
  int steps = 0;
  for (int index = 0; index < m.intervals; ++index) {
    const Span mine = note_ranges<kThreads>(m, at, tile, index, notes);
    if (lane() == 0) store_shared(notes.spans + warp(), mine);
    sync_block();
    Span all = load_shared(notes.spans);
#pragma unroll
    for (int w = 1; w < kThreads / kWarp; ++w) all = joined(all, load_shared(notes.spans + w));
    const KeyRun run = run_of<kKeys>(all);
    if (thread_index() == 0) store_shared(notes.runs + index, run);
    steps += steps_of<kKeys>(run);
    sync_block();  // the spans are written again, the runs are read
  }
  note_keys(m, notes, 0, steps);
  sync_block();
  return steps;
}

// Copies the live queries of the tile out of `x`, or what has the shape of queries.
template <int kThreads, class T, int R, int C, int kKeys>
VK_DEVICE void copy_queries(const Rows& x, int d, const Notes<R, kKeys>& notes, const Tile<T, R, C>& to) {
  const Place at = load_shared(notes.place);
  const int live = at.live_q - load_shared(notes.tile).first;
  const T* head = head_of<T>(x, at, at.head);
  copy_rows<kThreads>(to, d, head, [&](int r) {
    const int row = load_shared(notes.rows + r);
    return row >= 0 && r < live ? head + row * x.s : nullptr;
  });
}

// Copies the keys of step `step` out of `x`, or their values.
template <int kThreads, class T, int R, int C, int kQueries>
VK_DEVICE void copy_keys(const Rows& x, int d, int share, const Notes<kQueries, R>& notes, int step,
                         const Tile<T, R, C>& to) {
  const Place at = load_shared(notes.place);
  const T* head = head_of<T>(x, at, at.head / share);
  copy_rows<kThreads>(
      to, d, head,
      [&](int r) {
        const int row = load_shared(notes.key_rows + step % 2 * R + r);
        return row >= 0 ? head + row * x.s : nullptr;
      },
      anew(thread_index()));
}

// Writes 16-row tiles from `first` on, the rows of this warp, into `to` (b s_q n d), through its rows of `tile`, which
// nobody else reads any more.
template <class T, int kM, int N, int R, int C, int kKeys>
VK_DEVICE void store_queries(const Problem& p, void* to, const Notes<R, kKeys>& notes, const Tile<T, R, C>& tile,
                             int first, const FragmentC (&acc)[kM][N]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) put(tile, first + 16 * m, 8 * n, acc[m][n]);
  sync_warp();
  const Place at = load_shared(notes.place);
  const int64_t stride = int64_t(p.schedule.heads) * p.d;
  T* head = static_cast<T*>(to) + at.sample * p.mask.q.tokens * stride + at.head * p.d;
  const auto row_at = [&](int r) {
    const int row = load_shared(notes.rows + r);
    return row >= 0 ? head + row * stride : nullptr;
  };
  store_rows<16 * kM, kWarp>(tile, first, p.d, row_at, lane());
}

// Bit 4 n + e: element e of fragment n counts, in a product of queries (rows, the first is `row` of the tile) and the
// keys of a block.
template <int N, int kQueries, int kKeys>
VK_DEVICE uint32_t counting(const Notes<kQueries, kKeys>& notes, const KeyBlock& block, int row) {
  static_assert(N <= 8, "32 bits");
  const int j = block.first + lane() % 4 * 2;
  uint32_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const KeyRange r = load_shared(notes.ranges + block.interval * kQueries + row + lane() / 4 + 8 * half);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (in_range(r, j + 8 * n + e)) bits |= 1u << (4 * n + 2 * half + e);
  }
  return bits;
}

}  // namespace vk::device
