// What the warps of a block and the blocks of a sequence found, joined in one fixed order: warps through shared memory,
// splits through a workspace by whichever block comes last.
#pragma once

#include "decode_state.h"
#include "vkernels/device/ticket.h"

namespace vk::decode {

// Shared memory beside the rings: queries as they came, and as float16 below 1 where there are codes.
template <int kTiles>
struct Shared {
  static constexpr int kRows = kQueries * kTiles;
  alignas(16) uint16_t raw[kRows * kMostChannels];
  alignas(16) uint16_t unit[kRows * kMostChannels];
  float norm[kRows];
  float top[kWarps][kRows], total[kWarps][kRows];
  int flag;
};

// Joined so far: the largest score and the sum of weights over it.
struct Weights {
  float base, total;
};

struct FourFloats {
  float value[4];
};
VK_DEVICE FourFloats four_floats(const Vector& v) {
  return {{bits_float(v.word[0]), bits_float(v.word[1]), bits_float(v.word[2]), bits_float(v.word[3])}};
}
VK_DEVICE Vector as_vector(const FourFloats& x) {
  return {{float_bits(x.value[0]), float_bits(x.value[1]), float_bits(x.value[2]), float_bits(x.value[3])}};
}
VK_DEVICE void add(FourFloats& sum, const FourFloats& x, float weight) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.value[i] = fmaf(x.value[i], weight, sum.value[i]);
}

// Four channels of a query, and its lse with the first of them.
VK_DEVICE void store_result(const Params& p, const Program& at, int row, int channel, const FourFloats& sum,
                            const Weights& w) {
  struct alignas(8) Four {
    uint32_t word[2];
  };
  const int shared = at.row + row, token = shared % p.s;
  const int64_t n = int64_t{at.head} * p.share + shared / p.s, heads = int64_t{p.m} * p.share;
  const float by = inverse_of(w.total);
  Four four;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = sum.value[2 * i] * by, high = sum.value[2 * i + 1] * by;
    four.word[i] = p.brain ? round_two(low, high, bf16{}) : round_two(low, high, f16{});
  }
  uint16_t* o = p.o + ((int64_t{at.sample} * p.s + token) * heads + n) * p.d + channel;
  store(reinterpret_cast<Four*>(o), four);
  if (channel == 0) store(p.lse + (int64_t{at.sample} * heads + n) * p.s + token, natural_lse(w.base, w.total));
}

template <int kTiles>
VK_DEVICE int64_t part_row(const Params& p, const Program& at, int split, int row) {
  return (int64_t{at.index} * p.splits + split) * kQueries * kTiles + row;
}

template <int kTiles>
VK_DEVICE Weights weights_of_warps(const Shared<kTiles>& shared, int row, float (&weight)[kWarps]) {
  float top = kNothing;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, load_shared(&shared.top[w][row]));
  Weights all{base_of(top, 1.0f), 0.0f};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weight[w] = exp2_fast(load_shared(&shared.top[w][row]) - all.base);
    all.total += load_shared(&shared.total[w][row]) * weight[w];
  }
  return all;
}

// A warp's outputs as rows [8 kTiles, kMostChannels] of floats.
template <int kTiles>
VK_DEVICE void put_outputs(const Params& p, const State<kTiles>& state, float* rows) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float* row = rows + (kQueries * n + lane() % 4 * 2 + e) * kMostChannels;
#pragma unroll
      for (int y = 0; y < kMostChannels / 16; y += 2) {
        const FragmentC &a = state.out[n][y], &b = state.out[n][y + 1];
        const FourFloats four{{a.value[e], a.value[2 + e], b.value[e], b.value[2 + e]}};
        const int channel = y / 4 * 64 + lane() / 4 * 8 + y % 4 * 2;
        if (channel < p.d) store_shared(reinterpret_cast<Vector*>(row + channel), as_vector(four));
      }
    }
}

// The block's queries, from its warps: results where no other split has anything, else a part.
template <int kTiles>
VK_DEVICE void join_warps(const Params& p, const Program& at, State<kTiles>& state, int used, Shared<kTiles>& shared,
                          float* rows) {
  constexpr int kRows = kQueries * kTiles;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = kQueries * n + lane() % 4 * 2 + e;
      const float total = sum_of_column(state.total[n][e]);
      if (lane() / 4 != 0) continue;
      store_shared(&shared.top[warp()][row], state.top[n][e]);
      store_shared(&shared.total[warp()][row], total);
    }
  sync_block();  // nobody needs the rings any more
  put_outputs(p, state, rows + warp() * kRows * kMostChannels);
  sync_block();
  const int chunks = p.d / 4;
  for (int task = thread_index(); task < at.count * chunks; task += kThreads) {
    const int row = task / chunks, channel = task % chunks * 4;
    float weight[kWarps];
    const Weights all = weights_of_warps(shared, row, weight);
    FourFloats sum{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* from = rows + (w * kRows + row) * kMostChannels + channel;
      add(sum, four_floats(load_shared(reinterpret_cast<const Vector*>(from))), weight[w]);
    }
    if (used == 1) {
      store_result(p, at, row, channel, sum, all);
      continue;
    }
    const int64_t mine = part_row<kTiles>(p, at, block_y(), row);
    store16(p.part + mine * p.d + channel, as_vector(sum));
    if (channel == 0) store(p.stats + 2 * mine, all.base), store(p.stats + 2 * mine + 1, all.total);
  }
}

// The weight of every split in every row, and per row what they sum to. A warp takes rows of its own.
template <int kTiles>
VK_DEVICE void weigh_splits(const Params& p, const Program& at, int used, Shared<kTiles>& shared, float* weights) {
  for (int row = warp(); row < at.count; row += kWarps) {
    const auto stat = [&](int split, int i) { return load(p.stats + 2 * part_row<kTiles>(p, at, split, row) + i); };
    float base = kNothing, total = 0.0f;
    for (int split = lane(); split < used; split += kWarp)
      if (stat(split, 1) != 0.0f) base = fmaxf(base, stat(split, 0));
    base = base_of(max_over_lanes(base), 1.0f);
    for (int split = lane(); split < used; split += kWarp) {
      const float theirs = stat(split, 1), weight = theirs == 0.0f ? 0.0f : exp2_fast(stat(split, 0) - base);
      store_shared(weights + row * used + split, weight);
      total += theirs * weight;
    }
    total = sum_over_lanes(total);
    if (lane() == 0) store_shared(&shared.top[0][row], base), store_shared(&shared.total[0][row], total);
  }
}

// Results from the parts of all splits, in their order.
template <int kTiles>
VK_DEVICE void join_splits(const Params& p, const Program& at, int used, Shared<kTiles>& shared, float* weights) {
  weigh_splits(p, at, used, shared, weights);
  sync_block();
  const int chunks = p.d / 4;
  for (int task = thread_index(); task < at.count * chunks; task += kThreads) {
    const int row = task / chunks, channel = task % chunks * 4;
    FourFloats sum{};
#pragma unroll 8
    for (int split = 0; split < used; ++split) {
      const Vector theirs = load16(p.part + part_row<kTiles>(p, at, split, row) * p.d + channel);
      add(sum, four_floats(theirs), load_shared(weights + row * used + split));
    }
    store_result(p, at, row, channel, sum, {load_shared(&shared.top[0][row]), load_shared(&shared.total[0][row])});
  }
}

}  // namespace vk::decode
