// Space-time attention in groups of frames: the short-sequence kernel on every group, or, where groups are long and the
// processor has matrix tiles, the kernel of long sequences.
#include <vector>

#include "divided_attention.h"
#include "vkernels/cpu/attention_core.h"
#include "vkernels/cpu/short_attention_kernel.h"

namespace vk::VK_ISA {
namespace {

template <class T>
void zero_first_row(const TensorRef& t) {
  for (int64_t batch = 0; batch < t.size(0); ++batch)
    for (int64_t head = 0; head < t.size(2); ++head)
      memset(t.ptr<T>() + batch * t.stride(0) + head * t.stride(2), 0, sizeof(T) * static_cast<size_t>(t.size(3)));
}

#if defined(VK_HAS_TILES)
// The limit that attention has for its short groups, too; not tuned.
constexpr int64_t kLong = 64;

bool suits_tiles(const ShortAttention& p) {
  return active_isa() == Isa::amx && p.len_q >= kLong && p.len_k >= kLong && p.q.size(1) <= INT32_MAX &&
         p.k.size(1) <= INT32_MAX;
}

// [group][index] -> token row.
std::vector<int32_t> token_rows(const ShortAttention& p, const ShortRows& rows, int64_t length) {
  std::vector<int32_t> map;
  map.reserve(static_cast<size_t>(p.groups() * length));
  for (int64_t group = 0; group < p.groups(); ++group)
    for (int64_t i = 0; i < length; ++i)
      map.push_back(static_cast<int32_t>(rows.row(group / p.inner, group % p.inner, i)));
  return map;
}

// A task is a key head of a group; the heads of a group follow each other, so its rows come from memory once.
template <class T>
void forward_tiles(const ShortAttention& p) {
  const int64_t n = p.q.size(2), m = p.k.size(2), d = p.q.size(3), per_key = n / m, groups = p.groups();
  const std::vector<int32_t> q_rows = token_rows(p, p.q_rows, p.len_q), k_rows = token_rows(p, p.k_rows, p.len_k);
  parallel_tasks(p.q.size(0) * groups * m, [&](int64_t task) {
    const int64_t batch = task / (groups * m), group = task / m % groups, head = task % m;
    const auto at = [&](const TensorRef& t, int64_t first) {
      return t.ptr<T>() + batch * t.stride(0) + first * t.stride(2);
    };
    AttentionProblem<T> x;
    x.q = at(p.q, head * per_key), x.k = at(p.k, head), x.v = at(p.v, head), x.o = at(p.o, head * per_key);
    x.q_token = p.q.stride(1), x.k_token = p.k.stride(1), x.v_token = p.v.stride(1), x.o_token = p.o.stride(1);
    x.q_head = p.q.stride(2), x.o_head = p.o.stride(2);
    x.heads = per_key, x.d = d, x.scale = p.scale;
    x.q_rows.map = q_rows.data() + group * p.len_q, x.k_rows.map = k_rows.data() + group * p.len_k;
    x.len_q = p.len_q, x.len_k = p.len_k;
    if (p.q_rows.shared) x.first_o = p.shared_q + ((batch * groups + group) * n + head * per_key) * d;
    const Tiles::Configured tiles;
    attention_forward<Tiles>(x, 0, p.len_q);
  });
  if (p.q_rows.shared) short_attention::gather_shared<T>(p, p.o, p.shared_q, 1.0f / static_cast<float>(groups));
}
#endif

template <class T>
void forward(const DividedAttention& p) {
  if (p.zero_first) zero_first_row<T>(p.groups.o);
#if defined(VK_HAS_TILES)
  if constexpr (kMultiplyPairs<T>)
    if (suits_tiles(p.groups)) return forward_tiles<T>(p.groups);
#endif
  short_attention::forward<T>(p.groups);
}

template <class T>
void backward(const DividedAttention& p) {
  if (p.zero_first)
    for (const TensorRef* t : {&p.groups.dq, &p.groups.dk, &p.groups.dv}) zero_first_row<T>(*t);
  short_attention::backward<T>(p.groups);
}

}  // namespace

void divided_attention_forward(const DividedAttention& p) {
  switch (p.groups.q.dtype) {
    case Dtype::bf16:
      return forward<bf16>(p);
    case Dtype::f16:
      return forward<f16>(p);
    default:
      return forward<float>(p);
  }
}

void divided_attention_backward(const DividedAttention& p) {
  switch (p.groups.q.dtype) {
    case Dtype::bf16:
      return backward<bf16>(p);
    case Dtype::f16:
      return backward<f16>(p);
    default:
      return backward<float>(p);
  }
}

}  // namespace vk::VK_ISA
