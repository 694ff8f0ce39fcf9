// A tile of queries walks the keys its intervals span: scores, online softmax, weights times values. Keys and values
// come through one ring of tiles, two loads ahead of the products.
#include "attention_cuda.h"
#include "attention_loop.h"
#include "attention_notes.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

using namespace device;

template <class T, int kHeadSize, bool kWithBox>
struct ForwardTraits {
  using Element = T;
  static constexpr bool kBoxed = kWithBox;
  static constexpr int kD = kHeadSize, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kM = 2;                       // 16-row tiles of a warp: one operand of keys serves both
  static constexpr int kQueries = kWarps * kM * 16;  // of a block
  static constexpr int kKeys = kBoxed && kHeadSize == 128 ? 32 : 64, kSlots = 3;  // registers
  using Queries = Tile<T, kQueries, kD>;
  using Keys = Tile<T, kKeys, kD>;
  using Loads = Ring<Keys, kSlots>;
  using Window = Sight<kQueries, kKeys>;
  static constexpr size_t kWindow = kBoxed ? Window::kBytes : 0;
  static constexpr size_t kSharedBytes = Queries::kBytes + Loads::kBytes + kWindow + Notes<kQueries, kKeys>::kBytes;
};

struct ForwardParams {
  Problem problem;  // its scale is positive: `sign` carries what is lost
  float sign;
  void* o;     // b s_q n d
  float* lse;  // b n s_q
};

template <class Traits>
struct Rooms {
  typename Traits::Queries q;
  typename Traits::Loads ring;
  typename Traits::Window sight;
  Notes<Traits::kQueries, Traits::kKeys> notes;
};

template <class Traits>
VK_DEVICE Rooms<Traits> rooms() {
  char* ring = shared_memory() + Traits::Queries::kBytes;
  char* sight = ring + Traits::Loads::kBytes;
  return {{reinterpret_cast<typename Traits::Element*>(shared_memory())},
          {ring},
          sight_at<Traits::kQueries, Traits::kKeys>(sight),
          notes_at<Traits::kQueries, Traits::kKeys>(sight + Traits::kWindow)};
}

// Load 2 t fetches the keys of step t, load 2 t + 1 its values.
template <class Traits>
VK_DEVICE void start_load(const Problem& p, const Rooms<Traits>& room, int index, int steps) {
  if (index < 2 * steps)
    copy_keys<Traits::kThreads>(index % 2 ? p.v : p.k, p.d, p.share, room.notes, index / 2, slot_of(room.ring, index));
  commit_copies();
  if (index % 2 == 0) {
    note_keys(p.mask, room.notes, index / 2 + 1, steps);
    if constexpr (Traits::kBoxed) note_boxed_keys(p.mask, room.notes, room.sight, index / 2 + 1, steps);
  }
}

// Multiplies this warp's queries by -1 or 0, which changes no digit: the softmax wants a positive scale.
template <class Traits>
VK_DEVICE void turn_queries(const typename Traits::Queries& tile, float sign) {
  using T = typename Traits::Element;
  wait_for_copies<0>();
  sync_block();
  constexpr int kVectors = Traits::kM * 16 * Traits::kD / 8;
  Vector* rows = reinterpret_cast<Vector*>(tile.data) + warp() * kVectors;
  for (int i = lane(); i < kVectors; i += kWarp) {
    float x[8];
    widen<T>(load_shared(rows + i), x);
    for (float& e : x) e *= sign;
    store_shared(rows + i, narrow<T>(x));
  }
  sync_warp();
}

// Completes the softmax of a 16-row tile, whose first row is `first` of the block's: divides, writes lse.
template <class Traits>
VK_DEVICE void complete_rows(const ForwardParams& p, const Rooms<Traits>& room, int first,
                             FragmentC (&acc)[Traits::kD / 8], OnlineSoftmax& softmax) {
  const Place at = load_shared(room.notes.place);
  const int live = at.live_q - load_shared(room.notes.tile).first;
  float* lse = p.lse + (at.sample * p.problem.schedule.heads + at.head) * p.problem.mask.q.tokens;
  complete(softmax);
  float by[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + lane() / 4 + 8 * half, row = load_shared(room.notes.rows + r);
    // The core asks nobody: dropped queries went through it, too.
    by[half] = r < live ? inverse_of(softmax.total[half]) : 0.0f;
    const float base = base_of(softmax.top[half], p.problem.scale);
    if (row >= 0 && lane() % 4 == 0) store(lse + row, r < live ? natural_lse(base, softmax.total[half]) : kNothing);
  }
  rescale(acc, by);
}

// Weights of the keys of step `step`; sums that were made with other maxima are brought to the new ones.
template <class Traits>
VK_DEVICE void weigh(const Problem& p, const Rooms<Traits>& room, const typename Traits::Keys& keys, int step,
                     FragmentA (&weights)[Traits::kM][Traits::kKeys / 16], FragmentC (&acc)[Traits::kM][Traits::kD / 8],
                     OnlineSoftmax (&softmax)[Traits::kM]) {
  using T = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kKeys / 8;
  const int first = warp() * kM * 16;
  FragmentC s[kM][kN] = {};
  multiply_rows<T>(s, room.q, first, keys);
  const KeyBlock block = key_block<Traits::kKeys>(room.notes.runs, step);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if constexpr (Traits::kBoxed)
      hide(s[m], seen_bits<kN>(room.sight, first + 16 * m, 0), kNothing);
    else if (block.masked)
      hide(s[m], counting<kN>(room.notes, block, first + 16 * m), kNothing);
    float keep[2];
    softmax_step(softmax[m], s[m], p.scale, keep);
    round_weights<T>(weights[m], s[m]);
    rescale(acc[m], keep);
  }
}

template <class Traits>
VK_KERNEL(Traits::kThreads, 2)
attend(const ForwardParams params) {
  using T = typename Traits::Element;
  constexpr int kM = Traits::kM, kThreads = Traits::kThreads;
  const Problem& p = params.problem;
  const Rooms<Traits> room = rooms<Traits>();
  const int steps = plan_walk<kThreads>(p.mask, p.schedule, room.notes), first = warp() * kM * 16;
  if constexpr (Traits::kBoxed) note_boxed_keys(p.mask, room.notes, room.sight, 0, steps);
  copy_queries<kThreads>(p.q, p.d, room.notes, room.q);
  start_load(p, room, 0, steps);
  start_load(p, room, 1, steps);
  if (params.sign != 1.0f) turn_queries<Traits>(room.q, params.sign);

  FragmentC acc[kM][Traits::kD / 8] = {};
  OnlineSoftmax softmax[kM];
  for (int step = 0; step < steps; ++step) {
    const auto keys = wait_for(room.ring, 2 * step);
    start_load(p, room, 2 * step + 2, steps);
    FragmentA weights[kM][Traits::kKeys / 16];
    bool sees = true;
    if constexpr (Traits::kBoxed) sees = queries_see<kM * 16>(p.mask, room.notes, room.sight, step, first);
    if (sees) weigh(p, room, keys, step, weights, acc, softmax);
    const auto values = wait_for(room.ring, 2 * step + 1);
    start_load(p, room, 2 * step + 3, steps);
    if (sees) mix_rows<T>(acc, weights, values, p.d);
  }
  wait_for_copies<0>();  // of a walk without steps, the queries

#pragma unroll
  for (int m = 0; m < kM; ++m) complete_rows(params, room, first + 16 * m, acc[m], softmax[m]);
  store_queries<T>(p, params.o, room.notes, room.q, first, acc);
}

template <class Traits>
void run(const AttentionParams& a, const Stream& stream) {
  if (a.o.numel() == 0) return;
  ForwardParams p{problem_of(a, Traits::kQueries, Traits::kQueries, false), 1.0f, a.o.data, a.lse.ptr<float>()};
  p.sign = a.scale > 0 ? 1.0f : a.scale < 0 ? -1.0f : 0.0f;
  p.problem.scale = a.scale == 0 ? 1.0f : std::fabs(p.problem.scale);
  launch("attention, attend", attend<Traits>,
         {blocks_of(p.problem.schedule), 1, Traits::kThreads, Traits::kSharedBytes}, stream, p);
}

template <class T, bool kBoxed>
void by_head_size(const AttentionParams& a, const Stream& stream) {
  const int64_t d = a.q.size(3);
  if (d <= 64) return run<ForwardTraits<T, 64, kBoxed>>(a, stream);
  if (d <= 80) return run<ForwardTraits<T, 80, kBoxed>>(a, stream);
  if (d <= 96) return run<ForwardTraits<T, 96, kBoxed>>(a, stream);
  run<ForwardTraits<T, 128, kBoxed>>(a, stream);
}

template <class T>
void by_mask(const AttentionParams& a, const Stream& stream) {
  a.mask.q_attr ? by_head_size<T, true>(a, stream) : by_head_size<T, false>(a, stream);
}

}  // namespace

void attention_forward_cuda(const AttentionParams& p, const Stream& stream) {
  p.q.dtype == Dtype::bf16 ? by_mask<bf16>(p, stream) : by_mask<f16>(p, stream);
}

}  // namespace vk
