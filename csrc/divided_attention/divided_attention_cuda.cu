// Which kernels serve a call, and their launches.
#include <algorithm>

#include "divided_attention_cuda.h"
#include "packed_cuda.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

Heads heads_of(const TensorRef& x) {
  const auto stride = [&](int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  return {x.data, stride(0), stride(1), stride(2)};
}

Sequences sequences_of(const ShortAttention& a) {
  const ShortRows& r = a.q_rows;
  Sequences s{};
  s.count = int(a.q.size(0) * a.groups());
  s.length = int(a.len_q - r.shared);
  s.outer = int(a.outer);
  s.first = int(r.first), s.stride_outer = int(r.outer_stride), s.stride_inner = int(r.inner_stride);
  s.stride_run = int(r.run_stride), s.stride_token = int(r.token_stride);
  s.per_sample = Divisor(std::max<int64_t>(a.groups(), 1));
  s.inner = Divisor(std::max<int64_t>(a.inner, 1));
  s.run = Divisor(std::min<int64_t>(r.run, INT32_MAX));
  return s;
}

Packed pack(const DividedAttention& d, int64_t heads) {
  const ShortAttention& a = d.groups;
  Packed p{};
  p.q = heads_of(a.q), p.k = heads_of(a.k), p.v = heads_of(a.v);
  p.where = sequences_of(a);
  p.heads = Divisor(heads);
  p.per_key = Divisor(a.q.size(2) / a.k.size(2));
  p.packed = 16 / p.where.length;
  p.magic = (256 + p.where.length - 1) / p.where.length;
  p.units = (p.where.count + p.packed - 1) / p.packed * heads;
  p.vectors = int(a.q.size(3) / 8);
  p.scale = a.scale;
  p.scale_log2 = a.scale * 1.4426950408889634f;
  p.cls = d.zero_first;
  return p;
}

device::Grid warps(const Packed& p) {
  return {(p.units + kPackedWarps - 1) / kPackedWarps, 1, kPackedWarps * kWarp};
}

// A kernel for rows of up to 64, 96 or 128 elements.
template <class T, class Run>
void for_chunks(int64_t d, const Run& run) {
  if (d <= 64) return run(PackedTraits<T, 2>{});
  if (d <= 96) return run(PackedTraits<T, 3>{});
  run(PackedTraits<T, 4>{});
}

template <class T>
void run_forward(const DividedAttention& d, const Stream& stream) {
  Packed p = pack(d, d.groups.q.size(2));
  p.o = heads_of(d.groups.o);
  for_chunks<T>(d.groups.q.size(3), [&](auto traits) {
    launch("divided_attention, packed_forward", packed_forward<decltype(traits)>, warps(p), stream, p);
  });
}

template <class T>
void run_backward(const DividedAttention& d, const Stream& stream) {
  Packed p = pack(d, d.groups.k.size(2));
  p.o = heads_of(d.groups.grad_o);
  p.dq = heads_of(d.groups.dq), p.dk = heads_of(d.groups.dk), p.dv = heads_of(d.groups.dv);
  for_chunks<T>(d.groups.q.size(3), [&](auto traits) {
    using Traits = decltype(traits);
    const auto kernel = p.per_key.divisor > 1 ? packed_backward_grouped<Traits> : packed_backward<Traits>;
    launch("divided_attention, packed_backward", kernel, warps(p), stream, p);
  });
}

}  // namespace

void divided_attention_forward_cuda(const DividedAttention& p, const Stream& stream) {
  p.groups.q.dtype == Dtype::bf16 ? run_forward<bf16>(p, stream) : run_forward<f16>(p, stream);
}

void divided_attention_backward_cuda(const DividedAttention& p, const Stream& stream) {
  p.groups.q.dtype == Dtype::bf16 ? run_backward<bf16>(p, stream) : run_backward<f16>(p, stream);
}

}  // namespace vk
