// One pass over the packed projection: every head is loaded once, gets its bias, its norm and its rotation in registers
// and leaves for q, k or v. A token's angles are computed once, into shared memory, and serve its heads.
#include <algorithm>

#include "heads.h"
#include "qkv_prologue_cuda.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

template <class Traits>
struct Batch {
  Raw<Traits> head[Traits::kHeads];
};

VK_DEVICE int head_at(const Params& p, const Place& at, int round) {
  return (round * p.splits + block_y()) * p.head_lanes + at.head_lane;
}

template <class Traits>
VK_DEVICE void load_batch(const Params& p, const Place& at, const Token& token, int round, Batch<Traits>& batch) {
#pragma unroll
  for (int i = 0; i < Traits::kHeads; ++i) {
    const Head head = head_of(p, head_at(p, at, round + i), token.live);
    load_head<Traits>(p, at, projection<typename Traits::Element>(p, token, head), head.live, batch.head[i]);
  }
}

// For norms over all heads of a token: 1 / root mean square of q and of k. The rows are read a second time afterwards,
// then from L2.
template <class Traits>
VK_DEVICE void inverse_of_all(const Params& p, const Place& at, const Token& token, float* scratch,
                              float (&inverse)[2]) {
  const int heads = p.x[0].count + p.x[1].count;
  inverse[0] = inverse[1] = 0.0f;
  for (int first = at.head_lane; first < heads; first += p.head_lanes) {
    const Head head = head_of(p, first, token.live);
    if (!head.normed) continue;
    Raw<Traits> raw;
    Values<Traits> x;
    load_head<Traits, Cache::keep>(p, at, projection<typename Traits::Element>(p, token, head), true, raw);
    before_norm<Traits>(p, at, head, at.token_lane, raw, x);
    const float squares = dot<Traits>(x, x);
    inverse[0] += head.part == 0 ? squares : 0.0f, inverse[1] += head.part == 1 ? squares : 0.0f;
  }
  sum_over_heads(p, at, scratch, inverse);
  for (int i = 0; i < 2; ++i) inverse[i] = inverse_rms(p, inverse[i], p.x[i].count);
}

template <class Traits>
VK_DEVICE void finish_head(const Params& p, const Place& at, const Token& token, const Head& head,
                           const Raw<Traits>& raw, const float (&inverse)[2]) {
  Values<Traits> x;
  before_norm<Traits>(p, at, head, at.token_lane, raw, x);
  if (p.x[0].norm || p.x[1].norm) {
    const float r = p.all ? (head.part == 0 ? inverse[0] : inverse[1])
                          : inverse_rms(p, sum_over_group(dot<Traits>(x, x), p.lanes), 1);
    with_vector<Traits>(p, at, weight_of(p, head), x, [=](float& a, float w) { a = a * r * w; });
  }
  if (head.turns && !(head.normed && p.post)) turn_head<Traits>(p, at, head, at.token_lane, false, x);
  if (head.live) store_head<Traits>(p, at, row_of<typename Traits::Element>(p, token, head), x);
}

template <class Traits>
VK_KERNEL(kThreads, Traits::kBlocks)
prologue(const Params p) {
  const Place at = place_in_block(p);
  const int heads = p.x[0].count + p.x[1].count + p.x[2].count;
  const int step = p.head_lanes * p.splits, rounds = (heads + step - 1) / step;
  const int64_t first = block_x() * p.token_lanes;
  const Token token = token_of(p, first + at.token_lane, at.token_lane < p.token_lanes);
  Batch<Traits> batch;
  load_batch<Traits>(p, at, token, 0, batch);  // under way while the angles are computed
  float inverse[2] = {};
  if (p.turning) {
    fill_angles<Traits>(p, first, p.token_lanes);
    sync_block();
  }
  if (p.all) inverse_of_all<Traits>(p, at, token, angles_of<Traits>(p, p.token_lanes, 0), inverse);
  for (int round = 0; round < rounds; round += Traits::kHeads) {
#pragma unroll
    for (int i = 0; i < Traits::kHeads; ++i) {
      const Head head = head_of(p, head_at(p, at, round + i), token.live);
      finish_head<Traits>(p, at, token, head, batch.head[i], inverse);
    }
    if (round + Traits::kHeads < rounds) load_batch<Traits>(p, at, token, round + Traits::kHeads, batch);
  }
}

struct BackwardParams {
  Params p;  // x: the gradients that come in
  void* to;  // dqkv
  int64_t to_b, to_s;
  float* stats;     // tokens 4: 1 / rms and the mean of x times its gradient, of q and of k
  float* partials;  // rows columns
  int64_t columns, norm_column[2];
  int steps;  // tokens of a token lane between two fillings of the angles
};

// The gradient of what the norm gave (or of the head, without one), and what the norm took.
template <class Traits>
VK_DEVICE void norm_operands(const Params& p, const Place& at, const Head& head, int token, const Raw<Traits>& dy,
                             const Raw<Traits>& raw, Values<Traits>& g, Values<Traits>& x) {
  widen_head<Traits>(dy, g);
  if (head.turns && !(head.normed && p.post)) turn_head<Traits>(p, at, head, token, true, g);
  if (head.normed)
    before_norm<Traits>(p, at, head, token, raw, x);
  else
    widen_head<Traits>(raw, x);  // zeros
}

template <class Traits>
struct Operands {
  Raw<Traits> dy, x;
};

template <class Traits, Cache kCache = Cache::once>
VK_DEVICE void load_operands(const Params& p, const Place& at, const Token& token, const Head& head,
                             Operands<Traits>& o) {
  using T = typename Traits::Element;
  load_head<Traits, kCache>(p, at, row_of<const T>(p, token, head), head.live && token.live, o.dy);
  load_head<Traits, kCache>(p, at, projection<T>(p, token, head), head.normed && token.live, o.x);
}

// For norms over all heads: what their gradient needs of a whole token.
template <class Traits>
VK_KERNEL(kThreads, 2)
norm_stats(const BackwardParams b) {
  const Params& p = b.p;
  const Place at = place_in_block(p);
  const int heads = p.x[0].count + p.x[1].count;
  const int64_t first = block_x() * p.token_lanes;
  const Token token = token_of(p, first + at.token_lane, at.token_lane < p.token_lanes);
  if (p.turning) {
    fill_angles<Traits>(p, first, p.token_lanes);
    sync_block();
  }
  float sums[4] = {};  // squares and x times its gradient, of q and of k
  for (int i = at.head_lane; i < heads; i += p.head_lanes) {
    const Head head = head_of(p, i, token.live);
    if (!head.normed) continue;
    Operands<Traits> o;
    Values<Traits> g, x;
    load_operands<Traits, Cache::keep>(p, at, token, head, o);
    norm_operands<Traits>(p, at, head, at.token_lane, o.dy, o.x, g, x);
    with_vector<Traits>(p, at, weight_of(p, head), g, [](float& a, float w) { a *= w; });
    const float squares = dot<Traits>(x, x), mixed = dot<Traits>(g, x);
    sums[0] += head.part == 0 ? squares : 0.0f, sums[1] += head.part == 0 ? mixed : 0.0f;
    sums[2] += head.part == 1 ? squares : 0.0f, sums[3] += head.part == 1 ? mixed : 0.0f;
  }
  sum_over_heads(p, at, angles_of<Traits>(p, p.token_lanes, 0), sums);
  if (!token.live || at.head_lane > 0 || at.lane > 0) return;
  for (int i = 0; i < 2; ++i) {
    float* to = b.stats + 4 * (first + at.token_lane) + 2 * i;
    store(to, inverse_rms(p, sums[2 * i], p.x[i].count));
    store(to + 1, sums[2 * i + 1] / static_cast<float>(p.x[i].count * p.d));
  }
}

template <class Traits>
VK_DEVICE void add_to(Values<Traits>& sums, const Values<Traits>& x) {
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) sums[k][i][j] += x[k][i][j];
}

// The head's gradient from that of its norm; its share of the weights' gradient is added.
template <class Traits>
VK_DEVICE void undo_norm(const Params& p, const Place& at, const Head& head, float r, float mean, Values<Traits>& g,
                         const Values<Traits>& x, Values<Traits>& weight_sums) {
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) weight_sums[k][i][j] += g[k][i][j] * x[k][i][j] * r;
  with_vector<Traits>(p, at, weight_of(p, head), g, [](float& a, float w) { a *= w; });
  const float back = r * r * r * mean;
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) g[k][i][j] = g[k][i][j] * r - x[k][i][j] * back;
}

// r and mean of undo_norm: of the head, or of the token where the norm spans its heads.
template <class Traits>
VK_DEVICE void norm_numbers(const BackwardParams& b, const Place& at, const Head& head, int64_t token, bool live,
                            const Values<Traits>& g, const Values<Traits>& x, float& r, float& mean) {
  const Params& p = b.p;
  r = mean = 0.0f;
  if (p.all) {
    if (!head.normed || !live) return;
    r = load(b.stats + 4 * token + 2 * head.part);
    mean = load(b.stats + 4 * token + 2 * head.part + 1);
    return;
  }
  Values<Traits> weighted;
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kWidth; ++j) weighted[k][i][j] = x[k][i][j];
  with_vector<Traits>(p, at, weight_of(p, head), weighted, [](float& a, float w) { a *= w; });
  r = inverse_rms(p, sum_over_group(dot<Traits>(x, x), p.lanes), 1);
  mean = sum_over_group(dot<Traits>(weighted, g), p.lanes) / static_cast<float>(p.d);
}

template <class Traits>
VK_DEVICE void store_sums(const Params& p, const Place& at, float* to, const Values<Traits>& sums) {
#pragma unroll
  for (int k = 0; k < Traits::kUnits; ++k) {
    const Unit unit = unit_of<Traits>(p, at.lane + k * p.lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (unit.there[i]) store_floats(to + unit.at[i], sums[k][i]);
  }
}

// A thread keeps its head and walks over every blocks_x-th group of tokens, so that the sums over tokens stay in
// registers; the angles of a group are computed together.
template <class Traits>
VK_KERNEL(kThreads, 2)
prologue_bwd(const BackwardParams b) {
  using T = typename Traits::Element;
  const Params& p = b.p;
  const Place at = place_in_block(p);
  const Head head = head_of(p, block_y() * p.head_lanes + at.head_lane, at.token_lane == 0);
  Values<Traits> bias_sums{}, weight_sums{};
  for (int64_t first = block_x() * b.steps; first < p.tokens; first += blocks_x() * b.steps) {
    if (p.turning) {
      sync_block();  // nobody reads the angles of the group before
      fill_angles<Traits>(p, first, b.steps);
      sync_block();
    }
    constexpr bool kAhead = Traits::kUnits == 1;  // the next token's rows are under way meanwhile
    Operands<Traits> now, next;
    if (kAhead) load_operands<Traits>(p, at, token_of(p, first, true), head, next);
    for (int step = 0; step < b.steps; ++step) {
      if (kAhead) now = next;
      load_operands<Traits>(p, at, token_of(p, first + step + kAhead, step + kAhead < b.steps), head,
                            kAhead ? next : now);
      const Token token = token_of(p, first + step, true);
      Values<Traits> g, x;
      norm_operands<Traits>(p, at, head, step, now.dy, now.x, g, x);
      if (p.x[0].norm || p.x[1].norm) {
        float r, mean;
        norm_numbers<Traits>(b, at, head, first + step, token.live, g, x, r, mean);
        if (head.normed && token.live) {
          undo_norm<Traits>(p, at, head, r, mean, g, x, weight_sums);
          if (head.turns && p.post) turn_head<Traits>(p, at, head, step, true, g);
        }
      }
      if (head.live && token.live) {
        add_to<Traits>(bias_sums, g);
        T* to = static_cast<T*>(b.to) + token.ib * b.to_b + token.is * b.to_s;
        store_head<Traits>(p, at, to + int64_t(first_head(p, head)) * p.d, g);
      }
    }
  }
  if (!head.live) return;
  float* sums = b.partials + block_x() * b.columns;
  if (p.bias) store_sums<Traits>(p, at, sums + int64_t(first_head(p, head)) * p.d, bias_sums);
  if (head.normed) store_sums<Traits>(p, at, sums + b.norm_column[head.part] + int64_t(head.index) * p.d, weight_sums);
}

constexpr size_t kAngleBytes = 64 << 10;
constexpr int kFewBlocks = 264;  // two for each multiprocessor of a large GPU: with fewer, heads are shared out
constexpr int kSteps = 8;

// Whether heads divide into such pieces, and into which.
template <class Traits>
bool deal(Params& p) {
  constexpr int kWidth = Traits::kWidth;
  const int turning = 2 * p.rope.pairs, apart = p.rope.blocks ? p.rope.pairs / p.rope.blocks : kWidth;
  if (p.d % kWidth || p.rope.offset % kWidth || turning % kWidth || apart % kWidth) return false;
  p.inside = kWidth > 1 && p.rope.blocks == 0;
  p.turning = turning / kWidth, p.still = (p.d - turning) / kWidth;
  p.turning_units = (p.turning + 1) / 2, p.units = p.turning_units + (p.still + 1) / 2;
  for (p.lanes = 1; p.lanes * Traits::kUnits < p.units;) p.lanes *= 2;
  return p.lanes <= kWarp;
}

template <class T>
bool lies_in(int bytes, const void* data, const TensorRef& t, int dims) {
  bool good = reinterpret_cast<uintptr_t>(data) % size_t(bytes) == 0;
  for (int dim = 0; dim < dims; ++dim) good = good && (t.size(dim) == 1 || t.stride(dim) * int(sizeof(T)) % bytes == 0);
  return good;
}

// Whether every row, and every vector of floats, can be read in pieces of `bytes`.
template <class T>
bool aligned(const QkvPrologueParams& a, int bytes) {
  bool good = lies_in<T>(bytes, a.qkv.data, a.qkv, 2);
  for (const TensorRef& x : a.out) good = good && lies_in<T>(bytes, x.data, x, 3);
  for (const TensorRef* x : {&a.bias, &a.norm[0], &a.norm[1]})
    good = good && (!x->given || reinterpret_cast<uintptr_t>(x->data) % sizeof(Vector) == 0);
  return good;
}

template <class Traits>
size_t angle_bytes(const Params& p) {
  return size_t(p.rope.heads) * 2 * p.turning_units * Traits::kWidth * sizeof(float);
}

// Head and token lanes of a block: as few idle as can be, and a batch of heads for each.
template <class Traits>
void arrange(Params& p, int heads) {
  const int slots = kThreads / p.lanes;
  float best = 0.0f;
  for (int rounds = 1; rounds <= std::max(16, (heads + slots - 1) / slots); ++rounds) {
    const int head_lanes = (heads + rounds - 1) / rounds;
    if (head_lanes > slots) continue;
    const float busy = float(heads * (slots / head_lanes)) / float(slots * rounds);
    const float worth = busy * float(std::min(rounds, Traits::kHeads)) / float(Traits::kHeads);
    if (worth > best) best = worth, p.head_lanes = head_lanes;
  }
  p.token_lanes = slots / p.head_lanes;
  if (const size_t each = angle_bytes<Traits>(p)) p.token_lanes = std::clamp(int(kAngleBytes / each), 1, p.token_lanes);
}

int threads_of(const Params& p) { return (p.lanes * p.head_lanes * p.token_lanes + kWarp - 1) / kWarp * kWarp; }

// A block for every group of tokens that its token lanes hold at once.
template <class Traits>
device::Grid grid_over_tokens(const Params& p, int sums) {
  const int64_t blocks = (p.tokens + p.token_lanes - 1) / p.token_lanes;
  const size_t scratch = size_t(sums) * size_t(p.token_lanes * p.head_lanes) * sizeof(float);
  return {blocks, 1, threads_of(p), angle_bytes<Traits>(p) * size_t(p.token_lanes) + scratch};
}

Params params_of(const QkvPrologueParams& a) {
  Params p{};
  p.qkv = a.qkv.data, p.qkv_b = a.qkv.stride(0), p.qkv_s = a.qkv.stride(1);
  p.bias = a.bias.ptr<const float>();
  for (int i = 0; i < 3; ++i) {
    const TensorRef& x = a.out[i];
    p.x[i] = {x.data, x.stride(0), x.stride(1), x.stride(2), int(x.size(2)), nullptr};
    if (i < 2) p.x[i].norm = a.norm[i].ptr<const float>();
  }
  p.rope = rope_on_device(a.rope);
  p.s = a.qkv.size(1), p.tokens = a.qkv.size(0) * p.s;
  p.d = int(a.out[0].size(3));
  p.eps = float(a.eps), p.post = a.post;
  p.all = a.all_heads && (a.norm[0].given || a.norm[1].given);
  return p;
}

// A norm over all heads is served by the widest pieces and by elements.
template <class Traits>
constexpr bool kSpansHeads = Traits::kWidth * sizeof(typename Traits::Element) != 8;

template <class Traits>
void forward(Params p, const Stream& stream) {
  const int heads = p.x[0].count + p.x[1].count + p.x[2].count;
  arrange<Traits>(p, heads);
  device::Grid grid = grid_over_tokens<Traits>(p, p.all ? 2 : 0);
  p.splits =
      int(std::clamp<int64_t>(kFewBlocks / std::max<int64_t>(grid.x, 1), 1, (heads + p.head_lanes - 1) / p.head_lanes));
  grid.y = p.splits;
  launch("qkv_prologue", prologue<Traits>, grid, stream, p);
}

template <class Traits>
void backward(const QkvPrologueCudaBackward& a, Params p, const Stream& stream) {
  const int heads = p.x[0].count + p.x[1].count + p.x[2].count;
  BackwardParams b{};
  b.to = a.dqkv.data, b.to_b = a.dqkv.stride(0), b.to_s = a.dqkv.stride(1);
  b.stats = a.stats.ptr<float>(), b.partials = a.partials.ptr<float>(), b.columns = a.partials.size(1);
  b.norm_column[0] = p.bias ? int64_t(heads) * p.d : 0;
  b.norm_column[1] = b.norm_column[0] + (p.x[0].norm ? int64_t(p.x[0].count) * p.d : 0);
  if constexpr (kSpansHeads<Traits>)
    if (p.all) {
      b.p = p;
      arrange<Traits>(b.p, p.x[0].count + p.x[1].count);
      launch("qkv_prologue, norm_stats", norm_stats<Traits>, grid_over_tokens<Traits>(b.p, 4), stream, b);
    }
  const int most = kThreads / p.lanes, chunks = (heads + most - 1) / most;
  p.head_lanes = (heads + chunks - 1) / chunks, p.token_lanes = 1;
  b.p = p;
  const size_t each = angle_bytes<Traits>(p);
  b.steps = each ? std::clamp(int(kAngleBytes / each), 1, kSteps) : kSteps;
  launch("qkv_prologue, backward", prologue_bwd<Traits>,
         {a.partials.size(0), chunks, threads_of(p), each * size_t(b.steps)}, stream, b);
}

// The widest pieces that the layout allows, so that sums have one order however the tensors lie. 8 bytes are for halves
// of 36 elements in 16-bit types.
template <class T, class Run>
void with_traits(const QkvPrologueParams& a, const TensorRef* dqkv, const Run& run) {
  using Wide = HeadTraits<T, 16, 1, 3>;
  using Single = HeadTraits<T, sizeof(T), 4, 1>;
  Params p = params_of(a);
  const auto loose = [&](int bytes) {
    return !aligned<T>(a, bytes) || (dqkv && !lies_in<T>(bytes, dqkv->data, *dqkv, 2));
  };
  if (deal<Wide>(p)) {
    p.loose = loose(16);
    return run(Wide{}, p);
  }
  if constexpr (sizeof(T) == 2) {
    using Half = HeadTraits<T, 8, 1, 4>;
    if (!p.all && deal<Half>(p)) {
      p.loose = loose(8);
      return run(Half{}, p);
    }
  }
  deal<Single>(p);
  run(Single{}, p);
}

template <class T>
void forward_of(const QkvPrologueParams& a, const Stream& stream) {
  with_traits<T>(a, nullptr, [&](auto traits, const Params& p) { forward<decltype(traits)>(p, stream); });
}

template <class T>
void backward_of(const QkvPrologueCudaBackward& a, const Stream& stream) {
  with_traits<T>(a.forward, &a.dqkv, [&](auto traits, const Params& p) { backward<decltype(traits)>(a, p, stream); });
}

}  // namespace

void qkv_prologue_cuda(const QkvPrologueParams& p, const Stream& stream) {
  switch (p.qkv.dtype) {
    case Dtype::bf16:
      return forward_of<bf16>(p, stream);
    case Dtype::f16:
      return forward_of<f16>(p, stream);
    default:
      return forward_of<float>(p, stream);
  }
}

void qkv_prologue_bwd_cuda(const QkvPrologueCudaBackward& p, const Stream& stream) {
  switch (p.dqkv.dtype) {
    case Dtype::bf16:
      return backward_of<bf16>(p, stream);
    case Dtype::f16:
      return backward_of<f16>(p, stream);
    default:
      return backward_of<float>(p, stream);
  }
}

}  // namespace vk
