// Space-time attention in groups of frames: the short-sequence kernel on every group.
#include "divided_attention.h"
#include "vkernels/cpu/short_attention_kernel.h"

namespace vk::VK_ISA {
namespace {

template <class T>
void zero_first_row(const TensorRef& t) {
  for (int64_t batch = 0; batch < t.size(0); ++batch)
    for (int64_t head = 0; head < t.size(2); ++head)
      memset(t.ptr<T>() + batch * t.stride(0) + head * t.stride(2), 0, sizeof(T) * static_cast<size_t>(t.size(3)));
}

template <class T>
void forward(const DividedAttention& p) {
  if (p.zero_first) zero_first_row<T>(p.groups.o);
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
