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
#include "vkernels/cpu/simd.h"
#include "vkernels/tensor.h"

namespace vk {

// Token row of index i in group (outer, inner): first + outer * outer_stride + inner * inner_stride + i * token_stride.
struct ShortRows {
  int64_t first = 0, outer_stride = 0, inner_stride = 0, token_stride = 0;
};

struct ShortAttention {
  TensorRef q, k, v;        // b s n d, b s m d, b s m d
  TensorRef o;              // forward: b s n d
  TensorRef lse;            // forward, optional: b n s, float
  TensorRef grad_o;         // backward: b s n d
  TensorRef grad_lse;       // backward, optional: b n s, float
  TensorRef dq, dk, dv;     // backward
  int64_t outer = 1, inner = 0, len_q = 0, len_k = 0;
  ShortRows q_rows, k_rows;
  float scale = 1.0f;
};

}  // namespace vk

namespace vk::VK_ISA {
namespace {

constexpr int kHalf = kLanes / 2;                     // keys of one score vector; it holds 2 queries x kHalf keys
constexpr int kRowTile = kHalf < 4 ? kHalf : 4;       // output rows of one product tile
constexpr int kColTile = kLanes == 16 ? 4 : 2;        // vectors of one product tile
constexpr int64_t kQueryBlock = 32;                   // queries whose scores are alive at once
constexpr int64_t kAhead = 6;                         // row pieces prefetched ahead: less than the ways of a cache set
constexpr int64_t kStreamBytes = int64_t(16) << 20;   // larger outputs bypass the caches

VK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

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
VK_INLINE void dot_rows(float* out, const float* rows_a, const float* rows_b, int64_t count_a, int64_t blocks, int64_t width) {
  const int64_t w = kD ? kD : width;
  for (int64_t i = 0; i < count_a; i += 2) {
    const float* a = rows_a + i * w;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* b = rows_b + block * kHalf * w;
      f32v acc[kLanes] = {};
      for (int64_t c = 0; c < w; c += kLanes) {
        const f32v a0 = load(a + c), a1 = load(a + w + c);
#pragma GCC unroll 8
        for (int j = 0; j < kHalf; ++j) {
          const f32v bj = load(b + j * w + c);
          acc[j] += a0 * bj;
          acc[kHalf + j] += a1 * bj;
        }
      }
      store(out, transposed_sum(acc));
      out += kLanes;
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
  for (int r = 0; r < kRowTile; ++r) weight[r] = weights + (kTransposed ? score_at(blocks, 0, x + r) : score_at(blocks, x + r, 0));
  const int64_t stride = kTransposed ? blocks * kLanes : kLanes;
  const float* row = rows + c;
  for (int64_t y = 0; y < count_y; y += kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < kStep; ++u) {
      f32v b[kCols];
#pragma GCC unroll 4
      for (int i = 0; i < kCols; ++i) b[i] = load(row + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r) {
        const f32v a = splat(weight[r][kTransposed ? u * kHalf : u]);
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

// One tensor's rows as a block reads and writes them: `heads` heads of `count` token rows.
template <class T>
struct Rows {
  T* base = nullptr;  // batch element, first row of the group, first head
  int64_t token = 0, head = 0;

  Rows() = default;
  Rows(const TensorRef& t, int64_t batch, const ShortRows& rows, int64_t outer, int64_t inner)
      : base(t.ptr<T>() + batch * t.stride(0) +
             (rows.first + outer * rows.outer_stride + inner * rows.inner_stride) * t.stride(1)),
        token(rows.token_stride * t.stride(1)),
        head(t.stride(2)) {}
  T* at(int64_t i, int64_t h) const { return base + i * token + h * head; }
};

// Packs heads [first, first + heads) of `count` rows to [head][row][width], asking for row i + kAhead while row i is read
// and, at the end, for the first rows of `next`.
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
    for (int64_t h = 0; h < heads; ++h) pack_row(to + (h * padded + i) * width, rows.at(i, first + h), d);
  }
}

// A row piece leaves: `stream` sends whole aligned vectors past the caches.
template <class T>
VK_INLINE void put(T* to, f32v x, int64_t count, bool stream) {
  if (count >= kLanes && stream) return store_streaming(to, x);
  store(to, x, count);
}

// ---- forward --------------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 1024;  // of one token row, per block of heads

// Where task `i` works, and how its heads are blocked.
struct ShortShape {
  int64_t n, m, d, width, per_key, block_heads, len_q, len_k, padded_q, padded_k, blocks;

  ShortShape(const ShortAttention& p, int64_t lanes)
      : n(p.q.size(2)),
        m(p.k.size(2)),
        d(p.q.size(3)),
        width(round_up(d, lanes)),
        per_key(n / m),
        len_q(p.len_q),
        len_k(p.len_k),
        padded_q(round_up(p.len_q, 4)),
        padded_k(round_up(p.len_k, kHalf < 4 ? 4 : kHalf)),
        blocks(padded_k / kHalf) {
    const int64_t head_bytes = d * (p.q.dtype == Dtype::f32 ? 4 : 2);
    block_heads = kPieceBytes / (head_bytes * per_key);
    block_heads = block_heads < 1 ? 1 : block_heads > m ? m : block_heads;
  }
};

template <class T>
void fill_rows(const TensorRef& t, int64_t batch, const ShortRows& where, int64_t outer, int64_t inner, int64_t count) {
  const Rows<T> rows(t, batch, where, outer, inner);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < t.size(2); ++h) memset(rows.at(i, h), 0, sizeof(T) * static_cast<size_t>(t.size(3)));
}

template <class T, int kD>
void short_forward_range(const ShortAttention& p, int64_t begin, int64_t end, bool stream) {
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
    const auto rows_of = [&](const TensorRef& t, const ShortRows& rows, int64_t at) {
      return Rows<const T>(t, at / (p.inner * p.outer), rows, at / p.inner % p.outer, at % p.inner);
    };
    const int64_t batch = task / (p.inner * p.outer), outer = task / p.inner % p.outer, inner = task % p.inner;
    const Rows<const T> q = rows_of(p.q, p.q_rows, task), k = rows_of(p.k, p.k_rows, task), v = rows_of(p.v, p.k_rows, task);
    const Rows<T> o(p.o, batch, p.q_rows, outer, inner);
    for (int64_t head = 0; head < s.m; head += s.block_heads) {
      const int64_t heads = s.m - head < s.block_heads ? s.m - head : s.block_heads;
      const bool more = head + heads < s.m;
      const Rows<const T> next = more ? k : rows_of(p.k, p.k_rows, task + 1 < end ? task + 1 : task);
      pack(packed_k, k, s.len_k, s.padded_k, head, heads, s.d, w, v, s.len_k, head);
      pack(packed_v, v, s.len_k, s.padded_k, head, heads, s.d, w, q, s.len_q, head * s.per_key);
      pack(packed_q, q, s.len_q, s.padded_q, head * s.per_key, heads * s.per_key, s.d, w, next, s.len_k,
           more ? head + heads : 0);
      for (int64_t h = 0; h < heads * s.per_key; ++h) {
        const float* key = packed_k + h / s.per_key * s.padded_k * w;
        const float* value = packed_v + h / s.per_key * s.padded_k * w;
        const int64_t to_head = head * s.per_key + h;
        for (int64_t i0 = 0; i0 < s.len_q; i0 += kQueryBlock) {
          const int64_t count = s.len_q - i0 < kQueryBlock ? s.len_q - i0 : kQueryBlock;
          dot_rows<kD>(scores, packed_q + (h * s.padded_q + i0) * w, key, count, s.blocks, w);
          for (int64_t i = 0; i < count; i += 2) {
            float lse[2];
            softmax_pair(scores + i / 2 * s.blocks * kLanes, s.blocks, s.len_k, p.scale, p.lse ? lse : nullptr);
            if (p.lse)
              for (int64_t u = 0; u < 2 && i + u < count; ++u) {
                const int64_t row = p.q_rows.first + outer * p.q_rows.outer_stride + inner * p.q_rows.inner_stride +
                                    (i0 + i + u) * p.q_rows.token_stride;
                p.lse.ptr<float>()[batch * p.lse.stride(0) + to_head * p.lse.stride(1) + row * p.lse.stride(2)] = lse[u];
              }
          }
          product<kD, false>(scores, value, s.blocks, count, s.padded_k, w, [&](int64_t x, int64_t c, f32v sum) {
            put(o.at(i0 + x, to_head) + c, sum, s.d - c, stream);
          });
        }
      }
    }
  }
  if (stream) streaming_fence();
}

}  // namespace
}  // namespace vk::VK_ISA
