// Attention over many short sequences: thousands of (group, head) problems of a few dozen tokens, whose rows stand
// anywhere in memory. Temporal attention is this. Include only from *_cpu.cpp files.
//
// One task is one group. Its heads are taken a few at a time (a block), so that every token row is read in pieces of
// about a kilobyte; the pieces are packed once into L1 and the whole problem is solved there, forward or backward:
//
//   token rows (strided, DRAM)        packed (L1)                 registers
//   frame 0  ...[h0 h1 h2 h3]...  ->  K [head][key][d]            16 scores = 2 queries x 8 keys, lanes along d,
//   frame 1  ...[h0 h1 h2 h3]...      V [head][key][d]            one transposed sum
//   frame t  ...[h0 h1 h2 h3]...      Q [head][query][d]          4 output rows x 4 vectors, lanes along d
//
// Packing is not a detour: rows a power of two apart share one cache set, and 3 t of them do not fit its 8 ways, so a
// second read of the same row would come from memory again. Groups share nothing: no atomics, no order, no state.
#pragma once

#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/short_attention.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace short_attention {
namespace {

constexpr int kHalf = kLanes / 2;                    // keys of one score vector; it holds 2 queries x kHalf keys
constexpr int kRowTile = kHalf < 4 ? kHalf : 4;      // output rows of one product tile
constexpr int kColTile = kLanes == 16 ? 4 : 2;       // vectors of one product tile
constexpr int64_t kQueryBlock = 32;                  // queries whose scores are alive at once
constexpr int64_t kAhead = 6;                        // row pieces prefetched ahead: less than the ways of a cache set
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // larger outputs bypass the caches

VK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Keeps a loaded value in a register: the compiler would rather load it again for each of its uses, and loads are what
// these loops run out of first.
VK_INLINE f32v hold(f32v x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#endif
  return x;
}

// ---- vector pieces ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
#define VK_UNPACK_LO32(a, b) (f32v) _mm512_unpacklo_ps((__m512)(a), (__m512)(b))
#define VK_UNPACK_HI32(a, b) (f32v) _mm512_unpackhi_ps((__m512)(a), (__m512)(b))
#define VK_UNPACK_LO64(a, b) (f32v) _mm512_unpacklo_pd((__m512d)(a), (__m512d)(b))
#define VK_UNPACK_HI64(a, b) (f32v) _mm512_unpackhi_pd((__m512d)(a), (__m512d)(b))
#else
#if defined(__AVX2__)
#define VK_UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define VK_UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define VK_UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define VK_UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define VK_UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define VK_UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define VK_UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define VK_UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif
#endif

// Lane i of the result is the sum of the lanes of v[i].
VK_INLINE f32v transposed_sum(const f32v (&v)[kLanes]) {
  f32v quad[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const f32v ab = VK_UNPACK_LO32(v[4 * i], v[4 * i + 1]) + VK_UNPACK_HI32(v[4 * i], v[4 * i + 1]);
    const f32v cd = VK_UNPACK_LO32(v[4 * i + 2], v[4 * i + 3]) + VK_UNPACK_HI32(v[4 * i + 2], v[4 * i + 3]);
    quad[i] = VK_UNPACK_LO64(ab, cd) + VK_UNPACK_HI64(ab, cd);
  }
#if defined(__AVX512F__)
  const __m512 q0 = (__m512)quad[0], q1 = (__m512)quad[1], q2 = (__m512)quad[2], q3 = (__m512)quad[3];
  const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(q0, q1, 0x88), _mm512_shuffle_f32x4(q0, q1, 0xdd));
  const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(q2, q3, 0x88), _mm512_shuffle_f32x4(q2, q3, 0xdd));
  return (f32v)_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
#elif defined(__AVX2__)
  const __m256 q0 = (__m256)quad[0], q1 = (__m256)quad[1];
  return (f32v)_mm256_add_ps(_mm256_permute2f128_ps(q0, q1, 0x20), _mm256_permute2f128_ps(q0, q1, 0x31));
#else
  return quad[0];
#endif
}

// The lanes of each half of x combined by `f`, in every lane of that half.
template <class Combine>
VK_INLINE f32v within_halves(f32v x, const Combine& f) {
#if defined(__AVX512F__)
  x = f(x, (f32v)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1));
  x = f(x, (f32v)_mm512_permute_ps((__m512)x, 0x4e));
  return f(x, (f32v)_mm512_permute_ps((__m512)x, 0xb1));
#elif defined(__AVX2__)
  x = f(x, (f32v)_mm256_permute_ps((__m256)x, 0x4e));
  return f(x, (f32v)_mm256_permute_ps((__m256)x, 0xb1));
#else
  return f(x, (f32v)__builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
}
VK_INLINE f32v half_max(f32v x) {
  return within_halves(x, [](f32v a, f32v b) { return max(a, b); });
}
VK_INLINE f32v half_sum(f32v x) {
  return within_halves(x, [](f32v a, f32v b) { return a + b; });
}
// lo in the first half of the lanes, hi in the second.
VK_INLINE f32v two_halves(float lo, float hi) {
  f32v x = splat(lo);
  for (int i = kHalf; i < kLanes; ++i) x[i] = hi;
  return x;
}

// ---- the two small products, over packed float rows -----------------------------------------------------------------
// Scores are kept in pairs of queries: element (i, j) of a score block stands at pair(i) * blocks * kLanes + ..., see
// score_at. A block of kHalf keys of two queries is one vector.

VK_INLINE int64_t score_at(int64_t blocks, int64_t i, int64_t j) {
  return (i / 2 * blocks + j / kHalf) * kLanes + (i & 1) * kHalf + j % kHalf;
}

// out(i, j) = rows_a[i] . rows_b[j] for an even number of rows_a and whole blocks of rows_b.
template <int kD>
VK_INLINE void dot_rows(float* out, const float* rows_a, const float* rows_b, int64_t count_a, int64_t blocks,
                        int64_t width) {
  const int64_t w = kD ? kD : width;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* b = rows_b + block * kHalf * w;
    for (int64_t i = 0; i < count_a; i += 2) {
      const float* a = rows_a + i * w;
      f32v acc[kLanes] = {};
      for (int64_t c = 0; c < w; c += kLanes) {
        const f32v a0 = load(a + c), a1 = load(a + w + c);
#pragma GCC unroll 8
        for (int j = 0; j < kHalf; ++j) {
          const f32v bj = hold(load(b + j * w + c));
          acc[j] += a0 * bj;
          acc[kHalf + j] += a1 * bj;
        }
      }
      store(out + (i / 2 * blocks + block) * kLanes, transposed_sum(acc));
    }
  }
}

// One tile of out[x] = sum_y weight(x, y) rows[y]: kRowTile rows from `x`, kCols vectors from column c.
template <bool kTransposed, int kCols>
VK_INLINE void product_tile(f32v (&acc)[kRowTile][kCols], const float* weights, const float* rows, int64_t blocks,
                            int64_t x, int64_t count_y, int64_t w, int64_t c) {
  constexpr int kStep = kTransposed ? 2 : kHalf;
  const float* weight[kRowTile];
#pragma GCC unroll 4
  for (int r = 0; r < kRowTile; ++r)
    weight[r] = weights + (kTransposed ? score_at(blocks, 0, x + r) : score_at(blocks, x + r, 0));
  const int64_t stride = kTransposed ? blocks * kLanes : kLanes;
  const float* row = rows + c;
  for (int64_t y = 0; y < count_y; y += kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < kStep; ++u) {
      f32v b[kCols];
#pragma GCC unroll 4
      for (int i = 0; i < kCols; ++i) b[i] = hold(load(row + i * kLanes));
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r) {
        const f32v a = hold(splat(weight[r][kTransposed ? u * kHalf : u]));
#pragma GCC unroll 4
        for (int i = 0; i < kCols; ++i) acc[r][i] += a * b[i];
      }
      row += w;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowTile; ++r) weight[r] += stride;
  }
}

// out[x] = sum_y weight(x, y) rows[y] for x < count_x: emit(x, c, value) for every vector. kTransposed: weight(x, y) is
// element (y, x) of the score block. count_x is rounded up to whole tiles, count_y to whole steps; padding holds zeros.
template <int kD, bool kTransposed, class Emit>
VK_INLINE void product(const float* weights, const float* rows, int64_t blocks, int64_t count_x, int64_t count_y,
                       int64_t width, const Emit& emit) {
  const int64_t w = kD ? kD : width;
  for (int64_t x = 0; x < count_x; x += kRowTile) {
    int64_t c = 0;
    for (; c + kColTile * kLanes <= w; c += kColTile * kLanes) {
      f32v acc[kRowTile][kColTile] = {};
      product_tile<kTransposed, kColTile>(acc, weights, rows, blocks, x, count_y, w, c);
      for (int r = 0; r < kRowTile; ++r)
        if (x + r < count_x)
          for (int i = 0; i < kColTile; ++i) emit(x + r, c + i * kLanes, acc[r][i]);
    }
    for (; c < w; c += kLanes) {
      f32v acc[kRowTile][1] = {};
      product_tile<kTransposed, 1>(acc, weights, rows, blocks, x, count_y, w, c);
      for (int r = 0; r < kRowTile; ++r)
        if (x + r < count_x) emit(x + r, c, acc[r][0]);
    }
  }
}

// Scores become probabilities in place, every query's summing to 1. lse, if given, receives log(sum(exp)) of the two.
VK_INLINE void softmax_pair(float* scores, int64_t blocks, int64_t len_k, float scale, float* lse) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int64_t tail = len_k - (blocks - 1) * kHalf;  // live keys of the last block
  const i32v dead = (iota() & (kHalf - 1)) >= splat(static_cast<int32_t>(tail));
  const f32v factor = splat(scale * kLog2E);
  float* last = scores + (blocks - 1) * kLanes;
  const f32v ends = dead ? splat(-kInf) : load(last) * factor;
  f32v top = ends;
  for (int64_t i = 0; i < blocks - 1; ++i) top = max(top, load(scores + i * kLanes) * factor);
  top = half_max(top);
  const f32v last_p = exp2(ends - top);
  f32v sum = last_p;
  for (int64_t i = 0; i < blocks - 1; ++i) {
    const f32v p = exp2(load(scores + i * kLanes) * factor - top);
    store(scores + i * kLanes, p);
    sum += p;
  }
  sum = half_sum(sum);
  const f32v inverse = 1.0f / sum;
  for (int64_t i = 0; i < blocks - 1; ++i) store(scores + i * kLanes, load(scores + i * kLanes) * inverse);
  store(last, last_p * inverse);
  if (lse) {
    lse[0] = (top[0] + std::log2(sum[0])) / kLog2E;
    lse[1] = (top[kHalf] + std::log2(sum[kHalf])) / kLog2E;
  }
}

// ---- rows in and out ------------------------------------------------------------------------------------------------

VK_INLINE void prefetch_piece(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

template <class T>
VK_INLINE void pack_row(float* to, const T* from, int64_t d) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c));
  if (c < d) store(to + c, load(from + c, d - c));
}

// One tensor's rows in one group.
template <class T>
struct Rows {
  T* batch = nullptr;  // token row 0, head 0
  const ShortRows* rows = nullptr;
  int64_t outer = 0, inner = 0, token = 0, head = 0;

  Rows() = default;
  Rows(const TensorRef& t, const ShortRows& where, int64_t ib, int64_t io, int64_t ii)
      : batch(t.ptr<T>() + ib * t.stride(0)),
        rows(&where),
        outer(io),
        inner(ii),
        token(t.stride(1)),
        head(t.stride(2)) {}
  T* at(int64_t i, int64_t h) const { return batch + rows->row(outer, inner, i) * token + h * head; }
};

// Packs heads [first, first + heads) of `count` rows to [head][row][width], asking for row i + kAhead while row i is
// read and, at the end, for the first rows of `next`.
template <class T>
VK_INLINE void pack(float* to, const Rows<const T>& rows, int64_t count, int64_t padded, int64_t first, int64_t heads,
                    int64_t d, int64_t width, const Rows<const T>& next, int64_t next_count, int64_t next_first) {
  const bool joined = rows.head == d;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ahead = i + kAhead;
    const T* wanted = ahead < count                ? rows.at(ahead, first)
                      : ahead - count < next_count ? next.at(ahead - count, next_first)
                                                   : nullptr;
    if (wanted && joined) prefetch_piece(reinterpret_cast<const char*>(wanted), heads * d * int64_t(sizeof(T)));
    const T* row = rows.at(i, first);
    for (int64_t h = 0; h < heads; ++h) pack_row(to + (h * padded + i) * width, row + h * rows.head, d);
  }
}

// A row piece leaves: `stream` sends whole aligned vectors past the caches.
template <class T>
VK_INLINE void put(T* to, f32v x, int64_t count, bool stream) {
  if (count >= kLanes && stream) return store_streaming(to, x);
  store(to, x, count);
}

// ---- forward --------------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 1024;       // of one token row, per block of heads
constexpr int64_t kBlockBytes = 160 << 10;  // of a block's packed rows

// Sizes of a call, and how its key heads are blocked.
struct ShortShape {
  int64_t n, m, d, width, per_key, len_q, len_k, padded_q, padded_k, blocks, block_heads, head_blocks;

  ShortShape(const ShortAttention& p, int64_t lanes)
      : n(p.q.size(2)),
        m(p.k.size(2)),
        d(p.q.size(3)),
        width(round_up(d, lanes)),
        per_key(n / m),
        len_q(p.len_q),
        len_k(p.len_k),
        padded_q(round_up(p.len_q, 4)),
        padded_k(round_up(p.len_k, kHalf)),
        blocks(padded_k / kHalf) {
    const int64_t piece = d * (p.q.dtype == Dtype::f32 ? 4 : 2) * per_key;
    const int64_t packed = 4 * width * (2 * padded_k + 2 * padded_q * per_key);
    const int64_t fits = kPieceBytes / piece < kBlockBytes / packed ? kPieceBytes / piece : kBlockBytes / packed;
    block_heads = fits < 1 ? 1 : fits > m ? m : fits;
    head_blocks = (m + block_heads - 1) / block_heads;
  }
};

// One task: `blocks` consecutive blocks of heads of one group.
struct ShortTask {
  int64_t batch, outer, inner, first_head, end_head;

  ShortTask(const ShortAttention& p, const ShortShape& s, int64_t task, bool split) {
    const int64_t group = split ? task / s.head_blocks : task, block = split ? task % s.head_blocks : 0;
    batch = group / p.groups(), outer = group / p.inner % p.outer, inner = group % p.inner;
    first_head = block * s.block_heads;
    end_head = split && first_head + s.block_heads < s.m ? first_head + s.block_heads : s.m;
  }
  int64_t group(const ShortAttention& p) const { return (batch * p.outer + outer) * p.inner + inner; }
};

// Few groups: their heads are shared out too.
VK_INLINE bool split_heads(const ShortAttention& p) { return p.q.size(0) * p.groups() < 8 * int64_t(num_threads()); }

template <class T, int kD>
void forward_range(const ShortAttention& p, int64_t begin, int64_t end, bool split, bool stream) {
  const ShortShape s(p, kLanes);
  const int64_t w = kD ? kD : s.width;
  const int64_t rows_k = s.block_heads * s.padded_k * w, rows_q = s.block_heads * s.per_key * s.padded_q * w;
  const int64_t floats = 2 * rows_k + rows_q + kQueryBlock / 2 * s.blocks * kLanes;
  float* const packed_k = static_cast<float*>(scratch(0, sizeof(float) * static_cast<size_t>(floats)));
  float* const packed_v = packed_k + rows_k;
  float* const packed_q = packed_v + rows_k;
  float* const scores = packed_q + rows_q;
  memset(packed_k, 0, sizeof(float) * static_cast<size_t>(2 * rows_k + rows_q));

  for (int64_t task = begin; task < end; ++task) {
    const ShortTask t(p, s, task, split), after(p, s, task + 1 < end ? task + 1 : task, split);
    const Rows<const T> q(p.q, p.q_rows, t.batch, t.outer, t.inner), k(p.k, p.k_rows, t.batch, t.outer, t.inner);
    const Rows<const T> v(p.v, p.k_rows, t.batch, t.outer, t.inner);
    const Rows<const T> after_k(p.k, p.k_rows, after.batch, after.outer, after.inner);
    const Rows<T> o(p.o, p.q_rows, t.batch, t.outer, t.inner);
    for (int64_t head = t.first_head; head < t.end_head; head += s.block_heads) {
      const int64_t heads = t.end_head - head < s.block_heads ? t.end_head - head : s.block_heads;
      const int64_t head_q = head * s.per_key, heads_q = heads * s.per_key;
      const bool more = head + heads < t.end_head;
      pack(packed_k, k, s.len_k, s.padded_k, head, heads, s.d, w, v, s.len_k, head);
      pack(packed_v, v, s.len_k, s.padded_k, head, heads, s.d, w, q, s.len_q, head_q);
      pack(packed_q, q, s.len_q, s.padded_q, head_q, heads_q, s.d, w, more ? k : after_k, s.len_k,
           more ? head + heads : after.first_head);
      for (int64_t h = 0; h < heads_q; ++h) {
        const float* key = packed_k + h / s.per_key * s.padded_k * w;
        const float* value = packed_v + h / s.per_key * s.padded_k * w;
        float* shared = p.q_rows.shared ? p.shared_q + (t.group(p) * s.n + head_q + h) * s.d : nullptr;
        for (int64_t i0 = 0; i0 < s.len_q; i0 += kQueryBlock) {
          const int64_t count = s.len_q - i0 < kQueryBlock ? s.len_q - i0 : kQueryBlock;
          dot_rows<kD>(scores, packed_q + (h * s.padded_q + i0) * w, key, count, s.blocks, w);
          for (int64_t i = 0; i < count; i += 2) {
            float lse[2];
            softmax_pair(scores + i / 2 * s.blocks * kLanes, s.blocks, s.len_k, p.scale, p.lse ? lse : nullptr);
            for (int64_t u = 0; p.lse && u < 2 && i + u < count; ++u)
              *p.at(p.lse, t.batch, head_q + h, t.outer, t.inner, i0 + i + u) = lse[u];
          }
          product<kD, false>(scores, value, s.blocks, count, s.padded_k, w, [&](int64_t x, int64_t c, f32v sum) {
            if (shared && i0 + x == 0) return store(shared + c, sum, s.d - c);
            put(o.at(i0 + x, head_q + h) + c, sum, s.d - c, stream);
          });
        }
      }
    }
  }
  if (stream) streaming_fence();
}

// The shared row of `to` becomes `factor` times the sum over groups of what they left in `parts`.
template <class T>
void gather_shared(const ShortAttention& p, const TensorRef& to, const float* parts, float factor) {
  const int64_t heads = to.size(2), d = to.size(3);
  parallel_for(0, to.size(0) * heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / heads, head = i % heads;
      T* row = to.ptr<T>() + batch * to.stride(0) + head * to.stride(2);
      for (int64_t c = 0; c < d; c += kLanes) {
        f32v sum{};
        for (int64_t g = 0; g < p.groups(); ++g)
          sum += load(parts + ((batch * p.groups() + g) * heads + head) * d + c, d - c);
        store(row + c, sum * factor, d - c);
      }
    }
  });
}

// Every visited row becomes zero: what is left where there is nothing to see.
template <class T>
void zero_rows(const ShortAttention& p, const TensorRef& t, const ShortRows& where, int64_t count) {
  for (int64_t group = 0; group < t.size(0) * p.groups(); ++group) {
    const Rows<T> rows(t, where, group / p.groups(), group / p.inner % p.outer, group % p.inner);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t h = 0; h < t.size(2); ++h) memset(rows.at(i, h), 0, sizeof(T) * static_cast<size_t>(t.size(3)));
  }
}

template <class T>
void forward(const ShortAttention& p) {
  const int64_t b = p.q.size(0), n = p.q.size(2);
  if (b * n * p.groups() * p.len_q == 0) return;
  if (p.len_k == 0) {
    zero_rows<T>(p, p.o, p.q_rows, p.len_q);
    for (int64_t group = 0; p.lse && group < b * p.groups(); ++group)
      for (int64_t h = 0; h < n; ++h)
        for (int64_t i = 0; i < p.len_q; ++i)
          *p.at(p.lse, group / p.groups(), h, group / p.inner % p.outer, group % p.inner, i) = -kInf;
    return;
  }
  const bool split = split_heads(p), stream = p.o.numel() * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t tasks = b * p.groups() * (split ? ShortShape(p, kLanes).head_blocks : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    switch (round_up(p.q.size(3), kLanes)) {
      case 64:
        return forward_range<T, 64>(p, begin, end, split, stream);
      case 96:
        return forward_range<T, 96>(p, begin, end, split, stream);
      default:
        return forward_range<T, 0>(p, begin, end, split, stream);
    }
  });
  if (p.q_rows.shared) gather_shared<T>(p, p.o, p.shared_q, 1.0f / static_cast<float>(p.groups()));
}

// ---- backward -------------------------------------------------------------------------------------------------------
// With P the probabilities, recomputed: dP = dO V', dS = scale P (dP - sum_j P dP + dlse), dQ = dS K, dK = dS' Q,
// dV = P' dO. The sum over j needs no saved output, and P no saved lse: the row is whole.

// dp becomes dS, in place.
VK_INLINE void softmax_pair_backward(const float* p, float* dp, int64_t blocks, float scale, f32v grad_lse) {
  f32v sum = {};
  for (int64_t i = 0; i < blocks; ++i) sum += load(p + i * kLanes) * load(dp + i * kLanes);
  sum = half_sum(sum) - grad_lse;
  for (int64_t i = 0; i < blocks; ++i)
    store(dp + i * kLanes, load(p + i * kLanes) * (load(dp + i * kLanes) - sum) * scale);
}

template <class T, int kD>
void backward_range(const ShortAttention& p, int64_t begin, int64_t end, bool split, bool stream) {
  const ShortShape s(p, kLanes);
  const int64_t w = kD ? kD : s.width;
  const int64_t rows_k = s.block_heads * s.padded_k * w, rows_q = s.block_heads * s.per_key * s.padded_q * w;
  const int64_t sums = s.padded_k * w, score_count = kQueryBlock / 2 * s.blocks * kLanes;
  const int64_t floats = 2 * rows_k + 2 * rows_q + 2 * sums + 2 * score_count;
  float* const packed_k = static_cast<float*>(scratch(0, sizeof(float) * static_cast<size_t>(floats)));
  float* const packed_v = packed_k + rows_k;
  float* const packed_q = packed_v + rows_k;
  float* const packed_g = packed_q + rows_q;  // gradient of the output
  float* const sum_k = packed_g + rows_q;     // gradients of one key head, while its query blocks pass
  float* const sum_v = sum_k + sums;
  float* const scores = sum_v + sums;
  float* const grads = scores + score_count;
  memset(packed_k, 0, sizeof(float) * static_cast<size_t>(2 * rows_k + 2 * rows_q));
  const float share = 1.0f / static_cast<float>(p.groups());

  for (int64_t task = begin; task < end; ++task) {
    const ShortTask t(p, s, task, split);
    const auto in = [&](const TensorRef& x, const ShortRows& where) {
      return Rows<const T>(x, where, t.batch, t.outer, t.inner);
    };
    const auto out = [&](const TensorRef& x, const ShortRows& where) {
      return Rows<T>(x, where, t.batch, t.outer, t.inner);
    };
    const Rows<const T> q = in(p.q, p.q_rows), k = in(p.k, p.k_rows), v = in(p.v, p.k_rows), g = in(p.grad_o, p.q_rows);
    const Rows<T> dq = out(p.dq, p.q_rows), dk = out(p.dk, p.k_rows), dv = out(p.dv, p.k_rows);
    for (int64_t head = t.first_head; head < t.end_head; head += s.block_heads) {
      const int64_t heads = t.end_head - head < s.block_heads ? t.end_head - head : s.block_heads;
      const int64_t head_q = head * s.per_key, heads_q = heads * s.per_key;
      pack(packed_k, k, s.len_k, s.padded_k, head, heads, s.d, w, v, s.len_k, head);
      pack(packed_v, v, s.len_k, s.padded_k, head, heads, s.d, w, q, s.len_q, head_q);
      pack(packed_q, q, s.len_q, s.padded_q, head_q, heads_q, s.d, w, g, s.len_q, head_q);
      pack(packed_g, g, s.len_q, s.padded_q, head_q, heads_q, s.d, w, k, head + heads < t.end_head ? s.len_k : 0,
           head + heads);
      for (int64_t h = 0; h < heads_q; ++h) {
        const float* key = packed_k + h / s.per_key * s.padded_k * w;
        const float* value = packed_v + h / s.per_key * s.padded_k * w;
        const int64_t to_query = head_q + h, to_key = head + h / s.per_key;
        const bool shared = p.q_rows.shared != 0;
        float* shared_q = shared ? p.shared_q + (t.group(p) * s.n + to_query) * s.d : nullptr;
        if (shared)
          for (int64_t c = 0; c < w; c += kLanes) {
            float* row = packed_g + h * s.padded_q * w + c;
            store(row, load(row) * share);
          }
        for (int64_t i0 = 0; i0 < s.len_q; i0 += kQueryBlock) {
          const int64_t count = s.len_q - i0 < kQueryBlock ? s.len_q - i0 : kQueryBlock;
          const float* query = packed_q + (h * s.padded_q + i0) * w;
          const float* grad = packed_g + (h * s.padded_q + i0) * w;
          dot_rows<kD>(scores, query, key, count, s.blocks, w);
          dot_rows<kD>(grads, grad, value, count, s.blocks, w);
          for (int64_t i = 0; i < count; i += 2) {
            const int64_t at = i / 2 * s.blocks * kLanes;
            softmax_pair(scores + at, s.blocks, s.len_k, p.scale, nullptr);
            f32v grad_lse = {};
            if (p.grad_lse) {
              const auto at_query = [&](int64_t x) {
                return *p.at(p.grad_lse, t.batch, to_query, t.outer, t.inner, x);
              };
              grad_lse = two_halves(at_query(i0 + i), i + 1 < count ? at_query(i0 + i + 1) : 0.0f);
            }
            softmax_pair_backward(scores + at, grads + at, s.blocks, p.scale, grad_lse);
          }
          product<kD, false>(grads, key, s.blocks, count, s.padded_k, w, [&](int64_t x, int64_t c, f32v sum) {
            if (shared && i0 + x == 0) return store(shared_q + c, sum, s.d - c);
            put(dq.at(i0 + x, to_query) + c, sum, s.d - c, stream);
          });
          const bool first = h % s.per_key == 0 && i0 == 0;
          const bool last = h % s.per_key == s.per_key - 1 && i0 + kQueryBlock >= s.len_q;
          const auto add = [&](const float* weights, const float* rows, float* partial, const Rows<T>& to,
                               float* parts) {
            product<kD, true>(weights, rows, s.blocks, s.len_k, count, w, [&](int64_t x, int64_t c, f32v sum) {
              if (!first) sum += load(partial + x * w + c);
              if (!last) return store(partial + x * w + c, sum);
              if (shared && x == 0) return store(parts + (t.group(p) * s.m + to_key) * s.d + c, sum, s.d - c);
              put(to.at(x, to_key) + c, sum, s.d - c, stream);
            });
          };
          add(grads, query, sum_k, dk, p.shared_k);
          add(scores, grad, sum_v, dv, p.shared_v);
        }
      }
    }
  }
  if (stream) streaming_fence();
}

template <class T>
void backward(const ShortAttention& p) {
  const int64_t b = p.q.size(0), n = p.q.size(2);
  if (b * n * p.groups() == 0) return;
  if (p.len_q == 0 || p.len_k == 0) {
    zero_rows<T>(p, p.dq, p.q_rows, p.len_q);
    zero_rows<T>(p, p.dk, p.k_rows, p.len_k);
    return zero_rows<T>(p, p.dv, p.k_rows, p.len_k);
  }
  const bool split = split_heads(p), stream = p.dq.numel() * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t tasks = b * p.groups() * (split ? ShortShape(p, kLanes).head_blocks : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    switch (round_up(p.q.size(3), kLanes)) {
      case 64:
        return backward_range<T, 64>(p, begin, end, split, stream);
      case 96:
        return backward_range<T, 96>(p, begin, end, split, stream);
      default:
        return backward_range<T, 0>(p, begin, end, split, stream);
    }
  });
  if (p.q_rows.shared) {
    gather_shared<T>(p, p.dq, p.shared_q, 1.0f);
    gather_shared<T>(p, p.dk, p.shared_k, 1.0f);
    gather_shared<T>(p, p.dv, p.shared_v, 1.0f);
  }
}

}  // namespace
}  // namespace short_attention
}  // namespace vk::VK_ISA
