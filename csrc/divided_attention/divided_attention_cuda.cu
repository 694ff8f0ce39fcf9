// Which kernels serve a call, and their launches.
#include <algorithm>
#include <initializer_list>

#include "divided_attention_cuda.h"
#include "packed_cuda.h"
#include "tiled_backward_cuda.h"
#include "tiled_forward_cuda.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

Heads heads_of(const TensorRef& x) {
  const auto stride = [&](int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  return {x.data, stride(0), uint32_t(stride(1)), uint32_t(stride(2))};
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

template <class T, int kChunks>
using PlainTraits = PackedTraits<T, kChunks, false>;
template <class T, int kChunks>
using TurnedTraits = PackedTraits<T, kChunks, true>;

template <class Params>
void turn_by(Params& p, const Turn& turn) {
  if (!turn.angles.given) return;
  p.angles = turn.angles.ptr<const float>();
  p.angles_b = turn.angles.size(0) == 1 ? 0 : int(turn.angles.size(1));
  p.neighbours = turn.neighbours;
}

Packed pack(const DividedAttention& d, const Turn& turn, int64_t heads) {
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
  p.scale_log2 = a.scale * kLog2e;
  p.cls = d.zero_first;
  turn_by(p, turn);
  return p;
}

device::Grid warps(const Packed& p) { return {(p.units + kPackedWarps - 1) / kPackedWarps, 1, kPackedWarps * kWarp}; }

Tiled tile(const DividedAttention& d, const Turn& turn) {
  const ShortAttention& a = d.groups;
  Tiled p{};
  p.q = heads_of(a.q), p.k = heads_of(a.k), p.v = heads_of(a.v);
  p.where = sequences_of(a);
  p.per_key = Divisor(a.q.size(2) / a.k.size(2));
  p.n = int(a.q.size(2)), p.m = int(a.k.size(2));
  p.columns = int(a.q.size(3));
  p.tile_rows = std::min(kTileRows, std::max((p.where.length + 15) / 16 * 16, 16));
  p.tiles = std::max((p.where.length + p.tile_rows - 1) / p.tile_rows, 1);
  p.scale = a.scale;
  p.scale_log2 = a.scale * kLog2e;
  p.cls = a.q_rows.shared != 0;
  turn_by(p, turn);
  return p;
}

// The rows of a sequence, 16 to a warp, over as few blocks as hold them, evenly.
template <class Traits, int kTensors>
device::Grid blocks(Tiled& p, int64_t heads, int stages) {
  const int tiles = (p.where.length + p.cls + 15) / 16, slots = (tiles + kMostWarps - 1) / kMostWarps;
  const int warps = (tiles + slots - 1) / slots;
  p.heads = Divisor(heads);
  p.slots = Divisor(slots);
  return {p.where.count * heads * slots, 1, warps * kWarp, Room<Traits, kTensors>::bytes(warps, p.tile_rows, stages)};
}

// A kernel for rows of up to 64, 96 or 128 elements.
template <template <class, int> class Traits, class T, class Run>
void for_columns(int64_t d, const Run& run) {
  if (d <= 64) return run(Traits<T, 2>{});
  if (d <= 96) return run(Traits<T, 3>{});
  run(Traits<T, 4>{});
}

bool has_no_tokens(const ShortAttention& a) { return a.groups() == 0 || a.len_q == 0; }

struct ClsOf {
  const TensorRef& to;
  const float* part;
};

template <class T>
void finish_cls(const DividedAttention& d, std::initializer_list<ClsOf> tensors, const Stream& stream) {
  const bool shared = d.groups.q_rows.shared && !d.zero_first;
  ClsRows p{};
  p.outer = int(d.groups.outer);
  p.columns = int(d.groups.q.size(3));
  int64_t count = 0, rows = 0;
  for (const ClsOf& x : tensors) {
    const int64_t heads = x.to.size(2), mine = x.to.size(0) * heads;
    p.of[count++] = {shared ? x.part : nullptr, heads_of(x.to), Divisor(heads), int(mine)};
    rows = std::max(rows, mine);
  }
  launch("divided_attention, sum_cls", sum_cls<T>, {rows, count, 128}, stream, p);
}

template <class T>
void run_forward(const DividedAttention& d, const Turn& turn, const Stream& stream) {
  const ShortAttention& a = d.groups;
  const int64_t n = a.q.size(2), columns = a.q.size(3);
  if (has_no_tokens(a)) return finish_cls<T>(d, {{a.o, nullptr}}, stream);
  if (is_packed(a, turn)) {
    Packed p = pack(d, turn, n);
    p.o = heads_of(a.o);
    const auto run = [&](auto traits) {
      launch("divided_attention, packed_forward", packed_forward<decltype(traits)>, warps(p), stream, p);
    };
    return p.angles ? for_columns<TurnedTraits, T>(columns, run) : for_columns<PlainTraits, T>(columns, run);
  }
  Tiled p = tile(d, turn);
  p.o = heads_of(a.o);
  p.part = a.shared_q;
  for_columns<TiledTraits, T>(columns, [&](auto traits) {
    using Traits = decltype(traits);
    const device::Grid grid = blocks<Traits, 1>(p, n, std::min(p.tiles, 2));
    launch("divided_attention, tiled_forward", tiled_forward<Traits>, grid, stream, p);
  });
  if (p.cls || d.zero_first) finish_cls<T>(d, {{a.o, a.shared_q}}, stream);
}

template <class T>
void run_backward(const DividedAttention& d, const Turn& turn, float* stats, const Stream& stream) {
  const ShortAttention& a = d.groups;
  const int64_t n = a.q.size(2), m = a.k.size(2), columns = a.q.size(3);
  const auto finish = [&] { finish_cls<T>(d, {{a.dq, a.shared_q}, {a.dk, a.shared_k}, {a.dv, a.shared_v}}, stream); };
  if (has_no_tokens(a)) return finish();
  const auto name_gradients = [&](auto& p) {
    p.o = heads_of(a.grad_o);
    p.dq = heads_of(a.dq), p.dk = heads_of(a.dk), p.dv = heads_of(a.dv);
  };
  if (is_packed(a, turn)) {
    Packed p = pack(d, turn, m);
    name_gradients(p);
    const auto run = [&](auto kernel) { launch("divided_attention, packed_backward", kernel, warps(p), stream, p); };
    if (n > m) return for_columns<PlainTraits, T>(columns, [&](auto t) { run(packed_backward_grouped<decltype(t)>); });
    if (p.angles) return for_columns<TurnedTraits, T>(columns, [&](auto t) { run(packed_backward<decltype(t)>); });
    return for_columns<PlainTraits, T>(columns, [&](auto t) { run(packed_backward<decltype(t)>); });
  }
  Tiled p = tile(d, turn);
  name_gradients(p);
  p.stats = reinterpret_cast<Stats*>(stats);
  p.part = a.shared_q, p.part_k = a.shared_k, p.part_v = a.shared_v;
  for_columns<TiledTraits, T>(columns, [&](auto traits) {
    using Traits = decltype(traits);
    const device::Grid keys = blocks<Traits, 2>(p, m, n / m * p.tiles > 1 ? 2 : 1);
    if (p.slots.divisor == 1)
      return launch("divided_attention, tiled_backward", tiled_backward<Traits>, keys, stream, p);
    const device::Grid queries = blocks<Traits, 2>(p, n, std::min(p.tiles, 2));
    launch("divided_attention, tiled_dq", tiled_dq<Traits>, queries, stream, p);
    p.heads = Divisor(m);
    launch("divided_attention, tiled_dkv", tiled_dkv<Traits>, keys, stream, p);
  });
  if (p.cls || d.zero_first) finish();
}

}  // namespace

void divided_attention_forward_cuda(const DividedAttention& p, const Turn& turn, const Stream& stream) {
  p.groups.q.dtype == Dtype::bf16 ? run_forward<bf16>(p, turn, stream) : run_forward<f16>(p, turn, stream);
}

void divided_attention_backward_cuda(const DividedAttention& p, const Turn& turn, float* stats, const Stream& stream) {
  p.groups.q.dtype == Dtype::bf16 ? run_backward<bf16>(p, turn, stats, stream)
                                  : run_backward<f16>(p, turn, stats, stream);
}

}  // namespace vk
