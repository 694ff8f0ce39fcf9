#pragma once

#include "qkv_prologue.h"
#include "vkernels/device/stream.h"

namespace vk {

inline constexpr int64_t kLongestHead = 256;  // elements
inline constexpr int64_t kMostAxisRows = 64;  // rows of a spec's axes: angles of a token lie in shared memory

// Sums over tokens leave the kernel as rows of partial ones, which the caller adds in order.
struct QkvPrologueCudaBackward {
  QkvPrologueParams forward;  // `out` holds the gradients that come in
  TensorRef dqkv;             // b s (n+2m)*d
  TensorRef stats;            // tokens 4 float where a norm spans all heads: written, then read; else absent
  TensorRef partials;         // rows columns float; columns: bias, q norm of every head, k norm of every head
};

void qkv_prologue_cuda(const QkvPrologueParams& p, const device::Stream& stream);
void qkv_prologue_bwd_cuda(const QkvPrologueCudaBackward& p, const device::Stream& stream);

}  // namespace vk
