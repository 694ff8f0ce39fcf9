// What a block that owns a tile of keys notes down in shared memory, and the blocks of queries it walks.
#pragma once

#include "attention_notes.h"

namespace vk::device {

// lse (base 2, +inf where a query saw nothing) and delta of every query, in processing order: lines of `length`, a
// multiple of 4, so that they are copied 16 bytes at a time.
struct Stats {
  float *lse, *delta;
  int length;
};

inline Stats stats_in(float* memory, const Problem& p, const AttentionParams& a) {
  const int length = (p.mask.q.all + 3) / 4 * 4;
  return {memory, memory + a.q.size(0) * a.q.size(2) * p.schedule.groups * length, length};
}

VK_DEVICE int64_t stats_line(const Stats& stats, const Schedule& s, const Place& at, int head) {
  return ((at.sample * s.query_heads + head) * s.groups + at.group) * stats.length;
}

// A block of queries from `first` on; not masked: all of them see all live keys of the tile.
struct alignas(8) QueryBlock {
  int first, masked;
};

template <int kKeys, int kQueries>
struct KeyNotes {
  static constexpr size_t kBytes = sizeof(Place) + 4 * kQueries * sizeof(float) + 128 * sizeof(QueryBlock) +
                                   3 * kQueries * sizeof(KeyRange) + (kKeys + 2 * kQueries + 8) * sizeof(int);
  Place* place;
  float* stats;      // lse and delta of this step's queries, then of the next
  QueryBlock* list;  // of the run, up to 128
  KeyRange* ranges;  // of this step's queries and the two after it
  int* rows;         // of keys; -1: there is none
  int* query_rows;   // of this step's queries and the next; -1: dropped, or none
  int* counts;       // blocks on the list from each warp
};

template <int kKeys, int kQueries>
VK_DEVICE KeyNotes<kKeys, kQueries> key_notes_at(char* memory) {
  KeyNotes<kKeys, kQueries> notes;
  notes.place = carve<Place>(memory, 1);
  notes.stats = carve<float>(memory, 4 * kQueries);
  notes.list = carve<QueryBlock>(memory, 128);
  notes.ranges = carve<KeyRange>(memory, 3 * kQueries);
  notes.rows = carve<int>(memory, kKeys);
  notes.query_rows = carve<int>(memory, 2 * kQueries);
  notes.counts = carve<int>(memory, 8);
  return notes;
}

template <int kThreads, int kKeys, int kQueries>
VK_DEVICE void note_place(const Mask& m, const Schedule& schedule, const KeyNotes<kKeys, kQueries>& notes) {
  const Place at = place_of(schedule, m, block_x());
  if (thread_index() == 0) store_shared(notes.place, at);
  for (int r = thread_index(); r < kKeys; r += kThreads) {
    const int j = at.tile * schedule.step + r;
    store_shared(notes.rows + r, r < schedule.step && j < m.k.all ? token_row(m.k, m, at, j) : -1);
  }
  sync_block();
}

// The keys of a tile, [first, last) of them live.
VK_DEVICE KeyRange keys_of(const Schedule& s, const Place& at) {
  const int first = at.tile * s.step;
  return {first, min_of(first + s.step, at.live_k)};
}

template <int kThreads, class T, int R, int C, int kQueries>
VK_DEVICE void copy_own_keys(const Problem& p, const Rows& x, const KeyNotes<R, kQueries>& notes,
                             const Tile<T, R, C>& to) {
  const Place at = load_shared(notes.place);
  const KeyRange keys = keys_of(p.schedule, at);
  const T* head = head_of<T>(x, at, at.head);
  copy_rows<kThreads>(to, p.d, head, [&](int r) {
    const int row = load_shared(notes.rows + r);
    return row >= 0 && keys.begin + r < keys.end ? head + row * x.s : nullptr;
  });
}

// How queries [first, end), which span `span`, meet a tile of keys: not at all, some of them some, all of them all.
enum Meeting : int { kNone, kMasked, kWhole };

template <bool kBoxed>
VK_DEVICE Meeting meeting_of(const Mask& m, const KeyRange& keys, const Span* span, int first, int end) {
  if (keys.begin >= keys.end || first >= end) return kNone;
  if (m.packed) return kMasked;
  const Meeting whole = kBoxed ? kMasked : kWhole;
  if (!m.ranges) return whole;
  const Span s = load(span);
  if (s.first >= s.last || s.first >= keys.end || s.last <= keys.begin) return kNone;
  return s.core_first > keys.begin || s.core_last < keys.end ? kMasked : whole;
}

// Lists the blocks of queries, 128 from `chunk` on, that meet the tile of keys; how many.
template <int kThreads, bool kBoxed, int kKeys, int kQueries>
VK_DEVICE int list_blocks(const Problem& p, const Span* spans, int blocks, int interval, int chunk,
                          const KeyNotes<kKeys, kQueries>& notes) {
  static_assert(kThreads == 128, "a thread looks at one block");
  const Mask& m = p.mask;
  const Place at = load_shared(notes.place);
  const KeyRange keys = keys_of(p.schedule, at);
  int first = 0, end = at.live_q;
  if (m.packed && keys.begin < keys.end) {
    first = keys.begin / m.k.length * m.q.length / 4 * 4;  // where a copy of stats may begin
    end = min_of(end, ((keys.end - 1) / m.k.length + 1) * m.q.length);
  }
  const int block = chunk + thread_index();
  first += block * kQueries;
  const int64_t index = (at.sample * m.intervals + interval) * blocks + block;
  const Meeting meeting = block < blocks ? meeting_of<kBoxed>(m, keys, spans + index, first, end) : kNone;
  const uint32_t votes = ballot(meeting != kNone);
  if (lane() == 0) store_shared(notes.counts + warp(), popcount(votes));
  sync_block();  // and nobody reads the list of before
  int before = popcount(votes & ((1u << lane()) - 1u)), all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    const int count = load_shared(notes.counts + w);
    before += w < warp() ? count : 0;
    all += count;
  }
  if (meeting != kNone) store_shared(notes.list + before, QueryBlock{first, meeting == kMasked});
  sync_block();
  return all;
}

// The rows of the queries of step `step`, and their intervals where the block is masked, for use after the next
// barrier.
template <int kKeys, int kQueries>
VK_DEVICE void note_queries(const Mask& m, const KeyNotes<kKeys, kQueries>& notes, int interval, int step, int count,
                            int share) {
  if (step >= count * share || thread_index() >= kQueries) return;
  const Place at = load_shared(notes.place);
  const QueryBlock block = load_shared(notes.list + step % count);
  const int i = block.first + thread_index();
  const bool live = i < at.live_q;
  store_shared(notes.query_rows + step % 2 * kQueries + thread_index(), live ? token_row(m.q, m, at, i) : -1);
  if (block.masked)
    store_shared(notes.ranges + step % 3 * kQueries + thread_index(),
                 live ? interval_of(m, at, i, interval) : KeyRange{0, 0});
}

// What the box needs of the queries of step `step`, for use after the next barrier.
template <int kKeys, int kQueries>
VK_DEVICE void note_boxed_queries(const Mask& m, const KeyNotes<kKeys, kQueries>& notes,
                                  const Sight<kKeys, kQueries>& sight, int step, int count, int share) {
  if (step >= count * share) return;
  const Place at = load_shared(notes.place);
  note_columns(m, m.q, at, sight, step, load_shared(notes.list + step % count).first, at.live_q);
}

// Notes which queries of step `step` see kRows keys of the tile from `row` on; whether any does.
template <int kRows, int kKeys, int kQueries>
VK_DEVICE bool keys_seen(const Mask& m, const Schedule& s, const KeyNotes<kKeys, kQueries>& notes,
                         const Sight<kKeys, kQueries>& sight, int step, int row) {
  const Place at = load_shared(notes.place);
  const int first = at.tile * s.step;
  const auto inside = [&](int r, int word) {
    const KeyRange* ranges = notes.ranges + step % 3 * kQueries + 32 * word;
    uint32_t bits = 0;
#pragma unroll 8
    for (int c = 0; c < 32; ++c)
      if (in_range(load_shared(ranges + c), first + r)) bits |= 1u << c;
    return bits;
  };
  return note_seen<true, kRows>(m, at, sight, step, row, first, inside);
}

template <int kThreads, class T, int R, int C, int kKeys>
VK_DEVICE void copy_block(const Rows& x, int d, int head, const KeyNotes<kKeys, R>& notes, int step,
                          const Tile<T, R, C>& to) {
  const T* from = head_of<T>(x, load_shared(notes.place), head);
  copy_rows<kThreads>(
      to, d, from,
      [&](int r) {
        const int row = load_shared(notes.query_rows + step % 2 * R + r);
        return row >= 0 ? from + row * x.s : nullptr;
      },
      anew(thread_index()));
}

// Past the last query zeros are as good as anything: its row of dout is zero, too.
template <int kKeys, int kQueries>
VK_DEVICE void copy_stats(const Stats& stats, const Schedule& s, int head, const KeyNotes<kKeys, kQueries>& notes,
                          int step, int count) {
  if (thread_index() >= kQueries / 2) return;
  const bool second = thread_index() >= kQueries / 4;
  const int at = (thread_index() - (second ? kQueries / 4 : 0)) * 4,
            i = load_shared(notes.list + step % count).first + at;
  const float* line = (second ? stats.delta : stats.lse) + stats_line(stats, s, load_shared(notes.place), head);
  const bool there = i < stats.length;
  copy_async16(notes.stats + (step % 2 * 2 + second) * kQueries + at, there ? line + i : stats.lse, there ? 16 : 0);
}

// Bit 4 n + e: element e of fragment n counts, in a product of keys (rows, the first is `row` of the tile) and the
// queries of a step, from `part` on.
template <int N, int kKeys, int kQueries>
VK_DEVICE uint32_t counted(const Schedule& s, const KeyNotes<kKeys, kQueries>& notes, int step, int part, int row) {
  static_assert(N <= 8, "32 bits");
  const int j = load_shared(notes.place).tile * s.step + row + lane() / 4;
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const KeyRange r = load_shared(notes.ranges + step % 3 * kQueries + part + 8 * n + lane() % 4 * 2 + e);
      if (in_range(r, j)) bits |= 1u << (4 * n + e);
      if (in_range(r, j + 8)) bits |= 1u << (4 * n + 2 + e);
    }
  return bits;
}

// Writes 16-row tiles from `first` on, the rows of this warp, into `to` (b s_k m d), through its rows of `tile`; zeros
// for dropped keys, which went through the products that ask nobody.
template <class T, int kM, int N, int R, int C, int kQueries>
VK_DEVICE void store_keys(const Problem& p, void* to, const KeyNotes<R, kQueries>& notes, const Tile<T, R, C>& tile,
                          int first, FragmentC (&acc)[kM][N]) {
  const Place at = load_shared(notes.place);
  const KeyRange keys = keys_of(p.schedule, at);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (keys.begin + first + 16 * m + acc[m][n].row(lane(), e) >= keys.end) acc[m][n].value[e] = 0;
      put(tile, first + 16 * m, 8 * n, acc[m][n]);
    }
  sync_warp();
  const int64_t stride = int64_t(p.schedule.heads) * p.d;
  T* head = static_cast<T*>(to) + at.sample * p.mask.k.tokens * stride + at.head * p.d;
  const auto row_at = [&](int r) {
    const int row = load_shared(notes.rows + r);
    return row >= 0 ? head + row * stride : nullptr;
  };
  store_rows<16 * kM, kWarp>(tile, first, p.d, row_at, lane());
}

}  // namespace vk::device
