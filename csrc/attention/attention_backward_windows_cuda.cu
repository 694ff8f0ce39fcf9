#include "attention_backward_cuda.h"

namespace vk {

void attention_backward_windows(const AttentionParams& p, const AttentionWorkspace& room, const Stream& stream) {
  p.q.dtype == Dtype::bf16 ? by_head_size<bf16, true>(p, room, stream) : by_head_size<f16, true>(p, room, stream);
}

}  // namespace vk
