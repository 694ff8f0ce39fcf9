// What the kernels of decode_attention are told, and what one block of them reads.
#pragma once

#include "vkernels/device/kernel.h"
#include "vkernels/device/memory.h"

namespace vk::decode {

using namespace device;

inline constexpr int kWarps = 8, kThreads = kWarps * kWarp;
inline constexpr int kMostChannels = 128, kMostSplits = 512;
inline constexpr int kRowStep = 16, kCodeStep = 32;  // tokens of one step of a warp
inline constexpr int kQueries = 8;                   // columns of one product

// What lies uncoded: b m sinks d, and either pages m page d (a full-precision cache) or b m kept d (recent tokens).
struct Params {
  const uint16_t* q;  // b s n d, 16-bit floats
  int64_t q_b, q_s, q_n;
  const int32_t *length, *table;
  const uint16_t *k_kept, *v_kept, *k_sink, *v_sink;
  const uint32_t *k_codes, *v_codes;
  const f16 *k_scale, *v_scale;
  uint16_t* o;
  float* lse;
  float* part;   // programs splits rows d: what a split leaves of a query, over its own largest score
  float* stats;  // programs splits rows 2: that score, and the sum of weights
  int* counter;  // programs
  int m, share, s, d, row_blocks, splits;
  int pages, table_pages, page, ring, sinks, residual, group, group_bits, room, window;  // group is 2^group_bits
  float scale;                                                                           // times log2(e)
  bool brain;                                                                            // bfloat16, not float16
};

// The queries of a block: `count` rows from `row` on, of those that share key/value head `head` of `sample`.
struct Program {
  int index, sample, head, row, count;
};

template <int kTiles>
VK_DEVICE Program program_of(const Params& p) {
  Program x;
  x.index = static_cast<int>(block_x());
  x.sample = x.index / p.row_blocks / p.m;
  x.head = x.index / p.row_blocks % p.m;
  x.row = x.index % p.row_blocks * kQueries * kTiles;
  const int left = p.share * p.s - x.row;
  x.count = left < kQueries * kTiles ? left : kQueries * kTiles;
  return x;
}

VK_HD int at_least(int x, int least) { return x > least ? x : least; }
VK_HD int at_most(int x, int most) { return x < most ? x : most; }
VK_HD int steps_of(int count, int step) { return count / step + (count % step != 0); }

// What any query of a sequence may see, as vkernels/triton/history.py has it. Lengths are memory of the device, nothing
// a host could have checked: everything is clamped to the storage.
struct Span {
  int length, window;
  int seen;               // the first position any query sees
  int sinks_from, sinks;  // positions
  int kept_from, kept;    // history indices that lie uncoded
  int coded_from, coded;  // history indices that lie as codes
  VK_MEMBER int uncoded() const { return sinks + kept; }
};

template <bool kCoded>
VK_DEVICE Span span_of(const Params& p, int sample) {
  Span x;
  x.length = at_least(load(p.length + sample), 0);
  x.window = at_most(p.window, x.length);  // a longer one hides no more
  x.seen = x.window > 0 ? at_least(x.length - p.s - x.window + 1, 0) : 0;
  const int held = at_most(x.length, p.sinks), after = at_least(x.length - p.sinks, 0);
  x.sinks_from = at_most(x.seen, held);
  x.sinks = held - x.sinks_from;
  const int first = at_least(x.seen - p.sinks, 0);
  int end = kCoded ? at_least(after - p.residual, 0) >> p.group_bits << p.group_bits : after;
  x.kept_from = at_most(at_least(end, first), after);
  x.kept = after - x.kept_from;
  int begin = p.ring ? at_least(end - p.ring, 0) : 0;
  if (!p.ring) end = at_most(end, p.room);
  begin = at_most(at_least(begin, kCoded ? first >> p.group_bits << p.group_bits : first), end);
  x.coded_from = begin;
  x.coded = kCoded ? end - begin : 0;
  if (!kCoded) x.kept_from = begin, x.kept = end - begin;
  return x;
}

// The steps of one split: uncoded ones, then coded ones, divided evenly by what they read.
struct Share {
  int used;  // splits that have any
  int rows_from, rows_to, codes_from, codes_to;
};

// A step over rows reads as much as kRowCost steps over codes.
template <int kRowCost>
VK_DEVICE Share share_of(const Params& p, const Span& span) {
  const int rows = steps_of(span.uncoded(), kRowStep), codes = span.coded / kCodeStep;
  const int64_t cost = int64_t{rows} * kRowCost + codes, worth = (cost + kWarps - 1) / kWarps;
  Share x;
  x.used = worth < 1 ? 1 : worth < p.splits ? static_cast<int>(worth) : p.splits;
  const auto begin = [&](int split) { return cost * split / x.used; };
  const auto row_at = [&](int64_t at) { return at_most(steps_of(int(at < cost ? at : cost), kRowCost), rows); };
  const auto code_at = [&](int64_t at) {
    return int(at > int64_t{rows} * kRowCost ? at - int64_t{rows} * kRowCost : 0);
  };
  const int64_t from = begin(block_y()), to = begin(block_y() + 1);
  x.rows_from = row_at(from), x.rows_to = row_at(to);
  x.codes_from = code_at(from), x.codes_to = code_at(to);
  return x;
}

// (start + offset) modulo ring, for start and offset below ring, without a sum that could overflow.
VK_DEVICE int ring_slot(int start, int offset, int ring) {
  return offset >= ring - start ? offset - (ring - start) : start + offset;
}

struct Spot {
  int64_t page;
  int row;
};

// Page of the pool, and row in it, of the `offset`-th history token from index `from` on.
VK_DEVICE Spot spot_of(const Params& p, int sample, int from, int offset) {
  int slot = from + offset, column = 0;
  if (p.ring) slot = ring_slot(int(unsigned(from) % unsigned(p.ring)), offset, p.ring);
  if (p.table_pages > 1) column = int(unsigned(slot) / unsigned(p.page));
  const int entry = load(p.table + int64_t{sample} * p.table_pages + at_most(column, p.table_pages - 1));
  return {at_most(at_least(entry, 0), p.pages - 1), slot - column * p.page};
}

}  // namespace vk::decode
