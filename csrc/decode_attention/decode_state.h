// The online softmax of decode_attention. Keys are the rows of a product and queries its columns, so that a few queries
// fill an instruction: scores are K q', outputs V' p'. A lane holds parts of queries 8 n + 2 (lane % 4) and the one
// after it; the eight lanes of a column hold a query together.
#pragma once

#include "decode_params.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/softmax.h"

namespace vk::decode {

// Over the eight lanes of a column, in one fixed order.
VK_DEVICE float max_of_column(float x) {
#pragma unroll
  for (int bits = 4; bits < kWarp; bits *= 2) x = fmaxf(x, shuffle_xor(x, bits));
  return x;
}
VK_DEVICE float sum_of_column(float x) {
#pragma unroll
  for (int bits = 4; bits < kWarp; bits *= 2) x += shuffle_xor(x, bits);
  return x;
}

template <int kTiles>
struct State {
  float top[kTiles][2], total[kTiles][2];  // totals: this lane's part
  // Fragment 4 u + y: rows lane / 4 and eight below are channels 64 u + 8 (lane / 4) + 2 y and the one after it.
  FragmentC out[kTiles][kMostChannels / 16];
};

template <int kTiles>
VK_DEVICE void start_state(State<kTiles>& x) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) x.top[n][e] = kNothing, x.total[n][e] = 0;
#pragma unroll
    for (FragmentC& out : x.out[n]) out = {};
  }
}

// Multiplies what was summed before.
template <int kTiles>
VK_DEVICE void rescale_outputs(State<kTiles>& x, int d, const float (&keep)[kTiles][2]) {
#pragma unroll
  for (int u = 0; u < kMostChannels / 64; ++u) {
    if (64 * u >= d) break;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int y = 4 * u; y < 4 * u + 4; ++y)
#pragma unroll
        for (int i = 0; i < 4; ++i) x.out[n][y].value[i] *= keep[n][i % 2];
  }
}

// Whether every query sees every token at positions `first` .. `last`.
VK_DEVICE bool all_visible(const Params& p, const Span& span, int first, int last) {
  return last <= span.length - p.s && (span.window == 0 || first >= span.length - span.window);
}

// Scores of kSteps x 16 tokens, in base 2, and -inf where a query does not see them. `position(i)` is where the token
// of row lane / 4 + 8 (i % 2) of step i / 2 stands, or -1 for none; `all`: every query sees every one of them.
template <int kTiles, int kSteps, class Position>
VK_DEVICE void mask_scores(FragmentC (&s)[kTiles][kSteps], const float (&factor)[kTiles][2], const Params& p,
                           const Program& at, const Span& span, bool all, const Position& position) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int last = all ? 0 : span.length - p.s + (at.row + kQueries * n + lane() % 4 * 2 + e) % p.s;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        float& score = s[n][i / 2].value[2 * (i % 2) + e];
        score *= factor[n][e];
        if (all) continue;
        const int token = position(i);
        const bool sees = token >= 0 && token <= last && (span.window == 0 || token > last - span.window);
        score = sees ? score : kNothing;
      }
    }
}

// Scores become weights over the largest score so far; what was summed before is rescaled where that has changed.
template <int kTiles, int kSteps>
VK_DEVICE void softmax_step(State<kTiles>& x, FragmentC (&s)[kTiles][kSteps], int d) {
  float keep[kTiles][2];
  bool moved = false;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto score = [&](int i) -> float& { return s[n][i / 2].value[2 * (i % 2) + e]; };
      float top = score(0);
#pragma unroll
      for (int i = 1; i < 2 * kSteps; ++i) top = fmaxf(top, score(i));
      top = fmaxf(x.top[n][e], max_of_column(top));
      const float base = base_of(top, 1.0f);
      moved = moved || top > x.top[n][e];
      keep[n][e] = exp2_fast(x.top[n][e] - base);
      x.top[n][e] = top;
      x.total[n][e] *= keep[n][e];
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        score(i) = exp2_fast(score(i) - base);
        x.total[n][e] += score(i);
      }
    }
  if (ballot(moved) != 0) rescale_outputs(x, d, keep);
}

// The weights of 16 tokens as the right operand of the product with their values.
template <class T>
VK_DEVICE FragmentB weights_of(const FragmentC& s) {
  return {{transpose_matrix(round_two(s.value[0], s.value[1], T{})),
           transpose_matrix(round_two(s.value[2], s.value[3], T{}))}};
}

}  // namespace vk::decode
