// y = rotate(x): pair (j, j + r) of every head turns by the angle of its token. One task per token.
#include "apply_rope.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace {

template <class T>
void rotate_half_layout(const ApplyRopeParams& p) {
  const int64_t b = p.x.size(0), s = p.x.size(1), n = p.x.size(2), r = p.cos.size(2);
  parallel_for(0, b * s, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t ib = token / s, is = token % s;
      const int64_t table = (p.cos.size(0) == 1 ? 0 : ib) * p.cos.stride(0) + is * p.cos.stride(1);
      const float* cos = p.cos.ptr<const float>() + table;
      const float* sin = p.sin.ptr<const float>() + table;
      for (int64_t in = 0; in < n; ++in) {
        const T* x = p.x.ptr<const T>() + ib * p.x.stride(0) + is * p.x.stride(1) + in * p.x.stride(2);
        T* y = p.out.ptr<T>() + ib * p.out.stride(0) + is * p.out.stride(1) + in * p.out.stride(2);
        for (int64_t j = 0; j < r; j += kLanes) {
          const int64_t count = r - j;
          const f32v c = load(cos + j, count), w = load(sin + j, count);
          const f32v x0 = load(x + j, count), x1 = load(x + r + j, count);
          store(y + j, x0 * c - x1 * w, count);
          store(y + r + j, x1 * c + x0 * w, count);
        }
      }
    }
  });
}

}  // namespace

void apply_rope(const ApplyRopeParams& p) {
  switch (p.x.dtype) {
    case Dtype::bf16:
      return rotate_half_layout<bf16>(p);
    case Dtype::f16:
      return rotate_half_layout<f16>(p);
    default:
      return rotate_half_layout<float>(p);
  }
}

}  // namespace vk::VK_ISA
