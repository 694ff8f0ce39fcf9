// softmax(q k' scale) v for a few queries over a long cache, in one launch. The keys of a sequence are split over
// blocks; warps of a block take steps of 16 uncoded or 32 coded tokens in turn, each with a pipeline of its own, and
// the block that comes last joins what all have found.
//
// A kernel per store: rows that lie as they are, or codes of 8, 4 or 2 bits with the uncoded tokens beside them. Codes
// become float16 in registers whatever the dtype of queries: 11 bits, of queries divided by a power of two.
#include "decode_attention_cuda.h"
#include "decode_parts.h"
#include "decode_tiles.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

using namespace decode;
using device::Stream;

// Blocks a multiprocessor must hold: 16 queries need more than 128 registers.
template <int kTiles>
inline constexpr int kBlocks = kTiles == 1 ? 2 : 1;

template <int kTiles>
VK_DEVICE uint16_t query_at(const Params& p, const Program& at, int row, int channel) {
  const int shared = at.row + row;
  if (row >= at.count || channel >= p.d) return 0;
  return load(p.q + int64_t{at.sample} * p.q_b + shared % p.s * p.q_s +
              (int64_t{at.head} * p.share + shared / p.s) * p.q_n + channel);
}

VK_DEVICE float wide(uint16_t x, bool brain) { return brain ? widen_one(bf16{x}) : widen_one(f16{x}); }

// The power of two that brings values of this magnitude below 1.
VK_DEVICE float power_above(float x) { return bits_float((float_bits(x) & 0x7f800000u) + 0x00800000u); }

// A warp takes rows of its own.
template <int kBits, int kTiles>
VK_DEVICE void stage_queries(const Params& p, const Program& at, Shared<kTiles>& shared) {
  for (int row = warp(); row < Shared<kTiles>::kRows; row += kWarps) {
    uint16_t x[kMostChannels / kWarp];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostChannels / kWarp; ++i) {
      const int channel = i * kWarp + lane();
      x[i] = query_at<kTiles>(p, at, row, channel);
      store_shared(&shared.raw[row * kMostChannels + channel], x[i]);
      most = fmaxf(most, fabsf(wide(x[i], p.brain)));
    }
    if constexpr (kBits != 0) {
      const float norm = power_above(max_over_lanes(most));
#pragma unroll
      for (int i = 0; i < kMostChannels / kWarp; ++i) {
        const int place = i * kWarp + Codes<kBits>::order(lane());
        store_shared(&shared.unit[row * kMostChannels + place], narrow_one<f16>(wide(x[i], p.brain) / norm).bits);
      }
      if (lane() == 0) store_shared(&shared.norm[row], norm);
    }
  }
  sync_block();
}

template <int kTiles>
VK_DEVICE void finish(const Params& p, const Program& at, State<kTiles>& state, int used, Shared<kTiles>& shared,
                      float* memory) {
  join_warps(p, at, state, used, shared, memory);
  if (used > 1 && last_to_come(p.counter + at.index, used, &shared.flag)) join_splits(p, at, used, shared, memory);
}

// The bytes of a warp's ring: the larger of those of a kernel's two kinds of steps, which come one after the other.
template <int kBits>
constexpr int ring_bytes() {
  constexpr int kRows = Rows<bf16, false>::Ring::kBytes;
  if constexpr (kBits == 0)
    return kRows;
  else
    return Coded<kBits>::Ring::kBytes > kRows ? Coded<kBits>::Ring::kBytes : kRows;
}

// The block's shared memory: a ring for every warp (once all are through, what is joined), then the queries.
template <int kBits, int kTiles>
struct Memory {
  static constexpr size_t kRings = size_t(kWarps) * ring_bytes<kBits>(), kBytes = kRings + sizeof(Shared<kTiles>);
  static_assert(kRings >= sizeof(float) * kWarps * kQueries * kTiles * kMostChannels, "outputs of all warps fit");
  static_assert(kRings >= sizeof(float) * kQueries * kTiles * kMostSplits, "weights of all splits fit");
  char* ring = shared_memory() + warp() * ring_bytes<kBits>();
  float* joined = reinterpret_cast<float*>(shared_memory());
  Shared<kTiles>& shared = *reinterpret_cast<Shared<kTiles>*>(shared_memory() + kRings);
};

template <class T, int kTiles>
VK_KERNEL(kThreads, kBlocks<kTiles>)
decode_rows(const Params p) {
  const Program at = program_of<kTiles>(p);
  const Span span = span_of<false>(p, at.sample);
  const Share share = share_of<1>(p, span);
  if (block_y() >= share.used) return;
  const Memory<0, kTiles> memory;
  stage_queries<0>(p, at, memory.shared);
  State<kTiles> state;
  start_state(state);
  attend_rows(Rows<T, false>{p, at, span}, share, memory.ring, memory.shared.raw, state);
  finish(p, at, state, share.used, memory.shared, memory.joined);
}

template <int kBits, int kTiles>
VK_KERNEL(kThreads, kBlocks<kTiles>)
decode_codes(const Params p) {
  constexpr int kRowCost = 8 / kBits;
  const Program at = program_of<kTiles>(p);
  const Memory<kBits, kTiles> memory;
  State<kTiles> state;
  {
    const Span span = span_of<true>(p, at.sample);
    const Share share = share_of<kRowCost>(p, span);
    if (block_y() >= share.used) return;
    stage_queries<kBits>(p, at, memory.shared);
    start_state(state);
    attend_codes(Coded<kBits>{p, at, span}, share, memory.ring, memory.shared.unit, memory.shared.norm, state);
  }
  // Computed again: beside outputs and queries there are few registers to keep it in.
  const Span span = span_of<true>(p, at.sample);
  const Share share = share_of<kRowCost>(p, span);
  if (p.brain)
    attend_rows(Rows<bf16, true>{p, at, span}, share, memory.ring, memory.shared.raw, state);
  else
    attend_rows(Rows<f16, true>{p, at, span}, share, memory.ring, memory.shared.raw, state);
  finish(p, at, state, share.used, memory.shared, memory.joined);
}

Params params_of(const DecodeAttentionParams& a, const DecodeWorkspace& work) {
  const CacheRef& c = a.cache;
  const CacheLayout& l = c.layout;
  const auto number = [](int64_t x) { return static_cast<int>(x); };
  Params p{};
  p.q = a.q.ptr<const uint16_t>();
  p.q_b = a.q.stride(0), p.q_s = a.q.stride(1), p.q_n = a.q.stride(2);
  p.length = c.length, p.table = c.table;
  p.k_kept = (l.bits ? c.k_recent : c.k_rows).ptr<const uint16_t>();
  p.v_kept = (l.bits ? c.v_recent : c.v_rows).ptr<const uint16_t>();
  p.k_sink = c.k_sink.ptr<const uint16_t>(), p.v_sink = c.v_sink.ptr<const uint16_t>();
  p.k_codes = c.k_codes.ptr<const uint32_t>(), p.v_codes = c.v_codes.ptr<const uint32_t>();
  p.k_scale = c.k_scale.ptr<const f16>(), p.v_scale = c.v_scale.ptr<const f16>();
  p.o = a.o.ptr<uint16_t>(), p.lse = a.lse.ptr<float>();
  p.m = number(c.m), p.s = number(a.q.size(1)), p.d = number(c.d);
  p.share = number(a.q.size(2) / c.m);
  const int64_t shared = int64_t{p.share} * p.s, rows = decode_rows_of(shared);
  p.row_blocks = number((shared + rows - 1) / rows);
  p.splits = number(work.splits);
  p.part = work.part.ptr<float>();
  p.stats = p.part + decode_programs(c, shared) * work.splits * rows * c.d;
  p.counter = work.counter.ptr<int>();
  p.pages = number((l.bits ? c.k_codes : c.k_rows).size(0)), p.table_pages = number(c.table_pages);
  p.page = number(l.page), p.ring = number(l.ring), p.sinks = number(l.sinks);
  p.residual = number(l.residual), p.group = number(l.group), p.room = number(c.table_pages * l.page);
  while (l.bits && 1 << p.group_bits < p.group) ++p.group_bits;
  p.window = number(a.window < INT32_MAX ? a.window : INT32_MAX);
  p.scale = a.scale * kLog2e;
  p.brain = a.q.dtype == Dtype::bf16;
  return p;
}

template <int kTiles>
void run(const Params& p, int64_t bits, int64_t programs, const Stream& stream) {
  const auto start = [&](const char* name, void (*kernel)(Params), size_t shared_bytes) {
    launch(name, kernel, {programs, p.splits, kThreads, shared_bytes}, stream, p);
  };
  switch (bits) {
    case 8:
      return start("decode_attention, int8", decode_codes<8, kTiles>, Memory<8, kTiles>::kBytes);
    case 4:
      return start("decode_attention, int4", decode_codes<4, kTiles>, Memory<4, kTiles>::kBytes);
    case 2:
      return start("decode_attention, int2", decode_codes<2, kTiles>, Memory<2, kTiles>::kBytes);
    default:
      return start("decode_attention", p.brain ? decode_rows<bf16, kTiles> : decode_rows<f16, kTiles>,
                   Memory<0, kTiles>::kBytes);
  }
}

}  // namespace

void decode_attention_cuda(const DecodeAttentionParams& a, const DecodeWorkspace& work, const Stream& stream) {
  const Params p = params_of(a, work);
  const int64_t shared = int64_t{p.share} * p.s, programs = decode_programs(a.cache, shared);
  const auto go = decode_rows_of(shared) == kQueries ? run<1> : run<2>;
  go(p, a.cache.layout.bits, programs, stream);
}

}  // namespace vk
