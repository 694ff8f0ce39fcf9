// softmax(q k^T scale) v for a few queries over a long cache. One task per (sequence, key/value head, piece of the
// history); sinks and recent tokens are a piece of their own. Every piece leaves (max, sum, unnormalised output) per
// query row, merged at the end in the order of the pieces, whose size does not depend on the threads: bit-equal from
// run to run.
//
//   keys    s_t = sum_c (q_c delta_c) code[c][t] + sum_c q_c zero_c      lanes are tokens, one word holds channels
//   values  o_c += sum_t (p_t delta_t) code[t][c] + sum_t p_t zero_t     lanes are channels, one word holds tokens
//
// Both are the same product, `add_codes`: three instructions per 16 codes (and, convert, FMA), because the position of
// a code inside its word is a power of two that the factor takes over. Rows are the queries that share the head.
#include "decode_attention.h"
#include "decode_rows.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace {

using decode::kRows;
using decode::kRun;
constexpr int64_t kMostChannels = 256, kMostGroups = kMostChannels / 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int kBits>
VK_INLINE f32v code_at(u32v word, int i) {  // code i of every lane, times place_value(i)
  constexpr int kPer = 32 / kBits;
  if (i == kPer - 1) return __builtin_convertvector((i32v)(word >> (32 - kBits)), f32v);
  return __builtin_convertvector((i32v)(word & (((1u << kBits) - 1) << (i * kBits))), f32v);
}
// What `code_at` multiplies code i by; a power of two.
VK_INLINE float place_value(int64_t i, int64_t bits) {
  const int64_t at = i % (32 / bits);
  return at == 32 / bits - 1 ? 1.0f : bits_float(static_cast<uint32_t>(127 + at * bits) << 23);
}

// out[row][lane] = (add ? out : 0) + bias[row] + sum_i factor[row][i] code[i][lane]
template <int kBits, int R, int kVecs>
VK_INLINE void add_codes(const float* factor, int64_t factor_row, const int32_t* codes, int64_t word_stride,
                         int64_t words, const float* bias, bool add, float* out, int64_t out_row) {
  f32v sum[R][kVecs];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kVecs; ++j) sum[r][j] = splat(bias[r]);
  for (int64_t w = 0; w < words; ++w) {
    u32v word[kVecs];
    for (int j = 0; j < kVecs; ++j) memcpy(&word[j], codes + w * word_stride + j * kLanes, sizeof word[j]);
    const float* f = factor + w * (32 / kBits);
#pragma GCC unroll 16
    for (int i = 0; i < 32 / kBits; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const f32v code = code_at<kBits>(word[j], i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][j] += splat(f[r * factor_row + i]) * code;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kVecs; ++j) {
      float* to = out + r * out_row + j * kLanes;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
}

template <int kBits, int R>
VK_INLINE void add_codes(const float* factor, int64_t factor_row, const int32_t* codes, int64_t word_stride,
                         int64_t words, int64_t lanes, const float* bias, bool add, float* out, int64_t out_row) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= lanes; at += 4 * kLanes)
    add_codes<kBits, R, 4>(factor, factor_row, codes + at, word_stride, words, bias, add, out + at, out_row);
  for (; at < lanes; at += kLanes)
    add_codes<kBits, R, 1>(factor, factor_row, codes + at, word_stride, words, bias, add, out + at, out_row);
}

// R query rows of one key/value head and what they gathered so far.
template <int R>
struct Rows {
  int64_t d, d_pad;
  const float* q;          // R d_pad, times scale log2(e); zeros beyond d
  const float* q_place;    // the same divided by the place value of its channel's code
  const int64_t* from;     // first position a row sees
  const int64_t* to;       // one past the last
  const float* per_place;  // kRun: 1 / place value of a token's code
  float* top;              // R: largest score so far
  float* sum;              // R
  float* out;              // R d_pad
  float s[R * kRun];       // scores, then probabilities

  bool sees(int64_t begin, int64_t end) const {
    for (int r = 0; r < R; ++r)
      if (from[r] < end && to[r] > begin) return true;
    return false;
  }

  // s holds scores of `count` tokens from `position` on, padded to whole vectors; they become probabilities.
  void softmax(int64_t position, int64_t count) {
    for (int r = 0; r < R; ++r) {
      float* row = s + r * kRun;
      const int64_t low = from[r] - position, high = to[r] - position < count ? to[r] - position : count;
      const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
      if (low > 0 || high < padded)
        for (int64_t t = 0; t < padded; ++t)
          if (t < low || t >= high) row[t] = -kInf;
      f32v most = splat(-kInf);
      for (int64_t t = 0; t < padded; t += kLanes) most = max(load(row + t), most);
      const float now = reduce_max(most), before = top[r];
      if (now > before) {
        top[r] = now;
        const float keep = exp2(splat(before - now))[0];
        sum[r] *= keep;
        for (int64_t j = 0; j < d_pad; j += kLanes) store(out + r * d_pad + j, load(out + r * d_pad + j) * keep);
      }
      const f32v shift = splat(top[r] == -kInf ? 0.0f : top[r]);
      f32v total{};
      for (int64_t t = 0; t < padded; t += kLanes) {
        const f32v x = load(row + t) - shift;
        const f32v p = x == x ? exp2(x) : x;  // a NaN score stays NaN
        store(row + t, p);
        total += p;
      }
      sum[r] += reduce_add(total);
    }
  }

  template <int kBits>
  void group(const CacheRef& c, int64_t place, int64_t position) {
    const int64_t g = c.layout.group, k_words = code_words(d, kBits), v_words = code_words(g, kBits);
    if (!sees(position, position + g)) return;
    alignas(64) float factor[R * kMostChannels];
    float bias[R] = {};
    const f16* delta = c.k_scale.ptr<const f16>() + place * 2 * d;
    f32v bias_v[R] = {};
    for (int64_t j = 0; j < d_pad; j += kLanes) {
      const int64_t count = d - j;
      const f32v step = count > 0 ? load(delta + j, count) : f32v{};
      const f32v zero = count > 0 ? load(delta + d + j, count) : f32v{};
      for (int r = 0; r < R; ++r) {
        store(factor + r * kMostChannels + j, load(q_place + r * d_pad + j) * step);
        bias_v[r] += load(q + r * d_pad + j) * zero;
      }
    }
    for (int r = 0; r < R; ++r) bias[r] = reduce_add(bias_v[r]);
    const int32_t* codes = c.k_codes.ptr<const int32_t>() + place * k_words * g;
    add_codes<kBits, R>(factor, kMostChannels, codes, g, k_words, g, bias, false, s, kRun);
    softmax(position, g);

    const int64_t groups = c.channel_groups();
    const f16* v_delta = c.v_scale.ptr<const f16>() + place * 2 * groups * g;
    const int32_t* values = c.v_codes.ptr<const int32_t>() + place * v_words * d_pad;
    for (int64_t i = 0; i < groups; ++i) {
      for (int r = 0; r < R; ++r) bias_v[r] = f32v{};
      for (int64_t t = 0; t < g; t += kLanes) {
        const f32v step = load(v_delta + i * g + t) * load(per_place + t);
        const f32v zero = load(v_delta + (groups + i) * g + t);
        for (int r = 0; r < R; ++r) {
          const f32v p = load(s + r * kRun + t);
          const i32v unseen = p == 0.0f;  // whatever its value holds
          store(factor + r * kMostChannels + t, unseen ? p : p * step);
          bias_v[r] += unseen ? p : p * zero;
        }
      }
      for (int r = 0; r < R; ++r) bias[r] = reduce_add(bias_v[r]);
      const int64_t begin = i * g, lanes = d_pad - begin < g ? d_pad - begin : g;
      add_codes<kBits, R>(factor, kMostChannels, values + begin, d_pad, v_words, lanes, bias, true, out + begin, d_pad);
    }
  }

  // `count` tokens kept as they are, one after the other in memory.
  template <class T>
  void plain(const T* k, const T* v, int64_t count, int64_t position) {
    for (; count > 0; count -= kRun, k += kRun * d, v += kRun * d, position += kRun)
      plain_run(k, v, count < kRun ? count : kRun, position);
  }
  template <class T>
  void plain_run(const T* k, const T* v, int64_t count, int64_t position) {
    int64_t low = count, high = 0;
    for (int r = 0; r < R; ++r) {
      low = from[r] - position < low ? from[r] - position : low;
      high = to[r] - position > high ? to[r] - position : high;
    }
    low = low < 0 ? 0 : low;
    high = high > count ? count : high;
    if (low >= high) return;
    const int64_t whole = d / kLanes * kLanes;
    for (int64_t t = 0; t < (count + kLanes - 1) / kLanes * kLanes; ++t) {
      if (t < low || t >= high) {
        for (int r = 0; r < R; ++r) s[r * kRun + t] = -kInf;
        continue;
      }
      f32v dot[R] = {};
      for (int64_t j = 0; j < whole; j += kLanes) {
        const f32v x = load(k + t * d + j);
        for (int r = 0; r < R; ++r) dot[r] += load(q + r * d_pad + j) * x;
      }
      if (whole < d) {
        const f32v x = load(k + t * d + whole, d - whole);
        for (int r = 0; r < R; ++r) dot[r] += load(q + r * d_pad + whole) * x;
      }
      for (int r = 0; r < R; ++r) s[r * kRun + t] = reduce_add(dot[r]);
    }
    softmax(position, count);
    constexpr int kMost = R <= 2 && kLanes == 16 ? 8 : 4;
    int64_t j = 0;
    for (; j + kMost * kLanes <= whole; j += kMost * kLanes) add_values<kMost>(v + j, low, high, out + j, kLanes);
    for (; j + 4 * kLanes <= whole; j += 4 * kLanes) add_values<4>(v + j, low, high, out + j, kLanes);
    for (; j < d; j += kLanes) add_values<1>(v + j, low, high, out + j, d - j);
  }
  template <int kVecs, class T>
  void add_values(const T* v, int64_t low, int64_t high, float* to, int64_t count) const {
    f32v total[R][kVecs];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kVecs; ++j) total[r][j] = load(to + r * d_pad + j * kLanes);
    for (int64_t t = low; t < high; ++t)
      for (int j = 0; j < kVecs; ++j) {
        const f32v x = kVecs == 1 ? load(v + t * d, count) : load(v + t * d + j * kLanes);
        for (int r = 0; r < R; ++r) total[r][j] += splat(s[r * kRun + t]) * x;
      }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kVecs; ++j) store(to + r * d_pad + j * kLanes, total[r][j]);
  }
};

// Pieces of the history, the same whatever the threads; the last piece holds sinks and recent tokens.
struct Pieces {
  int64_t tokens, count;
  Pieces(const CacheRef& c) {
    int64_t longest = 0;
    for (int64_t ib = 0; ib < c.b; ++ib) {
      const int64_t end = history_end(c.layout, c.length[ib]), held = end - history_begin(c.layout, end);
      longest = held > longest ? held : longest;
    }
    tokens = longest * c.b * c.m / 64 / kRun * kRun;
    tokens = tokens < 512 ? 512 : tokens > 4096 ? 4096 : tokens;
    count = (longest + tokens - 1) / tokens + 1;
  }
};

template <class T, int R>
void attend_rows(const CacheRef& c, Rows<R>& rows, int64_t ib, int64_t im, int64_t piece, const Pieces& pieces) {
  const CacheLayout& l = c.layout;
  const int64_t length = c.length[ib], end = history_end(l, length), begin = history_begin(l, end);
  if (piece == pieces.count - 1) {
    if (l.sinks) {
      const int64_t at = (ib * c.m + im) * l.sinks * c.d, count = length < l.sinks ? length : l.sinks;
      rows.plain(c.k_sink.ptr<const T>() + at, c.v_sink.ptr<const T>() + at, count, 0);
    }
    if (l.bits) {
      const int64_t window = l.residual + l.group, head = (ib * c.m + im) * window;
      for (int64_t index = end; index < length - l.sinks;) {
        const int64_t slot = index % window, left = length - l.sinks - index;
        const int64_t count = left < window - slot ? left : window - slot, at = (head + slot) * c.d;
        rows.plain(c.k_recent.ptr<const T>() + at, c.v_recent.ptr<const T>() + at, count, index + l.sinks);
        index += count;
      }
    }
    return;
  }
  const int64_t from = begin + piece * pieces.tokens, to = from + pieces.tokens < end ? from + pieces.tokens : end;
  for (int64_t index = from; index < to;) {
    const int64_t slot = history_slot(l, index), page = c.table[ib * c.table_pages + slot / l.page];
    const int64_t in_page = slot % l.page, head = page * c.m + im;
    if (l.bits) {
      const int64_t place = head * (l.page / l.group) + in_page / l.group;
      if (l.bits == 2) rows.template group<2>(c, place, index + l.sinks);
      if (l.bits == 4) rows.template group<4>(c, place, index + l.sinks);
      if (l.bits == 8) rows.template group<8>(c, place, index + l.sinks);
      index += l.group;
    } else {
      int64_t count = to - index < l.page - in_page ? to - index : l.page - in_page;
      if (l.ring && count > l.ring - slot) count = l.ring - slot;
      const int64_t at = (head * l.page + in_page) * c.d;
      rows.plain(c.k_rows.ptr<const T>() + at, c.v_rows.ptr<const T>() + at, count, index + l.sinks);
      index += count;
    }
  }
}

template <class T, int R>
void attend_block(const DecodeAttentionParams& p, const float* q, const float* q_place, const float* per_place,
                  int64_t row, int64_t ib, int64_t im, int64_t piece, const Pieces& pieces, float* result) {
  const int64_t s = p.q.size(1), d_pad = p.cache.d_pad();
  int64_t from[R], to[R];
  for (int r = 0; r < R; ++r) {
    to[r] = p.cache.length[ib] - s + (row + r) % s + 1;
    from[r] = p.window && to[r] > p.window ? to[r] - p.window : 0;
  }
  Rows<R> rows;
  rows.d = p.cache.d, rows.d_pad = d_pad, rows.q = q, rows.q_place = q_place, rows.per_place = per_place;
  rows.from = from, rows.to = to;
  rows.top = result, rows.sum = result + R, rows.out = result + 2 * R;
  for (int r = 0; r < R; ++r) rows.top[r] = -kInf, rows.sum[r] = 0.0f;
  memset(rows.out, 0, sizeof(float) * static_cast<size_t>(R * d_pad));
  attend_rows<T>(p.cache, rows, ib, im, piece, pieces);
}

template <class Q>
void load_queries(const DecodeAttentionParams& p, int64_t rows, float* q, float* q_place) {
  const CacheRef& c = p.cache;
  const int64_t s = p.q.size(1), share = p.q.size(2) / c.m, d_pad = c.d_pad();
  for (int64_t i = 0; i < c.b * c.m * rows; ++i) {
    const int64_t row = i % rows, im = i / rows % c.m, ib = i / rows / c.m;
    for (int64_t j = 0; j < d_pad; ++j) {
      const Q* from =
          p.q.ptr<const Q>() + ib * p.q.stride(0) + row % s * p.q.stride(1) + (im * share + row / s) * p.q.stride(2);
      const float x = j < c.d ? to_float(from[j]) * (p.scale * kLog2e) : 0.0f;
      q[i * d_pad + j] = x;
      q_place[i * d_pad + j] = c.layout.bits ? x / place_value(j, c.layout.bits) : x;
    }
  }
}

template <class Q>
void merge(const DecodeAttentionParams& p, int64_t rows, const Pieces& pieces, const float* results) {
  const CacheRef& c = p.cache;
  const int64_t s = p.q.size(1), n = p.q.size(2), share = n / c.m, d_pad = c.d_pad(), piece_size = rows * (2 + d_pad);
  for (int64_t i = 0; i < c.b * c.m * rows; ++i) {
    const int64_t row = i % rows, head = i / rows, in = head % c.m * share + row / s, ib = head / c.m;
    const int64_t block = row / kRows * kRows, width = rows - block < kRows ? 1 : kRows;
    const int64_t first = width == 1 ? row : block;
    const auto part = [&](int64_t piece) {
      return results + (head * pieces.count + piece) * piece_size + first * (2 + d_pad);
    };
    const int64_t at = row - first;
    float top = -kInf, sum = 0.0f;
    for (int64_t j = 0; j < pieces.count; ++j) top = part(j)[at] > top ? part(j)[at] : top;
    const float shift = top == -kInf ? 0.0f : top;
    alignas(64) float out[kMostChannels] = {};
    for (int64_t j = 0; j < pieces.count; ++j) {
      const float weight = exp2(splat(part(j)[at] - shift))[0];
      const float of = part(j)[width + at];
      if (weight == 0.0f && of == of) continue;
      sum += weight * of;
      const float* from = part(j) + 2 * width + at * d_pad;
      for (int64_t k = 0; k < d_pad; k += kLanes) store(out + k, load(out + k) + load(from + k) * weight);
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    Q* o = p.o.ptr<Q>() + ((ib * s + row % s) * n + in) * c.d;
    for (int64_t k = 0; k < c.d; k += kLanes) store(o + k, load(out + k) * inverse, c.d - k);
    p.lse.ptr<float>()[(ib * n + in) * s + row % s] = sum == 0.0f ? -kInf : shift * kLn2 + std::log(sum);
  }
}

template <class Q, class T>
void attend(const DecodeAttentionParams& p) {
  const CacheRef& c = p.cache;
  const int64_t rows = p.q.size(1) * (p.q.size(2) / c.m), d_pad = c.d_pad(), heads = c.b * c.m;
  const Pieces pieces(c);
  const size_t q_size = static_cast<size_t>(heads * rows * d_pad);
  const size_t result_size = static_cast<size_t>(heads * pieces.count * rows * (2 + d_pad));
  float* q = static_cast<float*>(scratch(0, sizeof(float) * (2 * q_size + result_size + kRun)));
  float *q_place = q + q_size, *per_place = q_place + q_size, *results = per_place + kRun;
  load_queries<Q>(p, rows, q, q_place);
  for (int64_t t = 0; t < kRun; ++t) per_place[t] = c.layout.bits ? 1.0f / place_value(t, c.layout.bits) : 1.0f;
  parallel_tasks(heads * pieces.count, [&](int64_t task) {
    const int64_t head = task / pieces.count, piece = task % pieces.count;
    float* result = results + task * rows * (2 + d_pad);
    for (int64_t row = 0; row < rows;) {
      const int64_t at = (head * rows + row) * d_pad;
      const auto block = rows - row >= kRows ? &attend_block<T, kRows> : &attend_block<T, 1>;
      block(p, q + at, q_place + at, per_place, row, head / c.m, head % c.m, piece, pieces, result + row * (2 + d_pad));
      row += rows - row >= kRows ? kRows : 1;
    }
  });
  merge<Q>(p, rows, pieces, results);
}

template <class Q>
void attend_cache(const DecodeAttentionParams& p) {
  switch (p.cache.dtype) {
    case Dtype::bf16:
      return attend<Q, bf16>(p);
    case Dtype::f16:
      return attend<Q, f16>(p);
    default:
      return attend<Q, float>(p);
  }
}

}  // namespace

void decode_attention(const DecodeAttentionParams& p) {
  switch (p.q.dtype) {
    case Dtype::bf16:
      return attend_cache<bf16>(p);
    case Dtype::f16:
      return attend_cache<f16>(p);
    default:
      return attend_cache<float>(p);
  }
}

}  // namespace vk::VK_ISA
