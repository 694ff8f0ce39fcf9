#pragma once

#include "divided_attention.h"
#include "vkernels/device/stream.h"

namespace vk {

// The rotation of q and k, where it happens inside: in time, of whole heads.
struct Turn {
  TensorRef angles;  // b|1 t d float32, contiguous: cosines of the pairs of a frame, then sines; absent: none
  bool neighbours = false;
};

// What the kernels need beside the tensors of the call, float32; the groups' parts of the CLS's rows lie in
// ShortAttention's shared_q, shared_k and shared_v, stats [b outer inner n len_q 2] hold what two kernels share.
void divided_attention_forward_cuda(const DividedAttention& p, const Turn& turn, const device::Stream& stream);
void divided_attention_backward_cuda(const DividedAttention& p, const Turn& turn, float* stats,
                                     const device::Stream& stream);

inline constexpr int64_t kPackedLength = 16, kTurnedLength = 128;

// Short sequences are packed, several to a warp, and need no stats. Those that are turned, if both elements of a pair
// lie in one lane and no gradients of heads are summed.
inline bool is_packed(const ShortAttention& a, const Turn& turn) {
  if (a.q_rows.shared || a.len_q > kPackedLength) return false;
  const int64_t d = a.q.size(3);
  return !turn.angles.given || (a.q.size(2) == a.k.size(2) && (turn.neighbours || d == 64 || d == 128));
}

}  // namespace vk
