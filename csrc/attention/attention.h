#pragma once

#include <vector>

#include "vkernels/cpu/isa.h"
#include "vkernels/tensor.h"

namespace vk {

// `groups` independent problems of len_q x len_k; index i of group g is token row g * group + i * token of its stride.
struct AttentionLayout {
  int64_t groups = 1, len_q = 0, len_k = 0, q_group = 0, q_token = 1, k_group = 0, k_token = 1;
};

namespace attention {
inline constexpr int kMaxRelations = 8;  // of a box
}

struct AttentionMask {
  AttentionLayout layout;
  TensorRef q_rows, k_rows;    // p s, int32
  TensorRef q_count, k_count;  // p, int32
  TensorRef ranges;            // p len_q 2R, int32
  TensorRef q_attr, k_attr;    // p A len, int32
  std::vector<int64_t> bounds;
  TensorRef q_global, k_global;  // p len, uint8

  // Live queries and keys of one batch entry, whatever the tensor says.
  static int64_t count(const TensorRef& t, int64_t batch, int64_t length) {
    if (!t) return length;
    const int64_t n = t.ptr<const int32_t>()[t.size(0) == 1 ? 0 : batch * t.stride(0)];
    return n < 0 ? 0 : n > length ? length : n;
  }
  int64_t live_q(int64_t batch) const { return count(q_count, batch, layout.len_q); }
  int64_t live_k(int64_t batch) const { return count(k_count, batch, layout.len_k); }
};

// Queries [q_begin, q_end) or keys [k_begin, k_end) of one key/value head of one group of one batch entry.
struct AttentionTask {
  int64_t batch, group, head, q_begin, q_end, k_begin, k_end;
  bool want_q, want_kv;
  double work;
};
std::vector<AttentionTask> attention_forward_tasks(const AttentionMask& mask, int64_t b, int64_t m);
std::vector<AttentionTask> attention_backward_tasks(const AttentionMask& mask, int64_t b, int64_t m);

struct AttentionParams {
  TensorRef q;     // b s_q n d
  TensorRef k, v;  // b s_k m d
  TensorRef o;     // b s_q n d
  TensorRef lse;   // b n s_q, float
  double scale = 1;
  AttentionMask mask;
  TensorRef dout, dlse, dq, dk, dv;  // backward only; dlse optional
};

VK_DECLARE_KERNEL(void attention_forward(const AttentionParams& p, const AttentionTask* tasks, int64_t count))
VK_DECLARE_KERNEL(void attention_backward(const AttentionParams& p, const AttentionTask* tasks, int64_t count))

}  // namespace vk
