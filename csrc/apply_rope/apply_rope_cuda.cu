// Every token's angles are computed once, into shared memory, and turn all heads of q and k; one pass over memory.
//
// Two kernels, because 16-byte accesses and pairs do not always agree. In `turn_vectors` a thread holds whole pairs:
// two vectors whose elements belong together. Where the halves of a head are not whole vectors apart (d = 72: 36
// elements, four and a half vectors), `turn_staged` passes rows through shared memory and a thread finds the other
// element of every pair there.
#include <algorithm>

#include "apply_rope_cuda.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/math.h"
#include "vkernels/device/rope.h"
#include "vkernels/device/sync.h"

namespace vk {
namespace {

using namespace device;

constexpr int kThreads = 256;

template <class T, bool kWholeVectors>
struct VectorTraits {
  using Element = T;
  static constexpr int kWidth = kWholeVectors ? kLanesOf<T> : 1;  // elements a thread moves at a time
  static constexpr int kHeads = 2;                                // heads in flight: 4 loads before the first store
};

template <class T>
struct StagedTraits {
  using Element = T;
  static constexpr int kWidth = kLanesOf<T>;
  static constexpr int kStages = 2;
};

struct Heads {
  const void* from;  // b s heads d
  void* to;
  int64_t from_b, from_s, from_n, to_b, to_s, to_n;
  int count;
};

struct Params {
  Heads x[2];
  Rope rope;
  int64_t tokens, s;
  int d;
  bool copies;  // what does not turn has to be copied: out of place
  // Thread i stands at column i % columns of head i / columns % head_lanes of token i / columns / head_lanes.
  int columns, head_lanes, token_lanes;
};

// Where a thread stands.
struct Place {
  int column, head_lane, token_lane;
  int64_t ib, is;
  bool live;
};

VK_DEVICE Place place_of(const Params& p, int64_t first_token) {
  Place at;
  at.column = thread_index() % p.columns;
  at.head_lane = thread_index() / p.columns % p.head_lanes;
  at.token_lane = thread_index() / p.columns / p.head_lanes;
  const int64_t token = first_token + at.token_lane;
  at.live = at.token_lane < p.token_lanes && token < p.tokens;
  at.ib = at.live ? token / p.s : 0;
  at.is = at.live ? token - at.ib * p.s : 0;
  return at;
}

// The angles of the block's tokens: cosines [token_lanes, pairs], then sines.
struct Table {
  float *cos, *sin;
};

VK_DEVICE Table table_of(const Params& p, const Place& at) {
  float* table = reinterpret_cast<float*>(shared_memory());
  return {table + at.token_lane * p.rope.pairs, table + (p.token_lanes + at.token_lane) * p.rope.pairs};
}

VK_DEVICE void fill_table(const Params& p, const Place& at, int row) {
  sync_block();  // nobody reads the angles of the row before
  if (at.live) {
    const Table table = table_of(p, at);
    for (int j = at.head_lane * p.columns + at.column; j < p.rope.pairs; j += p.head_lanes * p.columns) {
      float cos, sin;
      angle_of(p.rope, row, at.ib, at.is, j, cos, sin);
      store_shared(table.cos + j, cos);
      store_shared(table.sin + j, sin);
    }
  }
  sync_block();
}

template <class T>
VK_DEVICE const T* head_from(const Heads& x, const Place& at, int head) {
  return static_cast<const T*>(x.from) + at.ib * x.from_b + at.is * x.from_s + head * x.from_n;
}
template <class T>
VK_DEVICE T* head_to(const Heads& x, const Place& at, int head) {
  return static_cast<T*>(x.to) + at.ib * x.to_b + at.is * x.to_s + head * x.to_n;
}

// What a thread moves at a time, as it lies in memory.
template <class Traits>
using Piece = std::conditional_t<Traits::kWidth == 1, typename Traits::Element, Vector>;

template <class Traits>
VK_DEVICE Piece<Traits> load_piece(const typename Traits::Element* from) {
  if constexpr (Traits::kWidth == 1)
    return load(from);
  else
    return load16(from);
}
template <class Traits>
VK_DEVICE void store_piece(typename Traits::Element* to, const Piece<Traits>& x) {
  if constexpr (Traits::kWidth == 1)
    store(to, x);
  else
    store16(to, x);
}
template <class Traits>
VK_DEVICE void widen_piece(const Piece<Traits>& piece, float (&x)[Traits::kWidth]) {
  if constexpr (Traits::kWidth == 1)
    x[0] = widen_one(piece);
  else
    widen<typename Traits::Element>(piece, x);
}
template <class Traits>
VK_DEVICE Piece<Traits> narrow_piece(const float (&x)[Traits::kWidth]) {
  if constexpr (Traits::kWidth == 1)
    return narrow_one<typename Traits::Element>(x[0]);
  else
    return narrow<typename Traits::Element>(x);
}

// Turns kWidth pairs of heads begin .. end, held as two vectors. Neighbours that are pairs lie through both.
template <class Traits>
VK_DEVICE void turn_heads(const Heads& x, const Place& at, int begin, int end, int step, int first, int second,
                          bool neighbours, const float (&c)[Traits::kWidth], const float (&s)[Traits::kWidth]) {
  using T = typename Traits::Element;
  constexpr int kWidth = Traits::kWidth, kHeads = Traits::kHeads;
  for (int head = begin; head < end; head += step * kHeads) {
    Piece<Traits> pieces[kHeads][2];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head + i * step >= end) break;
      const T* from = head_from<T>(x, at, head + i * step);
      pieces[i][0] = load_piece<Traits>(from + first);
      pieces[i][1] = load_piece<Traits>(from + second);
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head + i * step >= end) break;
      float a[kWidth], b[kWidth];
      widen_piece<Traits>(pieces[i][0], a);
      widen_piece<Traits>(pieces[i][1], b);
      if (neighbours && kWidth > 1) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) {
          turn_pair(a[2 * j], a[2 * j + 1], c[j], s[j], a[2 * j], a[2 * j + 1]);
          turn_pair(b[2 * j], b[2 * j + 1], c[kWidth / 2 + j], s[kWidth / 2 + j], b[2 * j], b[2 * j + 1]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) turn_pair(a[j], b[j], c[j], s[j], a[j], b[j]);
      }
      T* to = head_to<T>(x, at, head + i * step);
      store_piece<Traits>(to + first, narrow_piece<Traits>(a));
      store_piece<Traits>(to + second, narrow_piece<Traits>(b));
    }
  }
}

template <class Traits>
VK_KERNEL(kThreads, 2)
turn_vectors(const Params p) {
  using T = typename Traits::Element;
  constexpr int kWidth = Traits::kWidth;
  const Rope& rope = p.rope;
  const int turning = rope.pairs / kWidth, still = p.copies ? (p.d - 2 * rope.pairs) / kWidth : 0;
  for (int64_t first = block_x() * p.token_lanes; first < p.tokens; first += blocks_x() * p.token_lanes) {
    const Place at = place_of(p, first);
    for (int row = 0; row < rope.heads; ++row) {
      fill_table(p, at, row);
      if (!at.live) continue;
      const Table table = table_of(p, at);
      for (int unit = at.column; unit < turning + still; unit += p.columns) {
        for (int i = 0; i < 2; ++i) {
          const Heads& x = p.x[i];
          const int group = x.count / rope.heads, begin = row * group + at.head_lane, end = (row + 1) * group;
          if (unit < turning) {
            float c[kWidth], s[kWidth];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              c[j] = load_shared(table.cos + unit * kWidth + j);
              s[j] = load_shared(table.sin + unit * kWidth + j);
            }
            int a, b;
            pair_at(rope, unit * kWidth, a, b);
            if (rope.blocks == 0) b = a + kWidth;
            turn_heads<Traits>(x, at, begin, end, p.head_lanes, a, b, rope.blocks == 0, c, s);
          } else {
            int e = (unit - turning) * kWidth;
            if (e >= rope.offset) e += 2 * rope.pairs;
            for (int head = begin; head < end; head += p.head_lanes) {
              const T* from = head_from<T>(x, at, head) + e;
              T* to = head_to<T>(x, at, head) + e;
              store_piece<Traits>(to, load_piece<Traits>(from));
            }
          }
        }
      }
    }
  }
}

// One vector of a row that lies in shared memory. `pair` -1: the element does not turn.
template <class T>
VK_DEVICE Vector turn_row(const T* row, int column, const int (&other)[kLanesOf<T>], const float (&c)[kLanesOf<T>],
                          const float (&s)[kLanesOf<T>]) {
  constexpr int kWidth = kLanesOf<T>;
  const Vector mine = load_shared(reinterpret_cast<const Vector*>(row) + column);
  float x[kWidth], y[kWidth];
  widen<T>(mine, x);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    y[i] = other[i] < 0 ? x[i] : x[i] * c[i] + widen_one(load_shared(row + other[i])) * s[i];
  return narrow<T>(y);
}

template <class Traits>
VK_KERNEL(kThreads, 2)
turn_staged(const Params p) {
  using T = typename Traits::Element;
  constexpr int kWidth = Traits::kWidth, kStages = Traits::kStages;
  const Rope& rope = p.rope;
  const int slots = p.token_lanes * p.head_lanes;
  // The tables are padded to whole vectors.
  char* rows = shared_memory() + (size_t(2 * p.token_lanes * rope.pairs) * sizeof(float) + 15) / 16 * 16;
  for (int64_t first = block_x() * p.token_lanes; first < p.tokens; first += blocks_x() * p.token_lanes) {
    const Place at = place_of(p, first);
    const int slot = at.token_lane * p.head_lanes + at.head_lane;
    const auto stage = [&](int step) { return reinterpret_cast<T*>(rows) + (step % kStages * slots + slot) * p.d; };
    for (int row = 0; row < rope.heads; ++row) {
      fill_table(p, at, row);
      float c[kWidth], s[kWidth];
      int other[kWidth];
      const Table table = table_of(p, at);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Partner partner = partner_of(rope, at.column * kWidth + i);
        other[i] = partner.pair < 0 || !at.live ? -1 : partner.element;
        if (other[i] < 0) continue;
        c[i] = load_shared(table.cos + partner.pair);
        const float sin = load_shared(table.sin + partner.pair);
        s[i] = partner.first ? -sin : sin;
      }
      for (int i = 0; i < 2; ++i) {
        const Heads& x = p.x[i];
        const int group = x.count / rope.heads, steps = (group + p.head_lanes - 1) / p.head_lanes;
        const auto head_at = [&](int step) { return row * group + step * p.head_lanes + at.head_lane; };
        const auto start = [&](int step) {
          if (at.live && step < steps && head_at(step) < (row + 1) * group)
            copy_async16(stage(step) + at.column * kWidth, head_from<T>(x, at, head_at(step)) + at.column * kWidth);
          commit_copies();
        };
        start(0);
        for (int step = 0; step < steps; ++step) {
          start(step + 1);
          wait_for_copies<1>();
          sync_block();
          if (at.live && head_at(step) < (row + 1) * group)
            store16(head_to<T>(x, at, head_at(step)) + at.column * kWidth,
                    turn_row<T>(stage(step), at.column, other, c, s));
          sync_block();  // the stage is filled again next
        }
      }
    }
  }
}

template <class T>
bool whole_vectors(const void* data, const TensorRef& t) {
  bool good = reinterpret_cast<uintptr_t>(data) % sizeof(Vector) == 0;
  for (int dim = 0; dim < 3; ++dim) good = good && (t.size(dim) == 1 || t.stride(dim) % kLanesOf<T> == 0);
  return good;
}

// Threads over columns, heads and tokens of a block.
device::Grid arrange(Params& p, int columns, int heads_in_flight, size_t row_bytes) {
  p.columns = std::min(columns, kThreads);
  const int heads = std::max(std::max(p.x[0].count, p.x[1].count) / p.rope.heads, 1);
  p.head_lanes = std::min((heads + heads_in_flight - 1) / heads_in_flight, kThreads / p.columns);
  p.token_lanes = kThreads / (p.columns * p.head_lanes);
  const int used = p.columns * p.head_lanes * p.token_lanes;
  const size_t table = (size_t(2 * p.token_lanes * p.rope.pairs) * sizeof(float) + 15) / 16 * 16;
  return {std::min((p.tokens + p.token_lanes - 1) / p.token_lanes, kMaxBlocks), 1, (used + kWarp - 1) / kWarp * kWarp,
          table + size_t(p.token_lanes * p.head_lanes) * row_bytes};
}

template <class T>
void run(const ApplyRopeParams& a, const Stream& stream) {
  constexpr int kWidth = kLanesOf<T>;
  Params p{};
  p.rope = rope_on_device(a.rope);
  p.d = static_cast<int>(a.x[0].size(3));
  p.s = a.x[0].size(1);
  p.tokens = a.x[0].size(0) * p.s;
  p.copies = p.d > 2 * p.rope.pairs && a.x[0].data != a.out[0].data;
  bool aligned = p.d % kWidth == 0;
  for (int i = 0; i < 2; ++i) {
    const TensorRef &x = a.x[i], &y = a.out[i];
    if (!x.given || x.numel() == 0) continue;
    p.x[i] = {x.data,      y.data,      x.stride(0),
              x.stride(1), x.stride(2), y.stride(0),
              y.stride(1), y.stride(2), static_cast<int>(x.size(2))};
    aligned = aligned && whole_vectors<T>(x.data, x) && whole_vectors<T>(y.data, y);
  }
  const int pairs = p.rope.pairs, still = p.copies ? p.d - 2 * pairs : 0;
  if (p.x[0].count + p.x[1].count == 0 || pairs + still == 0) return;

  const int apart = p.rope.blocks == 0 ? pairs : pairs / p.rope.blocks;
  if (aligned && apart % kWidth == 0 && p.rope.offset % kWidth == 0) {
    using Traits = VectorTraits<T, true>;
    const device::Grid grid = arrange(p, (pairs + still) / kWidth, Traits::kHeads, 0);
    return launch("apply_rope, turn_vectors", turn_vectors<Traits>, grid, stream, p);
  }
  if (aligned && p.d / kWidth <= kThreads) {
    using Traits = StagedTraits<T>;
    const device::Grid grid = arrange(p, p.d / kWidth, 1, Traits::kStages * size_t(p.d) * sizeof(T));
    return launch("apply_rope, turn_staged", turn_staged<Traits>, grid, stream, p);
  }
  using Traits = VectorTraits<T, false>;
  const device::Grid grid = arrange(p, pairs + still, Traits::kHeads, 0);
  launch("apply_rope, turn_vectors by elements", turn_vectors<Traits>, grid, stream, p);
}

}  // namespace

void apply_rope_cuda(const ApplyRopeParams& p, const Stream& stream) {
  switch (p.x[0].dtype) {
    case Dtype::bf16:
      return run<bf16>(p, stream);
    case Dtype::f16:
      return run<f16>(p, stream);
    default:
      return run<float>(p, stream);
  }
}

}  // namespace vk
