#include "attention_backward_cuda.h"

namespace vk {
namespace {

// One warp a block of queries.
VK_KERNEL(128)
note_spans(const BackwardParams p) {
  const Mask& mask = p.problem.mask;
  const int64_t index = block_x() * (thread_count() / kWarp) + warp();
  const int block = static_cast<int>(index % p.blocks), interval = static_cast<int>(index / p.blocks % mask.intervals);
  Place at{};
  at.sample = index / p.blocks / mask.intervals;
  if (at.sample >= p.problem.schedule.samples) return;
  at.live_q = live_tokens(mask.q, at.sample), at.live_k = live_tokens(mask.k, at.sample);
  Span span{kFar, 0, 0, kFar};
  for (int i = block * kSpanned + lane(); i < (block + 1) * kSpanned; i += kWarp)
    span = joined(span, span_of(i < at.live_q ? interval_of(mask, at, i, interval) : KeyRange{0, 0}, i < at.live_q));
  span = joined_over_warp(span);
  if (lane() == 0) store(p.spans + index, span);
}

}  // namespace

void launch_note_spans(const BackwardParams& p, int64_t samples, const Stream& stream) {
  launch("attention, note_spans", note_spans, {(samples * p.problem.mask.intervals * p.blocks + 3) / 4, 1, 128}, stream,
         p);
}

void attention_backward_cuda(const AttentionParams& p, const AttentionWorkspace& room, const Stream& stream) {
  if (p.mask.q_attr) return attention_backward_windows(p, room, stream);
  p.q.dtype == Dtype::bf16 ? by_head_size<bf16, false>(p, room, stream) : by_head_size<f16, false>(p, room, stream);
}

}  // namespace vk
