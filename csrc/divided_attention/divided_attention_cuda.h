#pragma once

#include "divided_attention.h"
#include "vkernels/device/stream.h"

namespace vk {

// The rotation of q and k, where it happens inside: served for packed sequences in time, each head with keys of its
// own, and pairs of neighbours, or of halves at heads of 64 and 128.
struct Turn {
  TensorRef angles;  // b|1 t d float32, contiguous: cosines of the pairs of a frame, then sines; absent: none
  bool neighbours = false;
};

// What the kernels need beside the tensors of the call, float32; the groups' parts of the CLS's rows lie in
// ShortAttention's shared_q, shared_k and shared_v, stats [b outer inner n len_q 2] hold what two kernels share.
void divided_attention_forward_cuda(const DividedAttention& p, const Turn& turn, const device::Stream& stream);
void divided_attention_backward_cuda(const DividedAttention& p, const Turn& turn, float* stats,
                                     const device::Stream& stream);

// Sequences up to this length are packed, several to a warp; they need no stats.
inline constexpr int64_t kPackedLength = 16;

}  // namespace vk
