// rearrange on the GPU: moves by strides (move.h), and rows gathered into registers (gather.h), finished there and
// stored once.
#include <algorithm>

#include "gather.h"
#include "move.h"
#include "rearrange_cuda.h"
#include "vkernels/device/launch.h"

namespace vk {
namespace {

constexpr int kThreads = 256, kMostThreads = 512;

struct RowParams {
  RowPlan plan;
  const float *bias, *gate, *norm_weight, *norm_bias;  // c, or null
  DenseRows residual, y, sum;
  const int32_t* rows;  // where a row goes in y, or null
  int64_t rows_b, s_out;
  int norm;  // 0 none, 1 layer, 2 rms
  float scale, eps;
  bool accumulate;
};

// Where an output row goes; negative: nowhere.
VK_DEVICE int64_t target_of(const RowParams& p, const RowPlace& at) {
  if (!at.live) return -1;
  if (p.rows == nullptr) return at.row;
  const int64_t to = load(p.rows + at.sample * p.rows_b + at.row);
  return to < p.s_out ? to : -1;
}

// Single rows, bit for bit.
template <int kBytes>
VK_KERNEL(kThreads)
move_rows(const RowParams p) {
  using U = typename UnitOf<kBytes>::type;
  constexpr int kRows = 2;  // under way
  const RowPlan& plan = p.plan;
  const int64_t first = block_x() / plan.parts * plan.row_lanes * kRows;
  U unit[kRows];
  U* to[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const RowPlace at = row_place(plan, first + k * plan.row_lanes, plan.tasks);
    const int64_t column = block_x() % plan.parts * plan.lanes + at.lane, row = target_of(p, at);
    to[k] = nullptr;
    if (row < 0 || column >= plan.c) continue;
    to[k] = static_cast<U*>(p.y.data) + at.sample * p.y.b + row * p.y.r + column;
    const U* from = row_at<U>(plan, at.sample, load(plan.idx + at.sample * plan.idx_b + at.row));
    unit[k] = from ? load_unit(from + column) : U{};
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    if (to[k]) store_unit(to[k], unit[k]);
}

// u = residual + scale * gate * (v + bias)
template <class Traits>
VK_DEVICE void add_and_scale(const RowParams& p, const RowPlace& at, RowValues<Traits>& v) {
  with_channels<Traits>(p.plan, at, p.bias, v, [](float& a, float b) { a += b; });
  with_channels<Traits>(p.plan, at, p.gate, v, [](float& a, float b) { a *= b; });
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) v[k][i] *= p.scale;
  add_dense<Traits>(p.plan, at, p.residual, at.row, v);
}

template <class Traits, bool kNorm>
VK_KERNEL(kNorm ? kMostThreads : kThreads)
finish_rows(const RowParams p) {
  const RowPlan& plan = p.plan;
  const RowPlace at = row_place(plan, block_x() / plan.parts * plan.row_lanes, plan.tasks);
  const int64_t to = target_of(p, at);
  RowValues<Traits> u;
  reduce_taps<Traits>(plan, at, u);
  add_and_scale<Traits>(p, at, u);
  store_dense<Traits>(plan, at, p.sum, at.row, u);
  if constexpr (kNorm) {
    const Statistics s =
        statistics_of<Traits>(plan, at, u, p.norm == 1, p.eps, reinterpret_cast<float*>(shared_memory()));
#pragma unroll
    for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
      for (int i = 0; i < Traits::kWidth; ++i) u[k][i] = (u[k][i] - s.mean) * s.inverse;
    with_channels<Traits>(plan, at, p.norm_weight, u, [](float& a, float b) { a *= b; });
    with_channels<Traits>(plan, at, p.norm_bias, u, [](float& a, float b) { a += b; });
  }
  if (to < 0) return;
  if (p.accumulate) add_dense<Traits>(plan, at, p.y, to, u);
  store_dense<Traits>(plan, at, p.y, to, u);
}

// Gradients of the parameters, in the order of their sums; -1: not wanted.
struct Sums {
  int bias, gate, weight, norm_bias;
  int count;
};

struct BackwardParams {
  RowParams forward;  // y, sum and rows unused
  DenseRows dy, dsum, du, dv;
  Sums sums;
  float* partial;  // chunks 4 c
  int64_t chunks;
};

// Sums over the rows of a row lane, in shared memory: every thread adds to channels of its own.
struct Accumulators {
  float* data;
  int64_t channels;  // of one sum
};
template <class Traits>
VK_DEVICE Accumulators accumulators(const BackwardParams& b, int row_lane) {
  const RowPlan& p = b.forward.plan;
  const int64_t channels = int64_t(p.lanes) * Traits::kVectors * Traits::kWidth;
  return {reinterpret_cast<float*>(shared_memory()) + kWarp + row_lane * b.sums.count * channels, channels};
}
// x y, or x where there is no y.
template <class Traits>
VK_DEVICE void add_to(const BackwardParams& b, const RowPlace& at, int which, const RowValues<Traits>& x,
                      const RowValues<Traits>* y = nullptr) {
  if (which < 0 || !at.live) return;
  const Accumulators a = accumulators<Traits>(b, at.row_lane);
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; i += 4) {
      Vector* to =
          reinterpret_cast<Vector*>(a.data + which * a.channels + channel_of<Traits>(b.forward.plan, at, k) + i);
      Vector sum = load_shared(to);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum.word[j] = float_bits(bits_float(sum.word[j]) + (y ? x[k][i + j] * (*y)[k][i + j] : x[k][i + j]));
      store_shared(to, sum);
    }
}
template <class Traits>
VK_DEVICE void store_sums(const BackwardParams& b, int64_t chunk) {
  const RowPlan& p = b.forward.plan;
  const int which[4] = {b.sums.bias, b.sums.gate, b.sums.weight, b.sums.norm_bias};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (which[i] < 0) continue;
    for (int64_t c = thread_index(); c < p.c; c += thread_count()) {
      float sum = 0.0f;
      for (int lane = 0; lane < p.row_lanes; ++lane) {
        const Accumulators a = accumulators<Traits>(b, lane);
        sum += load_shared(a.data + which[i] * a.channels + c);
      }
      store(b.partial + (chunk * 4 + i) * p.c + c, sum);
    }
  }
}

template <class Traits, class F>
VK_DEVICE void each(RowValues<Traits>& x, const RowValues<Traits>& y, const F& f) {
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) f(x[k][i], y[k][i]);
}

// g: the gradient of y, then that of u. The row is gathered again rather than saved.
template <class Traits>
VK_DEVICE void undo_norm(const BackwardParams& b, const RowPlace& at, float* scratch, RowValues<Traits>& g) {
  const RowParams& p = b.forward;
  const float c = static_cast<float>(p.plan.c);
  RowValues<Traits> u;
  reduce_taps<Traits>(p.plan, at, u);
  add_and_scale<Traits>(p, at, u);
  const Statistics s = statistics_of<Traits>(p.plan, at, u, p.norm == 1, p.eps, scratch);
#pragma unroll
  for (int k = 0; k < Traits::kVectors; ++k)
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) u[k][i] = (u[k][i] - s.mean) * s.inverse;
  add_to<Traits>(b, at, b.sums.norm_bias, g);
  add_to<Traits>(b, at, b.sums.weight, g, &u);
  with_channels<Traits>(p.plan, at, p.norm_weight, g, [](float& x, float w) { x *= w; });
  float sum = 0.0f, mixed = 0.0f;
  each<Traits>(g, u, [&](float& x, float y) { sum += x, mixed += x * y; });
  sum = p.norm == 1 ? sum_over_row(p.plan, at, sum, scratch) / c : 0.0f;
  mixed = sum_over_row(p.plan, at, mixed, scratch) / c;
  each<Traits>(g, u, [=](float& x, float y) { x = (x - sum - y * mixed) * s.inverse; });
}

// A block goes through a chunk of the rows; the sums over them stay in shared memory and leave once.
template <class Traits>
VK_KERNEL(kMostThreads)
finish_rows_bwd(const BackwardParams b) {
  const RowParams& p = b.forward;
  const RowPlan& plan = p.plan;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t floats = plan.row_lanes * b.sums.count * accumulators<Traits>(b, 0).channels;
  for (int64_t i = thread_index(); i < floats; i += thread_count()) store_shared(scratch + kWarp + i, 0.0f);
  sync_block();
  const int64_t chunk = block_x(), end = plan.tasks * (chunk + 1) / b.chunks;
  for (int64_t task = plan.tasks * chunk / b.chunks; task < end; task += plan.row_lanes) {
    const RowPlace at = row_place(plan, task, end);
    RowValues<Traits> g = {};
    add_dense<Traits>(plan, at, b.dy, at.row, g);
    if (p.norm) undo_norm<Traits>(b, at, scratch, g);
    add_dense<Traits>(plan, at, b.dsum, at.row, g);
    store_dense<Traits>(plan, at, b.du, at.row, g);
    each<Traits>(g, g, [&](float& x, float) { x *= p.scale; });
    if (b.sums.gate >= 0) {
      RowValues<Traits> v;
      reduce_taps<Traits>(plan, at, v);
      with_channels<Traits>(plan, at, p.bias, v, [](float& x, float w) { x += w; });
      add_to<Traits>(b, at, b.sums.gate, v, &g);
    }
    with_channels<Traits>(plan, at, p.gate, g, [](float& x, float w) { x *= w; });
    add_to<Traits>(b, at, b.sums.bias, g);
    store_dense<Traits>(plan, at, b.dv, at.row, g);
  }
  sync_block();
  store_sums<Traits>(b, chunk);
}

DenseRows dense_of(const TensorRef& t) {
  if (!t.given) return {};
  return {t.data, t.stride(0), t.stride(1), t.dtype};
}

bool whole_vectors(const TensorRef& t, int width) {
  bool good = !t.given || reinterpret_cast<uintptr_t>(t.data) % sizeof(Vector) == 0;
  for (int dim = 0; t.given && dim + 1 < t.rank; ++dim) good = good && (t.size(dim) == 1 || t.stride(dim) % width == 0);
  return good;
}

// Row axes that run on are one; the caller has seen to it that at most three are left.
RowSource source_of(const TensorRef& t, int64_t first) {
  int64_t size[3] = {1, 1, 1}, stride[3] = {};
  int count = 0;
  for (int d = 1; d + 1 < t.rank; ++d) {
    if (t.size(d) == 1) continue;
    if (count > 0 && stride[count - 1] == t.size(d) * t.stride(d))
      size[count - 1] *= t.size(d), stride[count - 1] = t.stride(d);
    else
      size[count] = t.size(d), stride[count++] = t.stride(d);
  }
  const int64_t b = t.size(0) == 1 ? 0 : t.stride(0);
  return {t.data, first, b, stride[0], stride[1], stride[2], int32_t(size[1]), int32_t(size[2])};
}

int64_t over_samples(const TensorRef& t) { return !t.given || t.size(0) == 1 ? 0 : t.stride(0); }

RowParams params_of(const RearrangeRowsParams& a, int64_t b) {
  RowParams p{};
  RowPlan& plan = p.plan;
  plan.sources = a.sources;
  for (int i = 0; i < a.sources; ++i) {
    plan.x[i] = source_of(a.x[i], plan.n_rows);
    int64_t rows = 1;
    for (int d = 1; d + 1 < a.x[i].rank; ++d) rows *= a.x[i].size(d);
    plan.n_rows += rows;
  }
  plan.taps = a.idx.size(1), plan.n_out = a.ptr.given ? a.ptr.size(1) - 1 : plan.taps, plan.tasks = b * plan.n_out;
  plan.ptr = a.ptr.ptr<const int32_t>(), plan.idx = a.idx.ptr<const int32_t>();
  plan.weight = a.weight.ptr<const float>();
  plan.ptr_b = over_samples(a.ptr), plan.idx_b = over_samples(a.idx), plan.weight_b = over_samples(a.weight);
  plan.c = a.x[0].size(-1), plan.max = a.reduce == 1;
  p.bias = a.bias.ptr<const float>(), p.gate = a.gate.ptr<const float>();
  p.norm_weight = a.norm_weight.ptr<const float>(), p.norm_bias = a.norm_bias.ptr<const float>();
  p.residual = dense_of(a.residual), p.y = dense_of(a.y), p.sum = dense_of(a.sum);
  p.rows = a.rows.ptr<const int32_t>(), p.rows_b = over_samples(a.rows);
  p.s_out = a.y.given ? a.y.size(1) : 0;
  p.norm = a.norm, p.scale = a.scale, p.eps = a.eps, p.accumulate = a.accumulate;
  return p;
}

// Whether anything keeps the rows from being read in vectors of `width` elements.
bool loose(const RearrangeRowsParams& a, std::initializer_list<const TensorRef*> more, int width) {
  bool good = a.x[0].size(-1) % width == 0;
  for (int i = 0; i < a.sources; ++i) good = good && whole_vectors(a.x[i], width);
  for (const TensorRef* t : {&a.bias, &a.gate, &a.norm_weight, &a.norm_bias, &a.residual, &a.y, &a.sum})
    good = good && whole_vectors(*t, width);
  for (const TensorRef* t : more) good = good && whole_vectors(*t, width);
  return !good;
}

// Threads over the columns of a row, which blocks beside each other may share.
device::Grid over_columns(RowPlan& p, int64_t columns, int rows) {
  p.parts = int((columns + kThreads - 1) / kThreads);
  p.lanes = int((columns + p.parts - 1) / p.parts);
  p.row_lanes = kThreads / p.lanes;
  const int64_t blocks = (p.tasks + p.row_lanes * rows - 1) / (p.row_lanes * rows);
  return {blocks * p.parts, 1, kThreads};
}

// Threads over whole rows, a power of two of lanes of a warp or whole warps for each; how many there are.
template <class Traits>
int over_rows(RowPlan& p, int most) {
  const int64_t channels = Traits::kVectors * Traits::kWidth, threads = (p.c + channels - 1) / channels;
  p.parts = 1;
  for (p.lanes = 1; p.lanes < threads && p.lanes < kWarp;) p.lanes *= 2;
  if (threads > kWarp) p.lanes = int((threads + kWarp - 1) / kWarp * kWarp);
  p.row_lanes = std::max(most / p.lanes, 1);
  return p.lanes * p.row_lanes;
}

int bytes_of(Dtype t) {
  return t == Dtype::f64 || t == Dtype::i64 ? 8 : t == Dtype::f32 || t == Dtype::i32 ? 4 : t <= Dtype::f16 ? 2 : 1;
}

template <class Run>
void with_unit(int bytes, const Run& run) {
  switch (bytes) {
    case 16:
      return run(std::integral_constant<int, 16>{});
    case 8:
      return run(std::integral_constant<int, 8>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    default:
      return run(std::integral_constant<int, 1>{});
  }
}

// Of elements of `size` bytes: the largest units of up to 16 bytes that divide everything.
void move(const RearrangeRowsParams& a, const Stream& stream) {
  const int size = bytes_of(a.x[0].dtype), per = 16 / size;
  RowParams p = params_of(a, a.y.size(0));
  int unit = per;
  while (unit > 1 && loose(a, {}, unit)) unit /= 2;
  p.plan.c /= unit, p.y.b /= unit, p.y.r /= unit;
  for (RowSource& x : p.plan.x) x.b /= unit, x.s0 /= unit, x.s1 /= unit, x.s2 /= unit;
  const device::Grid grid = over_columns(p.plan, p.plan.c, 2);
  with_unit(unit * size, [&](auto bytes) { launch("rearrange, move_rows", move_rows<bytes()>, grid, stream, p); });
}

template <class T>
void finish(const RearrangeRowsParams& a, const Stream& stream) {
  RowParams p = params_of(a, a.y.size(0));
  p.plan.loose = loose(a, {}, kLanesOf<T>);
  if (p.norm == 0) {
    const device::Grid grid = over_columns(p.plan, (p.plan.c + kLanesOf<T> - 1) / kLanesOf<T>, 1);
    return launch("rearrange, rows", finish_rows<RowTraits<T, 1>, false>, grid, stream, p);
  }
  const int threads = over_rows<WholeRow<T>>(p.plan, kThreads);
  const int64_t blocks = (p.plan.tasks + p.plan.row_lanes - 1) / p.plan.row_lanes;
  launch("rearrange, rows and norm", finish_rows<WholeRow<T>, true>, {blocks, 1, threads, kWarp * sizeof(float)},
         stream, p);
}

template <class T>
void finish_bwd(const RearrangeRowsBwdParams& a, const Stream& stream) {
  using Traits = WholeRow<T>;
  const RearrangeRowsParams& f = a.forward;
  BackwardParams b{};
  b.forward = params_of(f, a.dy.size(0));
  RowPlan& plan = b.forward.plan;
  plan.loose = loose(f, {&a.dy, &a.dsum, &a.du, &a.dv}, kLanesOf<T>);
  b.dy = dense_of(a.dy), b.dsum = dense_of(a.dsum), b.du = dense_of(a.du), b.dv = dense_of(a.dv);
  b.partial = a.partial.ptr<float>(), b.chunks = a.partial.size(0);
  const auto sum = [&](bool wanted) { return wanted ? b.sums.count++ : -1; };
  b.sums.bias = sum(f.bias.given), b.sums.gate = sum(f.gate.given);
  b.sums.weight = sum(f.norm && f.norm_weight.given), b.sums.norm_bias = sum(f.norm && f.norm_bias.given);
  const int threads = over_rows<Traits>(plan, kMostThreads);
  const size_t each = size_t(b.sums.count * plan.lanes * Traits::kVectors * Traits::kWidth) * sizeof(float);
  if (plan.row_lanes > 1 && each > 0) plan.row_lanes = std::clamp(int(kMostSumBytes / 2 / each), 1, plan.row_lanes);
  launch("rearrange, backward", finish_rows_bwd<Traits>,
         {b.chunks, 1, threads, kWarp * sizeof(float) + size_t(plan.row_lanes) * each}, stream, b);
}

// Factors in output order: those that run on merged, those of one element left out, the last one first.
Factors merged(const RearrangeAffineParams& a) {
  Factors f{};
  for (int i = a.rank; i-- > 0;) {
    if (a.sizes[i] == 1) continue;
    const int last = f.count - 1;
    if (f.count > 0 && a.x_strides[i] == f.x[last] * f.size[last] && a.y_strides[i] == f.y[last] * f.size[last]) {
      f.size[last] *= a.sizes[i];
    } else {
      f.size[f.count] = a.sizes[i], f.x[f.count] = a.x_strides[i], f.y[f.count++] = a.y_strides[i];
    }
  }
  return f;
}

bool divides(int64_t unit, const int64_t* numbers, int count) {
  bool good = true;
  for (int i = 0; i < count; ++i) good = good && numbers[i] % unit == 0;
  return good;
}

void copy(const RearrangeAffineParams& a, Factors f, int64_t total, const Stream& stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y);
  const auto whole = [&](int n) {
    return f.count > 0 && addresses % (n * a.element_bytes) == 0 && f.size[0] % n == 0 &&
           divides(n, f.x + 1, f.count - 1);
  };
  int unit = 16 / a.element_bytes;
  while (unit > 1 && !whole(unit)) unit /= 2;
  if (unit > 1) f.size[0] /= unit;
  for (int k = 1; k < f.count; ++k) f.x[k] /= unit, f.y[k] /= unit;
  const CopyParams p{a.x, a.y, f, total / unit};
  const int64_t each = kCopyThreads * kCopyUnits;
  with_unit(unit * a.element_bytes, [&](auto bytes) {
    launch("rearrange, copy_runs", copy_runs<bytes()>, {(p.total + each - 1) / each, 1, kCopyThreads}, stream, p);
  });
}

// Tiles of the factor y is fastest along, which is the first here, and the one x is fastest along.
template <int kBytes>
void turn_tiles(const RearrangeAffineParams& a, Factors f, const Stream& stream) {
  constexpr int kWidth = kTurnWidth<kBytes>, kSide = kTurnSide<kBytes>;
  TurnParams p{};
  p.x = a.x, p.y = a.y;
  p.size_j = f.size[0], p.xj = f.x[0];
  int i = -1;
  for (int k = 1; k < f.count; ++k)
    if (f.x[k] > 0 && (i < 0 || f.x[k] < f.x[i])) i = k;
  p.size_i = i < 0 ? 1 : f.size[i], p.xi = i < 0 ? 0 : f.x[i], p.yi = i < 0 ? 1 : f.y[i];
  for (int k = 1; k < f.count; ++k)
    if (k != i) {
      const int at = p.factors.count++;
      p.factors.size[at] = f.size[k], p.factors.x[at] = f.x[k], p.factors.y[at] = f.y[k];
    }
  const auto aligned = [&](const void* data, const int64_t* strides, int64_t side, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && divides(kWidth, strides, p.factors.count) &&
           side % kWidth == 0 && stride % kWidth == 0;
  };
  p.loose_x = p.xi != 1 || !aligned(a.x, p.factors.x, p.size_i, p.xj);
  p.loose_y = !aligned(a.y, p.factors.y, p.size_j, p.yi);
  p.tiles_i = (p.size_i + kSide - 1) / kSide, p.tiles_j = (p.size_j + kSide - 1) / kSide;
  int64_t blocks = p.tiles_i * p.tiles_j;
  for (int k = 0; k < p.factors.count; ++k) blocks *= p.factors.size[k];
  launch("rearrange, turn", turn<kBytes>, {blocks, 1, kTurnThreads<kBytes>, size_t(kSide) * 8 * sizeof(Vector)}, stream,
         p);
}

}  // namespace

void rearrange_rows_cuda(const RearrangeRowsParams& p, const Stream& stream) {
  const int64_t n_out = p.ptr.given ? p.ptr.size(1) - 1 : p.idx.size(1);
  if (p.y.numel() == 0 || n_out == 0) return;
  const bool plain = !p.ptr.given && !p.weight.given && !p.bias.given && !p.gate.given && !p.residual.given &&
                     p.norm == 0 && p.scale == 1.0f && !p.accumulate && !p.sum.given;
  if (plain && p.x[0].dtype == p.y.dtype) return move(p, stream);
  switch (p.x[0].dtype) {
    case Dtype::bf16:
      return finish<bf16>(p, stream);
    case Dtype::f16:
      return finish<f16>(p, stream);
    default:
      return finish<float>(p, stream);
  }
}

void rearrange_rows_bwd_cuda(const RearrangeRowsBwdParams& p, const Stream& stream) {
  if (p.partial.numel() == 0) return;
  switch (p.forward.x[0].dtype) {
    case Dtype::bf16:
      return finish_bwd<bf16>(p, stream);
    case Dtype::f16:
      return finish_bwd<f16>(p, stream);
    default:
      return finish_bwd<float>(p, stream);
  }
}

void rearrange_affine_cuda(const RearrangeAffineParams& a, const Stream& stream) {
  int64_t total = 1;
  for (int i = 0; i < a.rank; ++i) total *= a.sizes[i];
  if (total == 0) return;
  const Factors f = merged(a);
  if (f.count == 0 || f.x[0] == 1) return copy(a, f, total, stream);
  switch (a.element_bytes) {
    case 1:
      return turn_tiles<1>(a, f, stream);
    case 2:
      return turn_tiles<2>(a, f, stream);
    case 8:
      return turn_tiles<8>(a, f, stream);
    default:
      return turn_tiles<4>(a, f, stream);
  }
}

}  // namespace vk
