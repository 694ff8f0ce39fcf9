// What the CUDA kernels of qkv_prologue share: how the heads of a token are dealt to the lanes of a block, and what is
// done to one head.
//
// `lanes` neighbouring lanes hold a head, each kUnits units of two pieces. Units that turn come first. Where a pair
// lies across pieces (halves) the two pieces of a unit turn each other; where it lies inside one (neighbours) each
// turns alone; a unit that does not turn holds two pieces that happen to follow each other. So every layout keeps both
// elements of a pair in one thread, and a norm over a head is a sum over `lanes` lanes.
#pragma once

#include "vkernels/device/piece.h"
#include "vkernels/device/rope.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/warp.h"

namespace vk {
namespace {

using namespace device;

constexpr int kThreads = 256;

template <class T, int kPieceBytes, int kUnitsOfLane, int kHeadsInFlight>
struct HeadTraits {
  using Element = T;
  static constexpr int kWidth = kPieceBytes / int(sizeof(T));
  static constexpr int kUnits = kUnitsOfLane;
  static constexpr int kHeads = kHeadsInFlight;
  static constexpr int kBlocks = kUnits == 1 && kWidth <= 4 ? 3 : 2;  // of a multiprocessor, in the forward
};

// The heads of q, k or v: outputs of the forward, gradients that come in of the backward.
struct Heads {
  void* data;  // b s heads d
  int64_t b, s, n;
  int count;
  const float* norm;  // weights, or null
};

struct Params {
  const void* qkv;
  int64_t qkv_b, qkv_s;
  const float* bias;  // or null
  Heads x[3];
  Rope rope;
  int64_t tokens, s;
  int d;
  float eps;
  bool post, all;  // the norm comes after the rotation; spans all heads of a token
  bool inside;     // a pair lies inside a piece
  bool loose;      // rows start at addresses that are no multiple of a piece
  int turning, still, turning_units, units;
  // Thread i stands at lane i % lanes of slot i / lanes; slot j serves head lane j % head_lanes of token lane
  // j / head_lanes.
  int lanes, head_lanes, token_lanes;
  int splits;  // of the heads of a token over blocks
};

struct Place {
  int lane, head_lane, token_lane;
};

VK_DEVICE Place place_in_block(const Params& p) {
  const int slot = thread_index() / p.lanes;
  return {thread_index() % p.lanes, slot % p.head_lanes, slot / p.head_lanes};
}

struct Token {
  int64_t ib, is;
  bool live;
};

VK_DEVICE Token token_of(const Params& p, int64_t token, bool there) {
  Token t{0, 0, there && token < p.tokens};
  if (t.live) t.ib = token / p.s, t.is = token - t.ib * p.s;
  return t;
}

// One head of q (part 0), k (1) or v (2).
struct Head {
  int part, index, row;  // row of the spec's axes
  bool live, turns, normed;
};

VK_DEVICE Head head_of(const Params& p, int head, bool live) {
  Head h{0, head, 0, live && head < p.x[0].count + p.x[1].count + p.x[2].count, false, false};
  while (h.live && h.index >= p.x[h.part].count) h.index -= p.x[h.part++].count;
  if (h.live && h.part < 2) {
    h.turns = p.turning > 0;
    h.normed = p.x[h.part].norm != nullptr;
    h.row = h.index / (p.x[h.part].count / p.rope.heads);
  }
  return h;
}

// Where the two pieces of a unit begin.
struct Unit {
  int at[2];
  bool there[2], turns;
};

template <class Traits>
VK_DEVICE Unit unit_of(const Params& p, int unit) {
  constexpr int kWidth = Traits::kWidth;
  Unit u{{0, 0}, {unit < p.units, unit < p.units}, unit < p.turning_units};
  if (u.turns && !p.inside) {
    pair_at(p.rope, unit * kWidth, u.at[0], u.at[1]);
  } else if (u.turns) {
    u.at[0] = p.rope.offset + 2 * unit * kWidth;
    u.at[1] = u.at[0] + kWidth;
    u.there[1] = 2 * unit + 1 < p.turning;
  } else {
    const int first = 2 * (unit - p.turning_units);
    u.there[1] = first + 1 < p.still;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u.at[i] = (first + i) * kWidth;
      if (u.at[i] >= p.rope.offset) u.at[i] += 2 * p.rope.pairs;
    }
  }
  return u;
}

// The angles of the block's tokens, [token, row of axes, cosine or sine, pair]; pairs lie so that neighbouring units
// read neighbouring 16 bytes.
template <class Traits>
VK_DEVICE int place_of_pair(const Params& p, int pair) {
  constexpr int kWidth = Traits::kWidth, kStep = kWidth < 4 ? kWidth : 4;
  return (pair % kWidth / kStep * p.turning_units + pair / kWidth) * kStep + pair % kStep;
}

template <class Traits>
VK_DEVICE float* angles_of(const Params& p, int token, int row) {
  return reinterpret_cast<float*>(shared_memory()) +
         (token * p.rope.heads + row) * 2 * p.turning_units * Traits::kWidth;
}

// Of tokens first .. first + count. Pairs that only fill up a unit get zeros, as their elements are.
template <class Traits>
VK_DEVICE void fill_angles(const Params& p, int64_t first, int count) {
  const int pairs = p.turning_units * Traits::kWidth, each = p.rope.heads * pairs;
  for (int i = thread_index(); i < count * each; i += thread_count()) {
    const Token token = token_of(p, first + i / each, true);
    if (!token.live) continue;
    const int row = i % each / pairs, pair = i % pairs;
    float cos = 0.0f, sin = 0.0f;
    if (pair < p.rope.pairs) angle_of(p.rope, row, token.ib, token.is, pair, cos, sin);
    float* to = angles_of<Traits>(p, i / each, row) + place_of_pair<Traits>(p, pair);
    store_shared(to, cos);
    store_shared(to + p.turning_units * Traits::kWidth, sin);
  }
}

template <class Traits>
VK_DEVICE void load_angles(const Params& p, const float* from, int unit, float (&x)[Traits::kWidth]) {
  constexpr int kWidth = Traits::kWidth;
  if constexpr (kWidth < 4) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = load_shared(from + unit * kWidth + i);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const Vector v = load_shared(reinterpret_cast<const Vector*>(from) + i / 4 * p.turning_units + unit);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = bits_float(v.word[j]);
    }
  }
}

// The pieces a lane holds of a head, widened.
template <class Traits>
using Values = float[Traits::kUnits][2][Traits::kWidth];
// As they lie in memory.
template <class Traits>
struct Raw {
  Piece<typename Traits::Element, Traits::kWidth> piece[Traits::kUnits][2];
};

// Turns what the lane holds by the angles of token lane `token`, or back.
template <class Traits>
VK_DEVICE void turn_head(const Params& p, const Place& at, const Head& head, int token, bool back, Values<Traits>& x) {
  constexpr int kWidth = Traits::kWidth;
  const float* angles = angles_of<Traits>(p, token, head.row);
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k) {
    const int unit = at.lane + k * p.lanes;
    if (unit >= p.turning_units) continue;
    float c[kWidth], s[kWidth];
    load_angles<Traits>(p, angles, unit, c);
    load_angles<Traits>(p, angles + p.turning_units * kWidth, unit, s);
    if (back) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) s[j] = -s[j];
    }
    if (kWidth > 1 && p.inside) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float* pair = x[k][2 * j / kWidth] + 2 * j % kWidth;
        turn_pair(pair[0], pair[1], c[j], s[j], pair[0], pair[1]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) turn_pair(x[k][0][j], x[k][1][j], c[j], s[j], x[k][0][j], x[k][1][j]);
    }
  }
}

template <class Traits, Cache kCache = Cache::once>
VK_DEVICE void load_head(const Params& p, const Place& at, const typename Traits::Element* from, bool live,
                         Raw<Traits>& raw) {
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k) {
    const Unit unit = unit_of<Traits>(p, at.lane + k * p.lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (!live || !unit.there[i])
        raw.piece[k][i] = {};
      else if (p.loose)
        raw.piece[k][i] = load_elements<typename Traits::Element, Traits::kWidth>(from + unit.at[i]);
      else
        raw.piece[k][i] = load_piece<typename Traits::Element, Traits::kWidth, kCache>(from + unit.at[i]);
  }
}

template <class Traits>
VK_DEVICE void widen_head(const Raw<Traits>& raw, Values<Traits>& x) {
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i) widen_piece<typename Traits::Element, Traits::kWidth>(raw.piece[k][i], x[k][i]);
}

template <class Traits>
VK_DEVICE void store_head(const Params& p, const Place& at, typename Traits::Element* to, const Values<Traits>& x) {
  using T = typename Traits::Element;
  constexpr int kWidth = Traits::kWidth;
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k) {
    const Unit unit = unit_of<Traits>(p, at.lane + k * p.lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!unit.there[i]) continue;
      const Piece<T, kWidth> piece = narrow_piece<T, kWidth>(x[k][i]);
      if (p.loose)
        store_elements<T, kWidth>(to + unit.at[i], piece);
      else
        store_piece<T, kWidth>(to + unit.at[i], piece);
    }
  }
}

// f(x, vector), element by element, where the vector [d] belongs to the head; null changes nothing.
template <class Traits, class F>
VK_DEVICE void with_vector(const Params& p, const Place& at, const float* vector, Values<Traits>& x, const F& f) {
  if (vector == nullptr) return;
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k) {
    const Unit unit = unit_of<Traits>(p, at.lane + k * p.lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!unit.there[i]) continue;
      float w[Traits::kWidth];
      if (p.loose)
        for (int j = 0; j < Traits::kWidth; ++j) w[j] = load(vector + unit.at[i] + j);
      else
        load_floats(vector + unit.at[i], w);
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) f(x[k][i][j], w[j]);
    }
  }
}

template <class Traits>
VK_DEVICE float dot(const Values<Traits>& x, const Values<Traits>& y) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) sum += x[k][i][j] * y[k][i][j];
  return sum;
}

VK_DEVICE int first_head(const Params& p, const Head& head) {
  return head.part == 0   ? head.index
         : head.part == 1 ? p.x[0].count + head.index
                          : p.x[0].count + p.x[1].count + head.index;
}
VK_DEVICE const float* bias_of(const Params& p, const Head& head) {
  return p.bias && head.live ? p.bias + int64_t(first_head(p, head)) * p.d : nullptr;
}
VK_DEVICE const float* weight_of(const Params& p, const Head& head) {
  return head.normed ? p.x[head.part].norm + (p.all ? int64_t(head.index) * p.d : 0) : nullptr;
}

template <class T>
VK_DEVICE const T* projection(const Params& p, const Token& token, const Head& head) {
  return static_cast<const T*>(p.qkv) + token.ib * p.qkv_b + token.is * p.qkv_s + int64_t(first_head(p, head)) * p.d;
}
template <class T>
VK_DEVICE T* row_of(const Params& p, const Token& token, const Head& head) {
  const Heads& x = p.x[head.part];
  return static_cast<T*>(x.data) + token.ib * x.b + token.is * x.s + head.index * x.n;
}

// What a norm sees: bias added, turned where the rotation comes first.
template <class Traits>
VK_DEVICE void before_norm(const Params& p, const Place& at, const Head& head, int token, const Raw<Traits>& raw,
                           Values<Traits>& x) {
  widen_head<Traits>(raw, x);
  with_vector<Traits>(p, at, bias_of(p, head), x, [](float& a, float b) { a += b; });
  if (head.turns && head.normed && p.post) turn_head<Traits>(p, at, head, token, false, x);
}

VK_DEVICE float inverse_rms(const Params& p, float squares, int heads) {
  return 1.0f / sqrtf(squares / static_cast<float>(heads * p.d) + p.eps);
}

// Sums over all heads of a token, from one value per head lane: sums[i] for i < kSums, the same bits in every thread.
template <int kSums>
VK_DEVICE void sum_over_heads(const Params& p, const Place& at, float* scratch, float (&sums)[kSums]) {
  float* mine = scratch + (at.token_lane * p.head_lanes + at.head_lane) * kSums;
  const bool there = at.token_lane < p.token_lanes;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = sum_over_group(sums[i], p.lanes);
    if (there && at.lane == 0) store_shared(mine + i, sums[i]);
  }
  sync_block();
  if (there) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = 0.0f;
      for (int head = 0; head < p.head_lanes; ++head)
        sums[i] += load_shared(scratch + (at.token_lane * p.head_lanes + head) * kSums + i);
    }
  }
}

}  // namespace
}  // namespace vk
