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
#include "vkernels/cpu/short_attention_math.h"

namespace vk::VK_ISA {
namespace short_attention {
namespace {

// ---- rows in and out ------------------------------------------------------------------------------------------------

VK_INLINE void prefetch_piece(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// One row to words along d.
template <class T>
VK_INLINE void pack_row(float* to, const T* from, int64_t d) {
#if defined(__AVX512BF16__)
  if constexpr (MultipliesPairs<T>::value) {
    for (int64_t c = 0; c < d; c += 32) {
      const __mmask32 live = d - c >= 32 ? ~__mmask32{0} : (__mmask32{1} << (d - c)) - 1;
      _mm512_storeu_si512(to + c / 2, _mm512_maskz_loadu_epi16(live, from + c));
    }
    return;
  }
#endif
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c));
  if (c < d) store(to + c, load(from + c, d - c));
}

// Two rows (the second may be absent) to words across them.
#if defined(__AVX512BF16__)
VK_INLINE void stack_rows(float* to, const bf16* first, const bf16* second, int64_t d) {
  for (int64_t c = 0; c < d; c += kLanes) {
    const __mmask16 live = d - c >= 16 ? ~__mmask16{0} : static_cast<__mmask16>((1u << (d - c)) - 1u);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, first + c));
    const __mmask16 also = second ? live : __mmask16{0};
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(also, second + c));
    _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#else
template <class T>
VK_INLINE void stack_rows(float*, const T*, const T*, int64_t) {}  // no instruction set without pairs stacks
#endif

// Packed rows, stacked.
VK_INLINE void stack(float* to, const float* rows, int64_t count, int64_t words, int64_t d, int64_t columns) {
  for (int64_t i = 0; i < count; i += 2, to += columns)
    stack_rows(to, reinterpret_cast<const bf16*>(rows + i * words),
               reinterpret_cast<const bf16*>(rows + (i + 1) * words), d);
}

// A packed row times `factor`.
template <class T>
VK_INLINE void scale_row(float* row, float factor, int64_t d) {
  const auto scale = [&](auto* x) {
    for (int64_t c = 0; c < d; c += kLanes) store(x + c, load(x + c, d - c) * factor, d - c);
  };
  if constexpr (MultipliesPairs<T>::value)
    scale(reinterpret_cast<T*>(row));
  else
    scale(row);
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

// Packs heads [first, first + heads) of row i to [head][row][words], or (kStacked) [head][row / 2][words].
template <bool kStacked, class T>
VK_INLINE void pack_piece(float* to, const Rows<const T>& rows, int64_t i, int64_t count, int64_t padded, int64_t first,
                          int64_t heads, int64_t d, int64_t words) {
  if constexpr (kStacked) {
    if (i % 2 == 0 && i + 1 < count) return;  // with its partner
    const T *a = rows.at(i / 2 * 2, first), *b = i % 2 ? rows.at(i, first) : nullptr;
    for (int64_t h = 0; h < heads; ++h)
      stack_rows(to + (h * padded + i) / 2 * words, a + h * rows.head, b ? b + h * rows.head : nullptr, d);
  } else {
    const T* row = rows.at(i, first);
    for (int64_t h = 0; h < heads; ++h) pack_row(to + (h * padded + i) * words, row + h * rows.head, d);
  }
}

// Packs `count` rows, asking for row i + kAhead while row i is read and, at the end, for the first rows of `next`.
template <class T>
VK_INLINE void pack(float* to, const Rows<const T>& rows, int64_t count, int64_t padded, int64_t first, int64_t heads,
                    int64_t d, int64_t words, const Rows<const T>& next, int64_t next_count, int64_t next_first) {
  const bool joined = rows.head == d;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ahead = i + kAhead;
    const T* wanted = ahead < count                ? rows.at(ahead, first)
                      : ahead - count < next_count ? next.at(ahead - count, next_first)
                                                   : nullptr;
    if (wanted && joined) prefetch_piece(reinterpret_cast<const char*>(wanted), heads * d * int64_t(sizeof(T)));
    pack_piece<false>(to, rows, i, count, padded, first, heads, d, words);
  }
}

// A row piece leaves: `stream` sends whole aligned vectors past the caches.
template <class T>
VK_INLINE void put(T* to, f32v x, int64_t count, bool stream) {
  if (count >= kLanes && stream) return store_streaming(to, x);
  store(to, x, count);
}

// Elements that lie together.
template <class T>
VK_INLINE void copy_out(T* to, const T* from, int64_t count, bool stream) {
  if (stream) return copy_streaming(to, from, sizeof(T) * static_cast<size_t>(count));
  memcpy(to, from, sizeof(T) * static_cast<size_t>(count));
}

template <class T>
VK_INLINE bool large(const TensorRef& out) {
  return out.numel() * int64_t(sizeof(T)) >= kStreamBytes;
}

// Only whole cache lines: a line written half past the caches and half through them costs more than it saves (bf16,
// d = 88: 1.5x the time of the call).
template <class T>
VK_INLINE bool streams(const TensorRef& out) {
  return out.size(3) * int64_t(sizeof(T)) % 64 == 0 && large<T>(out);
}

// ---- forward --------------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 3072;       // of one token row, per block of heads
constexpr int64_t kBlockBytes = 160 << 10;  // of a block's packed rows

// Sizes of a call, and how its key heads are blocked.
struct ShortShape {
  int64_t n, m, d, words, columns, per_key, len_q, len_k, padded_q, padded_k, blocks, block_heads, head_blocks;

  ShortShape(const ShortAttention& p, bool pairs)
      : n(p.q.size(2)),
        m(p.k.size(2)),
        d(p.q.size(3)),
        words(pairs ? round_up(d, 2 * kLanes) / 2 : round_up(d, kLanes)),  // of a packed row
        columns(round_up(d, kLanes)),                                      // of a stacked row
        per_key(n / m),
        len_q(p.len_q),
        len_k(p.len_k),
        padded_q(round_up(p.len_q, 4)),
        padded_k(round_up(p.len_k, kHalf)),
        blocks(padded_k / kHalf) {
    const int64_t piece = d * (p.q.dtype == Dtype::f32 ? 4 : 2) * per_key;
    const int64_t packed = 4 * words * (2 * padded_k + 2 * padded_q * per_key);
    const int64_t fits = kPieceBytes / piece < kBlockBytes / packed ? kPieceBytes / piece : kBlockBytes / packed;
    head_blocks = fits < 1 ? m : (m + fits - 1) / fits;
    block_heads = (m + head_blocks - 1) / head_blocks;
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

// A block of heads of one group on its way into its buffers. Its pieces are the rows of K, V and Q, in this order.
template <class T>
struct ForwardBlock {
  static constexpr bool kPairs = MultipliesPairs<T>::value;
  const ShortAttention& p;
  const ShortShape& s;
  ShortTask t;
  int64_t task, end, head, heads;
  bool split;
  Rows<const T> q, k, v;
  float *packed_k, *packed_v, *packed_q;

  ForwardBlock(const ShortAttention& p_, const ShortShape& s_, int64_t task_, int64_t end_, bool split_, float* buffer)
      : p(p_), s(s_), t(p_, s_, task_, split_), task(task_), end(end_), split(split_) {
    packed_k = buffer;
    packed_v = packed_k + s.block_heads * s.padded_k * s.words;
    packed_q = packed_v + s.block_heads * s.padded_k / (kPairs ? 2 : 1) * s.columns;
    memset(buffer, 0, sizeof(float) * static_cast<size_t>(floats(s)));
    enter(t.first_head);
  }
  static int64_t floats(const ShortShape& s) {
    return s.block_heads *
           (s.padded_k * s.words + s.padded_k / (kPairs ? 2 : 1) * s.columns + s.per_key * s.padded_q * s.words);
  }
  void enter(int64_t first_head) {
    head = first_head;
    heads = t.end_head - head < s.block_heads ? t.end_head - head : s.block_heads;
    q = {p.q, p.q_rows, t.batch, t.outer, t.inner};
    k = {p.k, p.k_rows, t.batch, t.outer, t.inner};
    v = {p.v, p.k_rows, t.batch, t.outer, t.inner};
  }
  // Becomes the block after `other`, in its own buffers; false if there is none.
  bool follow(const ForwardBlock& other) {
    const bool same = other.head + other.heads < other.t.end_head;
    if (!same && other.task + 1 >= end) return false;
    task = same ? other.task : other.task + 1;
    t = ShortTask(p, s, task, split);
    enter(same ? other.head + other.heads : t.first_head);
    return true;
  }
  int64_t pieces() const { return 2 * s.len_k + s.len_q; }
  void prefetch(int64_t piece) const {
    if (piece >= pieces() || k.head != s.d || q.head != s.d || v.head != s.d) return;
    const bool query = piece >= 2 * s.len_k;
    const T* row = query             ? q.at(piece - 2 * s.len_k, head * s.per_key)
                   : piece < s.len_k ? k.at(piece, head)
                                     : v.at(piece - s.len_k, head);
    prefetch_piece(reinterpret_cast<const char*>(row), heads * (query ? s.per_key : 1) * s.d * int64_t(sizeof(T)));
  }
  void pack(int64_t begin, int64_t until) const {
    for (int64_t i = begin; i < until; ++i) {
      prefetch(i + kAhead);
      if (i < s.len_k)
        pack_piece<false>(packed_k, k, i, s.len_k, s.padded_k, head, heads, s.d, s.words);
      else if (i < 2 * s.len_k)
        pack_piece<kPairs>(packed_v, v, i - s.len_k, s.len_k, s.padded_k, head, heads, s.d, s.columns);
      else
        pack_piece<false>(packed_q, q, i - 2 * s.len_k, s.len_q, s.padded_q, head * s.per_key, heads * s.per_key, s.d,
                          s.words);
    }
  }
};

// While a head is computed, the rows asked for before it arrive; they are packed after it, into the other buffers.
template <class T>
void forward_range(const ShortAttention& p, int64_t begin, int64_t end, bool split, bool stream) {
  constexpr bool kPairs = MultipliesPairs<T>::value;
  using Block = ForwardBlock<T>;
  const ShortShape s(p, kPairs);
  const int64_t floats = Block::floats(s), w = s.words;
  const int64_t width = s.block_heads * s.per_key * s.d;  // of an output row's piece
  const int64_t all = 2 * floats + kQueryBlock / 2 * s.blocks * kLanes + s.len_q * width + kLanes;
  float* const buffers = static_cast<float*>(scratch(0, sizeof(float) * static_cast<size_t>(all)));
  float* const scores = buffers + 2 * floats;
  T* const staged = reinterpret_cast<T*>(scores + kQueryBlock / 2 * s.blocks * kLanes);  // len_q x width
  // Vectors that are whole lines go straight to their rows. Others are staged and leave by the row: written head by
  // head, rows that share a cache set push each other's half-filled lines out (T = 16, d = 88, bf16: 15.5 to 8.4 ms).
  const bool direct = sizeof(T) * kLanes == 64 && s.d % kLanes == 0;
  Block first(p, s, begin, end, split, buffers), second(p, s, begin, end, split, buffers + floats);
  Block *block = &first, *next = &second;
  block->pack(0, block->pieces());

  for (bool more = true; more;) {
    more = next->follow(*block);
    const ShortTask& t = block->t;
    const Rows<T> o(p.o, p.q_rows, t.batch, t.outer, t.inner);
    const int64_t head_q = block->head * s.per_key, heads_q = block->heads * s.per_key;
    const int64_t pieces = more ? next->pieces() : 0, share = (pieces + heads_q - 1) / heads_q;
    for (int64_t h = 0; h < heads_q; ++h) {
      const int64_t piece = h * share < pieces ? h * share : pieces;
      const int64_t until = piece + share < pieces ? piece + share : pieces;
      for (int64_t i = piece; i < until && i < piece + kAhead; ++i) next->prefetch(i);
      const float* key = block->packed_k + h / s.per_key * s.padded_k * w;
      const float* value = block->packed_v + h / s.per_key * s.padded_k / (kPairs ? 2 : 1) * s.columns;
      float* shared = p.q_rows.shared ? p.shared_q + (t.group(p) * s.n + head_q + h) * s.d : nullptr;
      for (int64_t i0 = 0; i0 < s.len_q; i0 += kQueryBlock) {
        const int64_t count = s.len_q - i0 < kQueryBlock ? s.len_q - i0 : kQueryBlock;
        dot_rows<kPairs>(scores, block->packed_q + (h * s.padded_q + i0) * w, key, count, s.blocks, w);
        for (int64_t i = 0; i < count; i += 2) {
          float lse[2];
          softmax_pair<kPairs>(scores + i / 2 * s.blocks * kLanes, s.blocks, s.len_k, p.scale, p.lse ? lse : nullptr);
          for (int64_t u = 0; p.lse && u < 2 && i + u < count; ++u)
            *p.at(p.lse, t.batch, head_q + h, t.outer, t.inner, i0 + i + u) = lse[u];
        }
        product<kPairs, false>(scores, value, s.blocks, count, s.padded_k, s.columns,
                               [&](int64_t x, int64_t c, f32v sum) {
                                 if (shared && i0 + x == 0) return store(shared + c, sum, s.d - c);
                                 if (direct) return put(o.at(i0 + x, head_q + h) + c, sum, s.d - c, stream);
                                 store(staged + (i0 + x) * width + h * s.d + c, sum, s.d - c);
                               });
      }
      next->pack(piece, until);
    }
    for (int64_t x = p.q_rows.shared; !direct && x < s.len_q; ++x) {
      const bool joined = o.head == s.d;
      for (int64_t h = 0; h < (joined ? 1 : heads_q); ++h)
        copy_out(o.at(x, head_q + h), staged + x * width + h * s.d, joined ? heads_q * s.d : s.d, stream);
    }
    Block* const done = block;
    block = next;
    next = done;
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
  const bool split = split_heads(p), stream = large<T>(p.o);
  const int64_t tasks = b * p.groups() * (split ? ShortShape(p, MultipliesPairs<T>::value).head_blocks : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { forward_range<T>(p, begin, end, split, stream); });
  if (p.q_rows.shared) gather_shared<T>(p, p.o, p.shared_q, 1.0f / static_cast<float>(p.groups()));
}

// ---- backward -------------------------------------------------------------------------------------------------------
template <class T>
void backward_range(const ShortAttention& p, int64_t begin, int64_t end, bool split, bool stream) {
  constexpr bool kPairs = MultipliesPairs<T>::value;
  const ShortShape s(p, kPairs);
  const int64_t w = s.words;
  const int64_t rows_k = s.block_heads * s.padded_k * w, rows_q = s.block_heads * s.per_key * s.padded_q * w;
  const int64_t sums = s.padded_k * s.columns, stacked = kPairs ? s.columns / 2 : 0,
                score_count = kQueryBlock / 2 * s.blocks * kLanes;
  const int64_t floats = 2 * rows_k + 2 * rows_q + 2 * sums + 2 * score_count + stacked * (s.padded_k + 2 * s.padded_q);
  float* const packed_k = static_cast<float*>(scratch(0, sizeof(float) * static_cast<size_t>(floats)));
  float* const packed_v = packed_k + rows_k;
  float* const packed_q = packed_v + rows_k;
  float* const packed_g = packed_q + rows_q;  // gradient of the output
  float* const sum_k = packed_g + rows_q;     // gradients of one key head, while its query blocks pass
  float* const sum_v = sum_k + sums;
  float* const scores = sum_v + sums;
  float* const grads = scores + score_count;
  float* const stacked_k = grads + score_count;
  float* const stacked_q = stacked_k + stacked * s.padded_k;
  float* const stacked_g = stacked_q + stacked * s.padded_q;
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
        if (shared) scale_row<T>(packed_g + h * s.padded_q * w, share, s.d);
        if constexpr (kPairs) {
          stack(stacked_k, key, s.padded_k, w, s.d, s.columns);
          stack(stacked_q, packed_q + h * s.padded_q * w, s.padded_q, w, s.d, s.columns);
          stack(stacked_g, packed_g + h * s.padded_q * w, s.padded_q, w, s.d, s.columns);
        }
        for (int64_t i0 = 0; i0 < s.len_q; i0 += kQueryBlock) {
          const int64_t count = s.len_q - i0 < kQueryBlock ? s.len_q - i0 : kQueryBlock;
          const float* query = packed_q + (h * s.padded_q + i0) * w;
          const float* grad = packed_g + (h * s.padded_q + i0) * w;
          dot_rows<kPairs>(scores, query, key, count, s.blocks, w);
          dot_rows<kPairs>(grads, grad, value, count, s.blocks, w);
          for (int64_t i = 0; i < count; i += 2) {
            const int64_t at = i / 2 * s.blocks * kLanes;
            softmax_pair<false>(scores + at, s.blocks, s.len_k, p.scale, nullptr);
            f32v grad_lse = {};
            if (p.grad_lse) {
              const auto at_query = [&](int64_t x) {
                return *p.at(p.grad_lse, t.batch, to_query, t.outer, t.inner, x);
              };
              grad_lse = two_halves(at_query(i0 + i), i + 1 < count ? at_query(i0 + i + 1) : 0.0f);
            }
            softmax_pair_backward<kPairs>(scores + at, grads + at, s.blocks, p.scale, grad_lse);
          }
          product<kPairs, false>(grads, kPairs ? stacked_k : key, s.blocks, count, s.padded_k, s.columns,
                                 [&](int64_t x, int64_t c, f32v sum) {
                                   if (shared && i0 + x == 0) return store(shared_q + c, sum, s.d - c);
                                   put(dq.at(i0 + x, to_query) + c, sum, s.d - c, stream);
                                 });
          const bool first = h % s.per_key == 0 && i0 == 0;
          const bool last = h % s.per_key == s.per_key - 1 && i0 + kQueryBlock >= s.len_q;
          const auto add = [&](const float* weights, const float* rows, float* partial, const Rows<T>& to,
                               float* parts) {
            product<kPairs, true>(weights, rows, s.blocks, s.len_k, count, s.columns,
                                  [&](int64_t x, int64_t c, f32v sum) {
                                    if (!first) sum += load(partial + x * s.columns + c);
                                    if (!last) return store(partial + x * s.columns + c, sum);
                                    if (shared && x == 0)
                                      return store(parts + (t.group(p) * s.m + to_key) * s.d + c, sum, s.d - c);
                                    put(to.at(x, to_key) + c, sum, s.d - c, stream);
                                  });
          };
          add(grads, kPairs ? stacked_q + i0 / 2 * s.columns : query, sum_k, dk, p.shared_k);
          add(scores, kPairs ? stacked_g + i0 / 2 * s.columns : grad, sum_v, dv, p.shared_v);
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
  const bool split = split_heads(p), stream = streams<T>(p.dq);
  const int64_t tasks = b * p.groups() * (split ? ShortShape(p, MultipliesPairs<T>::value).head_blocks : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { backward_range<T>(p, begin, end, split, stream); });
  if (p.q_rows.shared) {
    gather_shared<T>(p, p.dq, p.shared_q, 1.0f);
    gather_shared<T>(p, p.dk, p.shared_k, 1.0f);
    gather_shared<T>(p, p.dv, p.shared_v, 1.0f);
  }
}

}  // namespace
}  // namespace short_attention
}  // namespace vk::VK_ISA
