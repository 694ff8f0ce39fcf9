// Every token's angles are computed once and turn all heads of q and k. One piece of work is a range of tokens.
#include <algorithm>

#include "apply_rope.h"
#include "vkernels/cpu/rope_rows.h"

namespace vk::VK_ISA {
namespace {

constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs beyond the caches are written past them

// All heads of one token of q or k.
template <class T>
void rotate_token(const ApplyRopeParams& p, const TokenAngles& angles, int64_t i, int64_t ib, int64_t is, T* to,
                  int64_t to_head) {
  const TensorRef& x = p.x[i];
  const int64_t heads = x.size(2), d = x.size(3), group = heads / p.rope.heads();
  const int64_t begin = p.rope.offset, end = begin + 2 * p.rope.pairs();
  const T* from = x.ptr<const T>() + ib * x.stride(0) + is * x.stride(1);
  for (int64_t head = 0; head < heads; ++head, from += x.stride(2), to += to_head) {
    angles.rotate(from, to, head / group);
    if (from != to) {
      memcpy(to, from, sizeof(T) * static_cast<size_t>(begin));
      memcpy(to + end, from + end, sizeof(T) * static_cast<size_t>(d - end));
    }
  }
}

// Where `streams`, a token's heads are put together in the cache and leave in whole lines.
template <class T>
void run(const ApplyRopeParams& p, bool streams) {
  const int64_t b = p.x[0].size(0), s = p.x[0].size(1);
  const int tensors = p.x[1].given ? 2 : 1;
  const int64_t widest = std::max(p.x[0].size(2), p.x[1].given ? p.x[1].size(2) : 0) * p.x[0].size(3);
  parallel_for(0, b * s, 16, [&](int64_t begin, int64_t end) {
    TokenAngles angles(p.rope, 0);
    T* const row = streams ? static_cast<T*>(scratch(1, sizeof(T) * static_cast<size_t>(widest))) : nullptr;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t ib = token / s, is = token % s;
      angles.set(ib, is);
      for (int i = 0; i < tensors; ++i) {
        const TensorRef& y = p.out[i];
        T* const to = y.ptr<T>() + ib * y.stride(0) + is * y.stride(1);
        if (streams) {
          rotate_token(p, angles, i, ib, is, row, y.size(3));
          copy_streaming(to, row, sizeof(T) * static_cast<size_t>(y.size(2) * y.size(3)));
        } else {
          rotate_token(p, angles, i, ib, is, to, y.stride(2));
        }
      }
    }
    if (streams) streaming_fence();
  });
}

template <class T>
void run(const ApplyRopeParams& p) {
  int64_t bytes = 0;
  bool whole_tokens = true;  // the heads of a token lie one after the other
  for (int i = 0; i < 2; ++i) {
    if (!p.x[i].given) continue;
    bytes += p.x[i].numel() * static_cast<int64_t>(sizeof(T));
    whole_tokens &= p.out[i].stride(2) == p.out[i].size(3) && p.x[i].data != p.out[i].data;
  }
  run<T>(p, whole_tokens && bytes > kStreamBytes);
}

}  // namespace

void apply_rope(const ApplyRopeParams& p) {
  switch (p.x[0].dtype) {
    case Dtype::bf16:
      return run<bf16>(p);
    case Dtype::f16:
      return run<f16>(p);
    default:
      return run<float>(p);
  }
}

}  // namespace vk::VK_ISA
