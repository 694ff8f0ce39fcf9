// The problem short_attention_kernel.h solves: many short sequences whose rows stand anywhere in memory.
#pragma once

#include "vkernels/tensor.h"

namespace vk {

// Token row of index i in group (outer, inner). With `shared`, index 0 is token row 0, in every group; the others come
// in runs of `run` tokens.
struct ShortRows {
  int64_t first = 0, outer_stride = 0, inner_stride = 0, token_stride = 0;
  int64_t run = INT64_MAX, run_stride = 0;
  int64_t shared = 0;

  int64_t row(int64_t outer, int64_t inner, int64_t i) const {
    if (i < shared) return 0;
    i -= shared;
    const int64_t begin = first + outer * outer_stride + inner * inner_stride;
    if (i < run) return begin + i * token_stride;  // a division per row is what the kernel would notice
    return begin + i / run * run_stride + i % run * token_stride;
  }
};

// q_rows.shared == k_rows.shared: the groups share token row 0. Its output is the mean of the groups' outputs; what the
// groups make of it is kept apart, float, in `shared_*` [b][outer][inner][heads][d], until all are there.
struct ShortAttention {
  TensorRef q, k, v;     // b s n d, b s m d, b s m d
  TensorRef o;           // forward: b s n d
  TensorRef lse;         // forward, optional, not with shared: b n s, float
  TensorRef grad_o;      // backward: b s n d
  TensorRef grad_lse;    // backward, optional, not with shared: b n s, float
  TensorRef dq, dk, dv;  // backward
  int64_t outer = 1, inner = 0, len_q = 0, len_k = 0;
  ShortRows q_rows, k_rows;
  float scale = 1.0f;
  float *shared_q = nullptr, *shared_k = nullptr, *shared_v = nullptr;  // shared_q: of o, and of dq

  int64_t groups() const { return outer * inner; }
  // Entry of lse or grad_lse for query i of a group.
  float* at(const TensorRef& t, int64_t batch, int64_t head, int64_t out, int64_t in, int64_t i) const {
    return t.ptr<float>() + batch * t.stride(0) + head * t.stride(1) + q_rows.row(out, in, i) * t.stride(2);
  }
};

}  // namespace vk
