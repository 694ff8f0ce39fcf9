// One piece of work is a range of tokens. A token's angles turn all heads of q and k; a unit (one head, or all of them
// where one norm spans them) is added, normalised and turned in a float row that stays in L1 or L2.
#include <algorithm>

#include "qkv_prologue.h"
#include "vkernels/cpu/rope_rows.h"

namespace vk::VK_ISA {
namespace {

constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs beyond the caches are written past them
enum Slot { kAngles, kInverse, kRow, kGradient, kStaged };

template <class T>
VK_INLINE void copy(T* to, const float* from, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) VK_ISA::store(to + j, VK_ISA::load(from + j, count - j), count - j);
}

// row = x + bias
template <class T>
VK_INLINE void add_bias(float* row, const T* x, const float* bias, int64_t count) {
  if (bias == nullptr) {
    for (int64_t j = 0; j < count; j += kLanes) VK_ISA::store(row + j, VK_ISA::load(x + j, count - j), count - j);
    return;
  }
  for (int64_t j = 0; j < count; j += kLanes)
    VK_ISA::store(row + j, VK_ISA::load(x + j, count - j) + VK_ISA::load(bias + j, count - j), count - j);
}

VK_INLINE float dot(const float* a, const float* b, int64_t count) {
  f32v even{}, odd{};
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    even += VK_ISA::load(a + j) * VK_ISA::load(b + j);
    odd += VK_ISA::load(a + j + kLanes) * VK_ISA::load(b + j + kLanes);
  }
  for (; j < count; j += kLanes) even += VK_ISA::load(a + j, count - j) * VK_ISA::load(b + j, count - j);
  return reduce_add(even + odd);
}

VK_INLINE float inverse_rms(const float* row, int64_t count, double eps) {
  return 1.0f / std::sqrt(dot(row, row, count) / static_cast<float>(count) + static_cast<float>(eps));
}

VK_INLINE void normalise(float* row, const float* weight, int64_t count, double eps) {
  const f32v r = splat(inverse_rms(row, count, eps));
  for (int64_t j = 0; j < count; j += kLanes)
    VK_ISA::store(row + j, VK_ISA::load(row + j, count - j) * r * VK_ISA::load(weight + j, count - j), count - j);
}

// gradient of row -> normalise(row) into g, which holds the gradient of its result; weight sums into dw.
VK_INLINE void normalise_backward(float* g, const float* row, const float* weight, float* dw, int64_t count,
                                  double eps) {
  const float r = inverse_rms(row, count, eps);
  f32v sum{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t left = count - j;
    const f32v x = VK_ISA::load(row + j, left), dz = VK_ISA::load(g + j, left);
    const f32v scaled = dz * VK_ISA::load(weight + j, left);
    sum += scaled * x;
    VK_ISA::store(dw + j, VK_ISA::load(dw + j, left) + dz * x * r, left);
    VK_ISA::store(g + j, scaled, left);
  }
  const float back = r * r * r * reduce_add(sum) / static_cast<float>(count);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t left = count - j;
    VK_ISA::store(g + j, VK_ISA::load(g + j, left) * r - VK_ISA::load(row + j, left) * back, left);
  }
}

struct Shape {
  explicit Shape(const QkvPrologueParams& p)
      : s(p.qkv.size(1)), tokens(p.qkv.size(0) * s), n(p.out[0].size(2)), m(p.out[1].size(2)), d(p.out[0].size(3)) {}
  int64_t heads(int i) const { return i == 0 ? n : m; }
  int64_t first(int i) const { return i == 0 ? 0 : i == 1 ? n * d : (n + m) * d; }  // column of qkv
  int64_t s, tokens, n, m, d;
};

template <class T>
VK_INLINE T* row_of(const TensorRef& x, int64_t ib, int64_t is) {
  return x.ptr<T>() + ib * x.stride(0) + is * x.stride(1);
}
VK_INLINE const float* floats(const TensorRef& x, int64_t at) { return x.given ? x.ptr<const float>() + at : nullptr; }

VK_INLINE void turn(const TokenAngles& angles, float* row, int64_t head, int64_t heads, const Shape& z, int64_t group) {
  for (int64_t h = 0; h < heads; ++h) angles.rotate(row + h * z.d, row + h * z.d, (head + h) / group);
}

// Heads head .. head + heads of a token; `to` is where its first head goes, and the next one `to_head` elements on.
template <class T>
void forward_unit(const QkvPrologueParams& p, const Shape& z, const TokenAngles& angles, float* row, int i,
                  int64_t head, int64_t heads, int64_t ib, int64_t is, T* to, int64_t to_head) {
  const int64_t column = z.first(i) + head * z.d, count = heads * z.d;
  add_bias(row, row_of<const T>(p.qkv, ib, is) + column, floats(p.bias, column), count);
  const bool turns = i < 2 && p.rope.pairs() > 0, norms = i < 2 && p.norm[i].given;
  const int64_t group = z.heads(i) / p.rope.heads();
  if (norms && p.post && turns) turn(angles, row, head, heads, z, group);
  if (norms) normalise(row, p.norm[i].ptr<const float>(), count, p.eps);
  const bool turns_out = turns && !(norms && p.post);
  const int64_t begin = p.rope.offset, end = begin + 2 * p.rope.pairs();
  to += head * to_head;
  for (int64_t h = 0; h < heads; ++h, to += to_head) {
    const float* from = row + h * z.d;
    if (turns_out) {
      angles.rotate(from, to, (head + h) / group);
      copy(to, from, begin);
      copy(to + end, from + end, z.d - end);
    } else {
      copy(to, from, z.d);
    }
  }
}

// Where `streams`, a token's heads are put together in the cache and leave in whole lines.
template <class T>
void forward(const QkvPrologueParams& p, bool streams) {
  const Shape z(p);
  parallel_for(0, z.tokens, 8, [&](int64_t begin, int64_t end) {
    TokenAngles angles(p.rope, kAngles);
    float* row = static_cast<float*>(
        scratch(kRow, sizeof(float) * static_cast<size_t>((p.all_heads ? z.n + z.m : 1) * z.d + kLanes)));
    T* const staged = streams
                          ? static_cast<T*>(scratch(kStaged, sizeof(T) * static_cast<size_t>(std::max(z.n, z.m) * z.d)))
                          : nullptr;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t ib = token / z.s, is = token % z.s;
      if (p.rope.pairs() > 0) angles.set(ib, is);
      for (int i = 0; i < 3; ++i) {
        const int64_t heads = p.all_heads && i < 2 ? z.heads(i) : 1;
        T* const out = row_of<T>(p.out[i], ib, is);
        for (int64_t head = 0; head < z.heads(i); head += heads)
          forward_unit(p, z, angles, row, i, head, heads, ib, is, streams ? staged : out,
                       streams ? z.d : p.out[i].stride(2));
        if (streams) copy_streaming(out, staged, sizeof(T) * static_cast<size_t>(z.heads(i) * z.d));
      }
    }
    if (streams) streaming_fence();
  });
}

struct Sums {
  float *bias, *norm[2];  // null where not asked for
};

template <class T>
void backward_unit(const QkvPrologueBackwardParams& b, const Shape& z, const TokenAngles& angles,
                   const TokenAngles& inverse, float* row, float* g, const Sums& sums, int i, int64_t head,
                   int64_t heads, int64_t ib, int64_t is) {
  const QkvPrologueParams& p = b.forward;
  const int64_t column = z.first(i) + head * z.d, count = heads * z.d;
  const TensorRef& dy = p.out[i];
  for (int64_t h = 0; h < heads; ++h) {
    const T* from = row_of<const T>(dy, ib, is) + (head + h) * dy.stride(2);
    add_bias(g + h * z.d, from, nullptr, z.d);
  }
  const bool turns = i < 2 && p.rope.pairs() > 0, norms = i < 2 && p.norm[i].given;
  const int64_t group = z.heads(i) / p.rope.heads();
  const bool late = norms && p.post;
  if (turns && !late) turn(inverse, g, head, heads, z, group);
  if (norms) {
    add_bias(row, row_of<const T>(p.qkv, ib, is) + column, floats(p.bias, column), count);
    if (turns && late) turn(angles, row, head, heads, z, group);
    normalise_backward(g, row, p.norm[i].ptr<const float>(), sums.norm[i], count, p.eps);
  }
  if (turns && late) turn(inverse, g, head, heads, z, group);
  if (sums.bias != nullptr) add_bias(sums.bias + column, sums.bias + column, g, count);
  copy(row_of<T>(b.dqkv, ib, is) + column, g, count);
}

template <class T>
void backward(const QkvPrologueBackwardParams& b) {
  const QkvPrologueParams& p = b.forward;
  const Shape z(p);
  RopeArgs opposite = p.rope;
  opposite.inverse = true;
  const int64_t width = p.bias.given ? p.bias.size(0) : 0, width_q = p.norm[0].given ? p.norm[0].size(0) : 0;
  parallel_for(0, kPartials, 1, [&](int64_t first, int64_t last) {
    TokenAngles angles(p.rope, kAngles), inverse(opposite, kInverse);
    const size_t bytes = sizeof(float) * static_cast<size_t>((p.all_heads ? z.n + z.m : 1) * z.d + kLanes);
    float *row = static_cast<float*>(scratch(kRow, bytes)), *g = static_cast<float*>(scratch(kGradient, bytes));
    for (int64_t part = first; part < last; ++part) {
      float* columns = b.partials.ptr<float>() + part * b.partials.stride(0);
      const Sums sums{p.bias.given ? columns : nullptr, {columns + width, columns + width + width_q}};
      for (int64_t token = z.tokens * part / kPartials; token < z.tokens * (part + 1) / kPartials; ++token) {
        const int64_t ib = token / z.s, is = token % z.s;
        if (p.rope.pairs() > 0) {
          inverse.set(ib, is);
          if (p.post) angles.set(ib, is);
        }
        for (int i = 0; i < 3; ++i) {
          const int64_t heads = p.all_heads && i < 2 ? z.heads(i) : 1;
          for (int64_t head = 0; head < z.heads(i); head += heads)
            backward_unit<T>(b, z, angles, inverse, row, g, sums, i, head, heads, ib, is);
        }
      }
    }
  });
  float* total = b.sums.ptr<float>();
  for (int64_t j = 0; j < b.sums.size(0); ++j) total[j] = 0;
  for (int64_t part = 0; part < kPartials; ++part) {
    const float* columns = b.partials.ptr<const float>() + part * b.partials.stride(0);
    for (int64_t j = 0; j < b.sums.size(0); ++j) total[j] += columns[j];
  }
}

}  // namespace

void qkv_prologue(const QkvPrologueParams& p) {
  const int64_t size = p.qkv.dtype == Dtype::f32 ? 4 : 2;
  bool streams = p.qkv.numel() * size > kStreamBytes;
  for (const TensorRef& out : p.out) streams &= out.stride(2) == out.size(3);  // a token's heads lie together
  switch (p.qkv.dtype) {
    case Dtype::bf16:
      return forward<bf16>(p, streams);
    case Dtype::f16:
      return forward<f16>(p, streams);
    default:
      return forward<float>(p, streams);
  }
}

void qkv_prologue_bwd(const QkvPrologueBackwardParams& p) {
  switch (p.dqkv.dtype) {
    case Dtype::bf16:
      return backward<bf16>(p);
    case Dtype::f16:
      return backward<f16>(p);
    default:
      return backward<float>(p);
  }
}

}  // namespace vk::VK_ISA
