// Where the tokens of the sequences lie, on the device: token i of sequence (outer, inner) of a sample is token row
//   first + outer * stride_outer + inner * stride_inner + i / run * stride_run + i % run * stride_token
#pragma once

#include "vkernels/device/divide.h"
#include "vkernels/device/kernel.h"

namespace vk {

struct Sequences {
  int count, length, outer;  // of all samples; tokens of one; groups that share a CLS token
  int first, stride_outer, stride_inner, stride_run, stride_token;
  device::Divisor per_sample, inner, run;
};

struct Sequence {
  int sample, outer, base;  // base: token row of its first token
  bool opens;               // the first of its sample
};

VK_DEVICE Sequence sequence_at(const Sequences& s, int index) {
  const int sample = quotient(index, s.per_sample), of_sample = index - sample * int(s.per_sample.divisor);
  const int outer = quotient(of_sample, s.inner), inner = of_sample - outer * int(s.inner.divisor);
  return {sample, outer, s.first + outer * s.stride_outer + inner * s.stride_inner, of_sample == 0};
}

VK_DEVICE int token_of(const Sequences& s, int i) {
  const int run = quotient(i, s.run);
  return run * s.stride_run + (i - run * int(s.run.divisor)) * s.stride_token;
}

// A tensor b s n d whose rows are whole vectors.
struct Heads {
  void* data;
  int64_t b;  // strides
  uint32_t s, n;
};

// 32 by 32 bits: one instruction.
VK_DEVICE uint64_t wide_product(int x, uint32_t y) { return uint64_t(uint32_t(x)) * y; }

template <class T>
VK_DEVICE T* row_at(const Heads& x, int sample, int token, int head) {
  return static_cast<T*>(x.data) + sample * x.b + wide_product(token, x.s) + wide_product(head, x.n);
}

}  // namespace vk
