// attention over every batch entry, group and key/value head: the core of vkernels/cpu/attention_core.h on each task,
// and zeros where dropped tokens stand.
#include "attention.h"
#include "vkernels/cpu/attention_backward.h"
#include "vkernels/cpu/short_attention_kernel.h"

namespace vk::VK_ISA {
namespace {

template <class T>
const T* batch_row(const TensorRef& t, int64_t batch) {
  return t ? t.ptr<const T>() + (t.size(0) == 1 ? 0 : batch) * t.stride(0) : nullptr;
}

template <class T>
T* at(const TensorRef& t, int64_t batch, int64_t head) {
  return t.ptr<T>() + batch * t.stride(0) + head * t.stride(2);
}

template <class T>
AttentionProblem<T> problem(const AttentionParams& p, const AttentionTask& task) {
  const AttentionMask& mask = p.mask;
  const AttentionLayout& layout = mask.layout;
  AttentionProblem<T> x;
  x.heads = p.q.size(2) / p.k.size(2);
  const int64_t first = task.head * x.heads;
  x.q = at<const T>(p.q, task.batch, first);
  x.k = at<const T>(p.k, task.batch, task.head);
  x.v = at<const T>(p.v, task.batch, task.head);
  x.o = at<T>(p.o, task.batch, first);
  x.lse = p.lse.ptr<float>() + task.batch * p.lse.stride(0) + first * p.lse.stride(1);
  x.q_token = p.q.stride(1), x.k_token = p.k.stride(1), x.v_token = p.v.stride(1), x.o_token = p.o.stride(1);
  x.q_head = p.q.stride(2), x.o_head = p.o.stride(2), x.lse_head = p.lse.stride(1);
  x.d = p.q.size(3);
  x.q_rows = {batch_row<int32_t>(mask.q_rows, task.batch), task.group * layout.q_group, layout.q_token};
  x.k_rows = {batch_row<int32_t>(mask.k_rows, task.batch), task.group * layout.k_group, layout.k_token};
  x.len_q = mask.live_q(task.batch), x.len_k = mask.live_k(task.batch);
  x.scale = static_cast<float>(p.scale);
  if (mask.ranges) {
    x.ranges = batch_row<int32_t>(mask.ranges, task.batch);
    x.range_row = mask.ranges.stride(1);
    x.intervals = static_cast<int>(mask.ranges.size(2) / 2);
  }
  if (mask.q_attr) {
    x.box.relations = static_cast<int>(mask.q_attr.size(1));
    x.box.q_attr = batch_row<int32_t>(mask.q_attr, task.batch), x.box.q_stride = mask.q_attr.stride(1);
    x.box.k_attr = batch_row<int32_t>(mask.k_attr, task.batch), x.box.k_stride = mask.k_attr.stride(1);
    x.box.bounds = mask.bounds.data();
    x.box.q_global = batch_row<uint8_t>(mask.q_global, task.batch);
    x.box.k_global = batch_row<uint8_t>(mask.k_global, task.batch);
  }
  return x;
}

// Rows [live, length) of a row map hold the dropped tokens: x is zero there.
template <class T>
void zero_dropped(const TensorRef& x, const TensorRef& rows, int64_t live, int64_t length, int64_t batch) {
  if (!rows) return;
  const int32_t* map = batch_row<int32_t>(rows, batch);
  const size_t bytes = sizeof(T) * static_cast<size_t>(x.size(2) * x.size(3));
  for (int64_t i = live; i < length; ++i) memset(x.ptr<T>() + batch * x.stride(0) + map[i] * x.stride(1), 0, bytes);
}

// Groups this short are bound by memory and packing, not by arithmetic: they have a kernel of their own.
constexpr int64_t kShort = 64;

bool is_short(const AttentionMask& mask) {
  const AttentionLayout& l = mask.layout;
  return l.groups > 1 && l.len_q == l.len_k && l.len_q <= kShort && !mask.ranges && !mask.q_attr && !mask.q_rows &&
         !mask.k_rows;
}

ShortAttention short_problem(const AttentionParams& p) {
  const AttentionLayout& l = p.mask.layout;
  ShortAttention x;
  x.q = p.q, x.k = p.k, x.v = p.v, x.o = p.o, x.lse = p.lse;
  x.grad_o = p.dout, x.grad_lse = p.dlse;
  x.dq = p.dq, x.dk = p.dk, x.dv = p.dv;
  x.inner = l.groups;
  x.len_q = l.len_q, x.len_k = l.len_k;
  x.q_rows.inner_stride = l.q_group, x.q_rows.token_stride = l.q_token;
  x.k_rows.inner_stride = l.k_group, x.k_rows.token_stride = l.k_token;
  x.scale = static_cast<float>(p.scale);
  return x;
}

// run(task, Products{}): in matrix tiles where the processor and T have them.
template <class T, class Run>
void each_task(int64_t count, const Run& run) {
#if defined(VK_HAS_TILES)
  if constexpr (kMultiplyPairs<T>)
    if (active_isa() == Isa::amx)
      return parallel_tasks(count, [&](int64_t i) {
        const Tiles::Configured tiles;
        run(i, Tiles{});
      });
#endif
  parallel_tasks(count, [&](int64_t i) { run(i, Vectors<kMultiplyPairs<T>>{}); });
}

template <class T>
void forward(const AttentionParams& p, const AttentionTask* tasks, int64_t count) {
  const AttentionMask& mask = p.mask;
  if (is_short(mask)) return short_attention::forward<T>(short_problem(p));
  const int64_t b = p.q.size(0), n = p.q.size(2), len_q = mask.layout.len_q;
  for (int64_t batch = 0; batch < b && mask.q_rows; ++batch) {
    const int64_t live = mask.live_q(batch);
    const int32_t* map = batch_row<int32_t>(mask.q_rows, batch);
    zero_dropped<T>(p.o, mask.q_rows, live, len_q, batch);
    for (int64_t head = 0; head < n; ++head)
      for (int64_t i = live; i < len_q; ++i)
        p.lse.ptr<float>()[batch * p.lse.stride(0) + head * p.lse.stride(1) + map[i]] = -kInf;
  }
  each_task<T>(count, [&](int64_t i, auto products) {
    attention_forward<decltype(products)>(problem<T>(p, tasks[i]), tasks[i].q_begin, tasks[i].q_end);
  });
}

template <class T>
void backward(const AttentionParams& p, const AttentionTask* tasks, int64_t count) {
  const AttentionMask& mask = p.mask;
  if (is_short(mask)) return short_attention::backward<T>(short_problem(p));
  for (int64_t batch = 0; batch < p.q.size(0); ++batch) {
    zero_dropped<T>(p.dq, mask.q_rows, mask.live_q(batch), mask.layout.len_q, batch);
    zero_dropped<T>(p.dk, mask.k_rows, mask.live_k(batch), mask.layout.len_k, batch);
    zero_dropped<T>(p.dv, mask.k_rows, mask.live_k(batch), mask.layout.len_k, batch);
  }
  each_task<T>(count, [&](int64_t i, auto products) {
    const AttentionTask& task = tasks[i];
    const AttentionProblem<T> x = problem<T>(p, task);
    AttentionGradients<T> g;
    const int64_t first = task.head * x.heads;
    g.dout = at<const T>(p.dout, task.batch, first);
    g.dout_token = p.dout.stride(1), g.dout_head = p.dout.stride(2);
    if (p.dlse) {
      g.dlse = p.dlse.ptr<const float>() + task.batch * p.dlse.stride(0) + first * p.dlse.stride(1);
      g.dlse_head = p.dlse.stride(1), g.dlse_token = p.dlse.stride(2);
    }
    g.dq = at<T>(p.dq, task.batch, first), g.dq_token = p.dq.stride(1), g.dq_head = p.dq.stride(2);
    g.dk = at<T>(p.dk, task.batch, task.head), g.dk_token = p.dk.stride(1);
    g.dv = at<T>(p.dv, task.batch, task.head), g.dv_token = p.dv.stride(1);
    attention_backward<decltype(products)>(x, g, task.q_begin, task.q_end, task.k_begin, task.k_end, task.want_q,
                                           task.want_kv);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, const AttentionTask* tasks, int64_t count) {
  switch (p.q.dtype) {
    case Dtype::bf16:
      return forward<bf16>(p, tasks, count);
    case Dtype::f16:
      return forward<f16>(p, tasks, count);
    default:
      return forward<float>(p, tasks, count);
  }
}

void attention_backward(const AttentionParams& p, const AttentionTask* tasks, int64_t count) {
  switch (p.q.dtype) {
    case Dtype::bf16:
      return backward<bf16>(p, tasks, count);
    case Dtype::f16:
      return backward<f16>(p, tasks, count);
    default:
      return backward<float>(p, tasks, count);
  }
}

}  // namespace vk::VK_ISA
