// Every token's angles are computed once and turn all heads of q and k. One piece of work is a range of tokens.
#include "apply_rope.h"
#include "vkernels/cpu/rope_rows.h"

namespace vk::VK_ISA {
namespace {

constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs beyond the caches are written past them

template <class T, bool kStream>
void rotate_tensor(const ApplyRopeParams& p, const TokenAngles& angles, int64_t i, int64_t ib, int64_t is) {
  const TensorRef &x = p.x[i], &y = p.out[i];
  const int64_t heads = x.size(2), d = x.size(3), group = heads / p.rope.heads();
  const int64_t begin = p.rope.offset, end = begin + 2 * p.rope.pairs();
  for (int64_t head = 0; head < heads; ++head) {
    const T* from = x.ptr<const T>() + ib * x.stride(0) + is * x.stride(1) + head * x.stride(2);
    T* to = y.ptr<T>() + ib * y.stride(0) + is * y.stride(1) + head * y.stride(2);
    angles.rotate<kStream>(from, to, head / group);
    if (from != to) {
      memcpy(to, from, sizeof(T) * static_cast<size_t>(begin));
      memcpy(to + end, from + end, sizeof(T) * static_cast<size_t>(d - end));
    }
  }
}

template <class T, bool kStream>
void run(const ApplyRopeParams& p) {
  const int64_t b = p.x[0].size(0), s = p.x[0].size(1);
  const int tensors = p.x[1].given ? 2 : 1;
  parallel_for(0, b * s, 16, [&](int64_t begin, int64_t end) {
    TokenAngles angles(p.rope, 0);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t ib = token / s, is = token % s;
      angles.set(ib, is);
      for (int i = 0; i < tensors; ++i) rotate_tensor<T, kStream>(p, angles, i, ib, is);
    }
    if (kStream) streaming_fence();
  });
}

template <class T>
void run(const ApplyRopeParams& p) {
  const bool in_place = p.x[0].data == p.out[0].data;
  const int64_t elements = p.x[0].numel() + (p.x[1].given ? p.x[1].numel() : 0);
  if (!in_place && elements * static_cast<int64_t>(sizeof(T)) > kStreamBytes) return run<T, true>(p);
  run<T, false>(p);
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
