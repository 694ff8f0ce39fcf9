// Keys and values on their way into the tensor cores. A warp takes steps of its own: every lane copies into shared
// memory what its own fragments need, 16 bytes at a time and stages ahead, so that the loop has no barrier of the block
// and rows need no ldmatrix: where an element stands in a sum, and which column of the output is which channel, is for
// the kernel to choose.
#pragma once

#include "decode_state.h"
#include "vkernels/device/codes.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/sync.h"

namespace vk::decode {

// Tiles of keys and of values in turn, kAhead steps of each under way, in a ring of the warp's own.
template <int kAheadSteps, int kSlotBytes>
struct Stages {
  static constexpr int kAhead = kAheadSteps, kSlots = 2 * kAhead + 1, kBytes = kSlots * kSlotBytes;
  char* ring;
  int filled = 0, taken = 0;  // offsets of the slots that come next
  VK_MEMBER char* next(int& offset) {
    char* slot = ring + offset;
    offset = offset == kBytes - kSlotBytes ? 0 : offset + kSlotBytes;
    return slot;
  }
};

// For every `step` below `steps`: `start_keys(step, slot)`, `start_values(step, slot)`, and once these have landed
// `keys(step, slot)`, `values(step, slot)`.
template <class Stages, class StartKeys, class StartValues, class Keys, class Values>
VK_DEVICE void run_stages(Stages stages, int steps, const StartKeys& start_keys, const StartValues& start_values,
                          const Keys& keys, const Values& values) {
  constexpr int kAhead = Stages::kAhead;
  const auto start = [&](int step, bool of_keys) {
    char* slot = stages.next(stages.filled);
    if (step < steps && of_keys) start_keys(step, slot);
    if (step < steps && !of_keys) start_values(step, slot);
    commit_copies();
  };
  const auto landed = [&] {
    wait_for_copies<2 * kAhead - 1>();
    sync_warp();  // the other lanes' copies are there too, and nobody reads the slot that is filled next
  };
  for (int step = 0; step < kAhead; ++step) {
    start(step, true);
    start(step, false);
  }
  for (int step = 0; step < steps; ++step) {
    landed();
    start(step + kAhead, true);
    keys(step, stages.next(stages.taken));
    landed();
    start(step + kAhead, false);
    values(step, stages.next(stages.taken));
  }
  wait_for_copies<0>();
  sync_warp();
}

VK_DEVICE Vector* vector_at(char* slot, int i) { return reinterpret_cast<Vector*>(slot) + i; }
VK_DEVICE const Vector* vector_at(const char* slot, int i) { return reinterpret_cast<const Vector*>(slot) + i; }

// The queries of a lane's column, eight of unit `unit` of 32 channels, in the order of the sum: one vector of `rows`
// [8 kTiles, kMostChannels]. Read again in every step: registers are for the outputs.
VK_DEVICE Vector query(const uint16_t* rows, int n, int unit) {
  const uint16_t* row = rows + (kQueries * n + lane() / 4) * kMostChannels;
  return load_shared(reinterpret_cast<const Vector*>(row + 32 * unit) + lane() % 4);
}

// Four pairs of the upper and four of the lower row of a lane, as the left operands of two steps.
struct Operands {
  FragmentA step[2];
};
VK_DEVICE Operands operands(const uint32_t (&upper)[4], const uint32_t (&lower)[4]) {
  return {{{{upper[0], lower[0], upper[1], lower[1]}}, {{upper[2], lower[2], upper[3], lower[3]}}}};
}

// s += a q over a unit.
template <class T, int kTiles, int kSteps>
VK_DEVICE void multiply_queries(FragmentC (&s)[kTiles][kSteps], int step, const Operands& a,
                                const Vector (&q)[kTiles]) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      multiply_add<T>(s[n][step], a.step[k], FragmentB{{q[n].word[2 * k], q[n].word[2 * k + 1]}});
}

// ---- tokens that lie as they are -----------------------------------------------------------------------------------

template <class T, bool kCoded>
struct Rows {
  const Params& p;
  const Program& at;
  const Span& span;

  using Ring = Stages<1, kRowStep * 2 * kMostChannels>;

  // Where uncoded token i starts in its tensor, and whether that is the sinks'.
  VK_MEMBER int64_t place(int i, bool& sink) const {
    sink = i < span.sinks;
    if (sink) return ((int64_t{at.sample} * p.m + at.head) * p.sinks + span.sinks_from + i) * p.d;
    const int offset = i - span.sinks;
    if constexpr (kCoded) {
      const int kept = p.residual + p.group, slot = ring_slot(span.kept_from % kept, offset, kept);
      return ((int64_t{at.sample} * p.m + at.head) * kept + slot) * p.d;
    } else {
      const Spot spot = spot_of(p, at.sample, span.kept_from, offset);
      return ((spot.page * p.m + at.head) * p.page + spot.row) * p.d;
    }
  }
  VK_MEMBER int position(int i) const {
    return i < span.sinks ? span.sinks_from + i : p.sinks + span.kept_from + (i - span.sinks);
  }
  // Eight channels of a token, zeros past the last token and the last channel.
  VK_MEMBER void copy(Vector* to, const uint16_t* row, bool live, int channel) const {
    copy_async16(to, row + at_most(channel, p.d - 8), live && channel < p.d ? 16 : 0);
  }
  VK_MEMBER const uint16_t* row_of(const uint16_t* kept, const uint16_t* sinks, int i, bool live) const {
    if (!live) return kept;
    bool sink;
    const int64_t start = place(i, sink);
    return (sink ? sinks : kept) + start;
  }

  // Keys: row lane / 4 (half 0) or eight below of the product, chunk lane % 4 of every unit of 32 channels.
  VK_MEMBER void start_keys(int step, char* slot) const {
#pragma unroll 1  // where tokens lie takes registers
    for (int half = 0; half < 2; ++half) {
      const int i = step * kRowStep + lane() / 4 + 8 * half;
      const bool live = i < span.uncoded();
      const uint16_t* row = row_of(p.k_kept, p.k_sink, i, live);
#pragma unroll
      for (int unit = 0; unit < kMostChannels / 32; ++unit)
        if (32 * unit < p.d)
          copy(vector_at(slot, (2 * unit + half) * kWarp + lane()), row, live, 32 * unit + lane() % 4 * 8);
    }
  }
  // Values: tokens 2 (lane % 4), the one after it, and eight further; chunk lane / 4 of every unit of 64 channels.
  VK_MEMBER void start_values(int step, char* slot) const {
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      const int i = step * kRowStep + lane() % 4 * 2 + j % 2 + j / 2 * 8;
      const bool live = i < span.uncoded();
      const uint16_t* row = row_of(p.v_kept, p.v_sink, i, live);
#pragma unroll
      for (int unit = 0; unit < kMostChannels / 64; ++unit)
        if (64 * unit < p.d)
          copy(vector_at(slot, (4 * unit + j) * kWarp + lane()), row, live, 64 * unit + lane() / 4 * 8);
    }
  }

  template <int kTiles>
  VK_MEMBER void keys(const char* slot, const uint16_t* queries, FragmentC (&s)[kTiles][1]) const {
#pragma unroll
    for (int unit = 0; unit < kMostChannels / 32; ++unit) {
      if (32 * unit >= p.d) break;
      const Vector upper = load_shared(vector_at(slot, 2 * unit * kWarp + lane()));
      const Vector lower = load_shared(vector_at(slot, (2 * unit + 1) * kWarp + lane()));
      Vector q[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) q[n] = query(queries, n, unit);
      multiply_queries<T>(s, 0, operands(upper.word, lower.word), q);
    }
  }
  template <int kTiles>
  VK_MEMBER void values(const char* slot, const FragmentB (&weight)[kTiles], State<kTiles>& state) const {
#pragma unroll
    for (int unit = 0; unit < kMostChannels / 64; ++unit) {
      if (64 * unit >= p.d) break;
      Vector token[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) token[j] = load_shared(vector_at(slot, (4 * unit + j) * kWarp + lane()));
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        FragmentA a;
#pragma unroll
        for (int i = 0; i < 4; ++i) a.reg[i] = pair_of(token[i / 2 * 2].word, token[i / 2 * 2 + 1].word, 2 * y + i % 2);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) multiply_add<T>(state.out[n][4 * unit + y], a, weight[n]);
      }
    }
  }
};

// `queries`: as they came.
template <class T, bool kCoded, int kTiles>
VK_DEVICE void attend_rows(const Rows<T, kCoded>& rows, const Share& share, char* ring, const uint16_t* queries,
                           State<kTiles>& state) {
  const Params& p = rows.p;
  const int first = share.rows_from + warp();
  const int steps = steps_of(at_least(share.rows_to - first, 0), kWarps);
  const auto index = [&](int step) { return first + step * kWarps; };
  float factor[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) factor[n][0] = factor[n][1] = p.scale;
  FragmentB weight[kTiles];
  run_stages(
      typename Rows<T, kCoded>::Ring{ring}, steps, [&](int step, char* slot) { rows.start_keys(index(step), slot); },
      [&](int step, char* slot) { rows.start_values(index(step), slot); },
      [&](int step, const char* slot) {
        FragmentC s[kTiles][1] = {};
        rows.keys(slot, queries, s);
        const int start = index(step) * kRowStep, end = start + kRowStep;
        const bool all =
            end <= rows.span.uncoded() && all_visible(p, rows.span, rows.position(start), rows.position(end - 1));
        mask_scores(s, factor, p, rows.at, rows.span, all, [&](int i) {
          const int token = start + lane() / 4 + 8 * i;
          return token < rows.span.uncoded() ? rows.position(token) : -1;
        });
        softmax_step(state, s, p.d);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) weight[n] = weights_of<T>(s[n][0]);
      },
      [&](int, const char* slot) { rows.values(slot, weight, state); });
}

// ---- codes ---------------------------------------------------------------------------------------------------------

template <int kBits>
struct Coded {
  const Params& p;
  const Program& at;
  const Span& span;

  static constexpr int kCodeBytes = kCodeStep * kMostChannels * kBits / 8, kScaleBytes = 512;
  using Ring = Stages<kBits == 8 ? 1 : kBits == 4 ? 2 : 3, kCodeBytes + kScaleBytes>;
  static constexpr int kCopies = kBits;  // of 16 bytes a lane makes of a tile at most

  // Group of the storage, and token in it, of the first token of a step.
  struct Where {
    int64_t group;
    int token;
  };
  VK_MEMBER Where where(int step) const {
    const Spot spot = spot_of(p, at.sample, span.coded_from, step * kCodeStep);
    return {(spot.page * p.m + at.head) * (p.page >> p.group_bits) + (spot.row >> p.group_bits),
            spot.row & (p.group - 1)};
  }
  VK_MEMBER int position(int step) const { return p.sinks + span.coded_from + step * kCodeStep; }

  // Vector i x 32 + lane of a tile: four words, of rows 4 spread(g) .. + 3 of the product, word `word` of unit `unit`.
  struct Piece {
    int unit, g, word;
  };
  VK_DEVICE Piece piece(int i) {
    if constexpr (kBits == 8) return {i / 2, lane() / 4, lane() % 4 * 2 + i % 2};
    if constexpr (kBits == 4) return {i, lane() / 4, lane() % 4};
    return {2 * i + lane() / 16, lane() % 16 / 2, lane() % 2};
  }
  // The words of unit `unit` this lane unpacks, for each of its four rows.
  struct Words {
    Vector part[Codes<kBits>::kWords];
    VK_MEMBER void of(int row, uint32_t (&word)[Codes<kBits>::kWords]) const {
#pragma unroll
      for (int i = 0; i < Codes<kBits>::kWords; ++i) word[i] = part[i].word[row];
    }
  };
  VK_DEVICE Words words(const char* slot, int unit) {
    Words w;
#pragma unroll
    for (int i = 0; i < Codes<kBits>::kWords; ++i)
      w.part[i] = load_shared(
          vector_at(slot, kBits == 2 ? 16 * unit + lane() / 2 : (Codes<kBits>::kWords * unit + i) * kWarp + lane()));
    return w;
  }
  VK_DEVICE const f16* scales(const char* slot) { return reinterpret_cast<const f16*>(slot + kCodeBytes); }

  // Rows `row` and `row` + 1 of a lane's four.
  VK_DEVICE Operands decoded(const Words& packed, int row, const PairScale& scale) {
    uint32_t word[Codes<kBits>::kWords], upper[4], lower[4];
    packed.of(row, word);
    decode_pairs<kBits>(word, lane() % 4, scale, upper);
    packed.of(row + 1, word);
    decode_pairs<kBits>(word, lane() % 4, scale, lower);
    return operands(upper, lower);
  }

  // Keys: rows of words are 32 / kBits channels, columns tokens. Scales: delta of every channel, then zero.
  VK_MEMBER void start_keys(int step, char* slot) const {
    const Where w = where(step);
    const int rows = (p.d * kBits + 31) / 32;
    const uint32_t* codes = p.k_codes + w.group * rows * p.group + w.token;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Piece x = piece(i);
      if (32 * x.unit >= p.d) continue;
      const int row = x.unit * kBits + x.word;
      copy_async16(vector_at(slot, i * kWarp + lane()),
                   codes + at_most(row, rows - 1) * p.group + 4 * Codes<kBits>::spread(x.g), row < rows ? 16 : 0);
    }
    const int channel = lane() % 16 * 8;
    const f16* scale = p.k_scale + w.group * 2 * p.d;
    copy_async16(vector_at(slot + kCodeBytes, lane()), scale + lane() / 16 * p.d + at_most(channel, p.d - 8),
                 channel < p.d ? 16 : 0);
  }
  // Values: rows of words are 32 / kBits tokens, columns channels; unit 2 u + h is channels 64 u + 8 g + 4 h .. + 3 of
  // row g. Scales: of every group of channels delta of 32 tokens, then zero.
  VK_MEMBER void start_values(int step, char* slot) const {
    const Where w = where(step);
    const int columns = (p.d + 15) / 16 * 16, groups = (p.d + p.group - 1) >> p.group_bits;
    const uint32_t* codes = p.v_codes + (w.group * p.group + w.token) / 32 * kBits * columns;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Piece x = piece(i);
      if (32 * (x.unit & ~1) >= p.d) continue;
      const int column = x.unit / 2 * 64 + 8 * x.g + x.unit % 2 * 4;
      copy_async16(vector_at(slot, i * kWarp + lane()), codes + x.word * columns + at_most(column, columns - 4),
                   column < columns ? 16 : 0);
    }
    const int group = lane() / 8, zero = lane() / 4 % 2;
    const f16* scale = p.v_scale + w.group * 2 * groups * p.group + w.token;
    copy_async16(vector_at(slot + kCodeBytes, lane()),
                 scale + (zero * groups + at_most(group, groups - 1)) * p.group + lane() % 4 * 8,
                 group < groups ? 16 : 0);
  }

  template <int kTiles>
  VK_MEMBER void keys(const char* slot, const uint16_t* queries, FragmentC (&s)[kTiles][2]) const {
#pragma unroll
    for (int unit = 0; unit < kMostChannels / 32; ++unit) {
      if (32 * unit >= p.d) break;
      const f16* delta = scales(slot) + 32 * unit;
      const PairScale scale = load_pair_scale<kBits>(delta, delta + kMostChannels, lane() % 4);
      const Words packed = words(slot, unit);
      Vector q[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) q[n] = query(queries, n, unit);
#pragma unroll
      for (int step = 0; step < 2; ++step) multiply_queries<f16>(s, step, decoded(packed, 2 * step, scale), q);
    }
  }

  // Tokens nobody sees count 0 times whatever they hold.
  VK_MEMBER void hide(PairScale& scale, int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t live = 0;
      for (int e = 0; e < 2; ++e)
        live |= first + 4 * Codes<kBits>::spread(lane() % 4 * 2 + e) + i >= span.seen ? 0xffffu << (16 * e) : 0;
      scale.delta[i] &= live;
      scale.centre[i] &= live;
    }
  }

  template <int kTiles>
  VK_MEMBER void values(const char* slot, int step, const FragmentB (&weight)[kTiles][2], State<kTiles>& state) const {
    const int groups = (p.d + p.group - 1) >> p.group_bits;
#pragma unroll
    for (int unit = 0; unit < kMostChannels / 64; ++unit) {
      if (64 * unit >= p.d) break;
      const int group = at_most((64 * unit + lane() / 4 * 8) >> p.group_bits, groups - 1);
      const f16* delta = scales(slot) + group * 64;
      PairScale scale = load_pair_scale<kBits>(delta, delta + 32, lane() % 4);
      if (position(step) < span.seen) hide(scale, position(step));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Words packed = words(slot, 2 * unit + half);
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const Operands a = decoded(packed, 2 * y, scale);
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
              multiply_add<f16>(state.out[n][4 * unit + 2 * half + y], a.step[k], weight[n][k]);
        }
      }
    }
  }
};

// `queries`: below 1 in float16, in the order codes come in; `norms`: the powers of two they were divided by. What is
// decoded is half of what it stands for: scores are doubled here, and so are the outputs at last.
template <int kBits, int kTiles>
VK_DEVICE void attend_codes(const Coded<kBits>& coded, const Share& share, char* ring, const uint16_t* queries,
                            const float* norms, State<kTiles>& state) {
  const Params& p = coded.p;
  const Span& span = coded.span;
  const int first = share.codes_from + warp();
  const int steps = steps_of(at_least(share.codes_to - first, 0), kWarps);
  const auto index = [&](int step) { return first + step * kWarps; };
  FragmentB weight[kTiles][2];
  run_stages(
      typename Coded<kBits>::Ring{ring}, steps, [&](int step, char* slot) { coded.start_keys(index(step), slot); },
      [&](int step, char* slot) { coded.start_values(index(step), slot); },
      [&](int step, const char* slot) {
        FragmentC s[kTiles][2] = {};
        coded.keys(slot, queries, s);
        float factor[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            factor[n][e] = 2.0f * p.scale * load_shared(norms + kQueries * n + lane() % 4 * 2 + e);
        const int position = coded.position(index(step));
        const bool all = all_visible(p, span, position, position + kCodeStep - 1);
        mask_scores(s, factor, p, coded.at, span, all,
                    [&](int i) { return position + 4 * Codes<kBits>::spread(lane() / 4) + i; });
        softmax_step(state, s, p.d);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k) weight[n][k] = weights_of<f16>(s[n][k]);
      },
      [&](int step, const char* slot) { coded.values(slot, index(step), weight, state); });
  float twofold[kTiles][2];
  for (int n = 0; n < kTiles; ++n) twofold[n][0] = twofold[n][1] = 2.0f;
  rescale_outputs(state, p.d, twofold);
}

}  // namespace vk::decode
