// The softmax of rows that lie in fragments, in base 2. A lane holds parts of two rows of each 16-row tile (half 0:
// row lane / 4, half 1: eight below); the four lanes of a quad hold a row together.
#pragma once

#include "vkernels/device/matrix.h"

namespace vk::device {

inline constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
inline constexpr float kNothing = -__builtin_huge_valf();  // a score that is hidden, the maximum of none

template <int N>
VK_DEVICE float max_of_row(const FragmentC (&s)[N], int half) {
  float top = s[0].value[2 * half];
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, fmaxf(s[i].value[2 * half], s[i].value[2 * half + 1]));
  return max_over_lanes<4>(top);
}

// Only this lane's part of it; `sum_over_lanes<4>` completes it.
template <int N>
VK_DEVICE float sum_of_row(const FragmentC (&s)[N], int half) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += s[i].value[2 * half] + s[i].value[2 * half + 1];
  return sum;
}

// What is subtracted from the scores of a row: 0 where it has seen nothing, so that -inf - (-inf) never happens.
VK_DEVICE float base_of(float top, float scale) { return top == kNothing ? 0.0f : top * scale; }

// Natural logarithm of a sum of powers of two over `base`; -inf where nothing was summed.
VK_DEVICE float natural_lse(float base, float total) {
  return total == 0.0f ? kNothing : (base + log2_fast(total)) * kLn2;
}

// What results are multiplied by at last; a row that saw nothing stays 0.
VK_DEVICE float inverse_of(float total) { return 1.0f / (total > 0.0f ? total : 1.0f); }

// A natural lse in base 2; +inf where a row saw nothing, which makes every weight of it 0.
VK_DEVICE float lse_to_subtract(float lse) { return lse == kNothing ? -kNothing : lse * kLog2e; }

// The two rows of a lane while scores pass by.
struct OnlineSoftmax {
  float top[2] = {kNothing, kNothing};  // of the scores as they come, not yet scaled
  float total[2] = {0, 0};              // this lane's part
};

// Scores become weights 2^(scale s - the maximum so far); what was summed before must be multiplied by `keep`.
// `scale` > 0 holds the factor log2 e.
template <int N>
VK_DEVICE void softmax_step(OnlineSoftmax& row, FragmentC (&s)[N], float scale, float (&keep)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = fmaxf(row.top[half], max_of_row(s, half)), base = base_of(top, scale);
    keep[half] = exp2_fast(row.top[half] * scale - base);
    row.top[half] = top;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) s[i].value[j] = exp2_fast(fmaf(s[i].value[j], scale, -base));
    row.total[half] = row.total[half] * keep[half] + sum_of_row(s, half);
  }
}

// Multiplies what was summed before.
template <int N>
VK_DEVICE void rescale(FragmentC (&acc)[N], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i].value[j] *= by[j / 2];
}

// The whole sum of both rows, once the last score has passed.
VK_DEVICE void complete(OnlineSoftmax& row) {
  for (float& total : row.total) total = sum_over_lanes<4>(total);
}

}  // namespace vk::device
