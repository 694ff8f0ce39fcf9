#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/rope.h"

namespace vk {

struct QkvPrologueParams {
  TensorRef qkv;      // b s (n+2m)*d
  TensorRef bias;     // (n+2m)*d float, or absent
  TensorRef norm[2];  // q, k: d float, or heads*d where one norm spans all heads; or absent
  TensorRef out[3];   // q: b s n d; k, v: b s m d, any strides but the last
  RopeArgs rope;      // no pairs: nothing turns
  double eps = 0;
  bool post = false;       // norm after the rotation
  bool all_heads = false;  // one norm over all heads of a token
};

// Sums over tokens are made of `kPartials` partial sums, whatever the number of threads.
inline constexpr int64_t kPartials = 64;

struct QkvPrologueBackwardParams {
  QkvPrologueParams forward;  // `out` holds the gradients that come in
  TensorRef dqkv;             // b s (n+2m)*d
  TensorRef partials;         // kPartials columns float, zeros; columns: bias, q norm, k norm
  TensorRef sums;             // columns float
};

VK_DECLARE_KERNEL(void qkv_prologue(const QkvPrologueParams& p))
VK_DECLARE_KERNEL(void qkv_prologue_bwd(const QkvPrologueBackwardParams& p))

}  // namespace vk
