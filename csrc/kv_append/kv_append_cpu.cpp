// Tokens into a KV cache. First every group that is now complete becomes codes (one task per sequence, head and group;
// its tokens come from the recent window or from the call), then the rows of sinks, history and window are copied: a
// window slot may hold a token that the first step still reads.
#include "kv_append.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace {

constexpr int kMostTokens = 128, kMostChannels = 256;

template <int kBits>
inline constexpr float kTop = (1 << kBits) - 1;

// The lowest bits are the code: adding 1.5 * 2^23 rounds to an integer. What lies outside the range of float16 needs no
// clamping here, it gets the code its clamped value has; NaN gets 0.
template <int kBits>
VK_INLINE u32v coded(f32v x, f32v zero, f32v inverse) {
  return (u32v)(min(max((x - zero) * inverse, splat(0.0f)), splat(kTop<kBits>)) + splat(12582912.0f));
}

// As half_outward() of quantize.h.
template <bool kUp>
VK_INLINE f32v halves_outward(f32v x, f16* to) {
  f16 h[kLanes];
#if defined(__AVX512F__)
  constexpr int kMode = kUp ? _MM_FROUND_TO_POS_INF : _MM_FROUND_TO_NEG_INF;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_cvtps_ph((__m512)x, kMode));
#elif defined(__AVX2__)
  constexpr int kMode = kUp ? _MM_FROUND_TO_POS_INF : _MM_FROUND_TO_NEG_INF;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h), _mm256_cvtps_ph((__m256)x, kMode));
#else
  for (int i = 0; i < kLanes; ++i) h[i] = half_outward(x[i], kUp);
#endif
  memcpy(to, h, sizeof h);
  return load(h);
}

// What a group's scale is made of, a lane for each of kLanes groups. NaN is told by the largest bits without a sign:
// minima and maxima pass it over.
struct Range {
  f32v low = splat(kInf), high = splat(-kInf);
  i32v bits{};
};

VK_INLINE void widen(Range& r, f32v x) {
  const i32v bits = (i32v)x & 0x7fffffff;
  r.low = min(x, r.low);
  r.high = max(x, r.high);
  r.bits = bits > r.bits ? bits : r.bits;
}

struct Scales {
  f32v zero, inverse;
};

// As quant_scale() of quantize.h. delta and zero have room for kLanes.
template <int kBits>
VK_INLINE Scales scales_of(const Range& r, f16* delta, f16* zero) {
  const i32v nan = r.bits > 0x7f800000;
  const f32v bad = splat(std::numeric_limits<float>::quiet_NaN()), most = splat(kHalfMax);
  const f32v low = nan ? bad : min(most, max(-most, r.low)), high = nan ? bad : min(most, max(-most, r.high));
  Scales s;
  s.zero = halves_outward<false>(low, zero);
  const f32v step = halves_outward<true>((high - s.zero) / splat(kTop<kBits>), delta);
  s.inverse = step > splat(0.0f) ? splat(1.0f) / step : splat(0.0f);
  return s;
}

// One vector of kLanes ranges of vectors: lane t holds that of across[t]. Halves are folded together, so that each step
// leaves half as many vectors.
template <int kCount = kLanes>
VK_INLINE Range folded(Range* across) {
  if constexpr (kCount == 1) {
    return across[0];
  } else {
    i32v first, second;
    for (int i = 0; i < kLanes; ++i) {
      first[i] = i / 2 + i % 2 * kLanes;
      second[i] = first[i] + kLanes / 2;
    }
    for (int i = 0; i < kCount / 2; ++i) {
      Range &a = across[i], &b = across[i + kCount / 2];
      a.low = min(__builtin_shuffle(a.low, b.low, first), __builtin_shuffle(a.low, b.low, second));
      a.high = max(__builtin_shuffle(a.high, b.high, first), __builtin_shuffle(a.high, b.high, second));
      const i32v x = __builtin_shuffle(a.bits, b.bits, first), y = __builtin_shuffle(a.bits, b.bits, second);
      a.bits = x > y ? x : y;
    }
    return folded<kCount / 2>(across);
  }
}

// The lanes beyond `count` repeat lane 0, so that they widen no range.
VK_INLINE f32v repeated(f32v x, int64_t count) { return iota() < splat(static_cast<int32_t>(count)) ? x : splat(x[0]); }

// `per` codes, one a byte, to a word.
template <int kBits>
VK_INLINE uint32_t pack_bytes(const uint8_t* bytes) {
  if constexpr (kBits == 8) {
    uint32_t word;
    memcpy(&word, bytes, 4);
    return word;
  } else {
#if defined(__BMI2__)
    uint64_t low, high;
    memcpy(&low, bytes, 8);
    if constexpr (kBits == 4) return static_cast<uint32_t>(_pext_u64(low, 0x0f0f0f0f0f0f0f0full));
    memcpy(&high, bytes + 8, 8);
    return static_cast<uint32_t>(_pext_u64(low, 0x0303030303030303ull) | _pext_u64(high, 0x0303030303030303ull) << 16);
#else
    uint32_t word = 0;
    for (int i = 0; i < 32 / kBits; ++i) word |= uint32_t(bytes[i]) << (kBits * i);
    return word;
#endif
  }
}

// A group's rows, one behind the other: in the call they are a power of two apart, which few cache sets would hold.
template <class T>
struct Rows {
  const T* at;
  int64_t stride;
};
template <class T>
VK_INLINE f32v vector_of(const Rows<T>& rows, int64_t t, int64_t j, int64_t count) {
  return load(rows.at + t * rows.stride + j, count);
}

template <int kBits, class T>
void code_keys(const CacheRef& c, const Rows<T>& rows, int64_t place) {
  typedef uint8_t u8v __attribute__((vector_size(kLanes)));
  const int64_t g = c.layout.group, d = c.d, words = code_words(d, kBits), padded = c.d_pad();
  alignas(64) uint8_t bytes[kMostTokens * kMostChannels];
  f16* delta = c.k_scale.ptr<f16>() + place * 2 * d;
  f16* zero = delta + d;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const int64_t count = d - j;
    if (count <= 0) {
      for (int64_t t = 0; t < g; ++t) memset(bytes + t * padded + j, 0, kLanes);
      continue;
    }
    Range range;
    for (int64_t t = 0; t < g; ++t) widen(range, vector_of(rows, t, j, count));
    f16 deltas[kLanes], zeros[kLanes];
    const Scales s = scales_of<kBits>(range, deltas, zeros);
    const size_t held = sizeof(f16) * static_cast<size_t>(count < kLanes ? count : kLanes);
    memcpy(delta + j, deltas, held);
    memcpy(zero + j, zeros, held);
    for (int64_t t = 0; t < g; ++t) {
      const u32v q = coded<kBits>(vector_of(rows, t, j, count), s.zero, s.inverse) & uint32_t(kTop<kBits>);
      const u8v narrow = __builtin_convertvector(q, u8v);
      memcpy(bytes + t * padded + j, &narrow, sizeof narrow);
    }
  }
  int32_t* to = c.k_codes.ptr<int32_t>() + place * words * g;
  for (int64_t w = 0; w < words; ++w)
    for (int64_t t = 0; t < g; ++t)
      to[w * g + t] = static_cast<int32_t>(pack_bytes<kBits>(bytes + t * padded + w * (32 / kBits)));
}

template <int kBits, class T>
void code_values(const CacheRef& c, const Rows<T>& rows, int64_t place) {
  constexpr int kPer = 32 / kBits;
  const int64_t g = c.layout.group, d = c.d, d_pad = c.d_pad(), groups = c.channel_groups();
  f16* delta = c.v_scale.ptr<f16>() + place * 2 * groups * g;
  f16* zero = delta + groups * g;
  int32_t* to = c.v_codes.ptr<int32_t>() + place * code_words(g, kBits) * d_pad;
  float z[kMostTokens], inverse[kMostTokens];
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t begin = i * g, end = begin + g < d ? begin + g : d, padded = end == d ? d_pad : end;
    for (int64_t t = 0; t < g; t += kLanes) {
      Range across[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) {
        int64_t j = begin;
        for (; j + kLanes <= end; j += kLanes) widen(across[k], vector_of(rows, t + k, j, kLanes));
        if (j < end) widen(across[k], repeated(vector_of(rows, t + k, j, end - j), end - j));
      }
      const Scales s = scales_of<kBits>(folded(across), delta + i * g + t, zero + i * g + t);
      store(z + t, s.zero);
      store(inverse + t, s.inverse);
    }
    for (int64_t t = 0; t < g; t += kPer)
      for (int64_t j = begin; j < padded; j += kLanes) {
        u32v word{};
        if (j < end)
          for (int k = 0; k < kPer; ++k) {
            const u32v q = coded<kBits>(vector_of(rows, t + k, j, end - j), splat(z[t + k]), splat(inverse[t + k]));
            word |= (q & uint32_t(kTop<kBits>)) << (kBits * k);
          }
        if (end - j < kLanes) word = (iota() < splat(static_cast<int32_t>(end - j))) ? word : u32v{};
        memcpy(to + t / kPer * d_pad + j, &word, sizeof word);
      }
  }
}

template <class T>
VK_INLINE const T* row_of(const TensorRef& x, int64_t ib, int64_t is, int64_t im) {
  return x.ptr<const T>() + ib * x.stride(0) + is * x.stride(1) + im * x.stride(2);
}

template <int kBits, class T>
void code_groups(const KvAppendParams& p) {
  const CacheRef& c = p.cache;
  const CacheLayout& l = c.layout;
  const int64_t g = l.group, window = l.residual + g;
  const auto first_group = [&](int64_t ib) {
    const int64_t from = history_end(l, c.length[ib]);
    const int64_t kept = history_begin(l, history_end(l, int64_t{c.length[ib]} + p.count[ib]));
    return (from > kept ? from : kept) / g;
  };
  int64_t most = 0;
  for (int64_t ib = 0; ib < c.b; ++ib) {
    const int64_t groups = history_end(l, int64_t{c.length[ib]} + p.count[ib]) / g - first_group(ib);
    most = groups > most ? groups : most;
  }
  const size_t row = static_cast<size_t>(c.d) * sizeof(T);
  parallel_for(0, c.b * most * c.m, 1, [&](int64_t begin, int64_t end) {
    T* const k_rows = static_cast<T*>(scratch(0, 2 * row * static_cast<size_t>(g)));
    T* const v_rows = k_rows + g * c.d;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t ib = task / (most * c.m), im = task % c.m, old = c.length[ib];
      const int64_t index = (first_group(ib) + task / c.m % most) * g;
      if (index >= history_end(l, old + p.count[ib])) continue;
      for (int64_t t = 0; t < g; ++t) {
        const int64_t position = index + t + l.sinks;
        const bool given = position >= old;
        const int64_t at = ((ib * c.m + im) * window + (index + t) % window) * c.d;
        memcpy(k_rows + t * c.d, given ? row_of<T>(p.k, ib, position - old, im) : c.k_recent.ptr<const T>() + at, row);
        memcpy(v_rows + t * c.d, given ? row_of<T>(p.v, ib, position - old, im) : c.v_recent.ptr<const T>() + at, row);
      }
      const int64_t slot = history_slot(l, index), page = c.table[ib * c.table_pages + slot / l.page];
      const int64_t place = (page * c.m + im) * (l.page / g) + slot % l.page / g;
      code_keys<kBits>(c, Rows<T>{k_rows, c.d}, place);
      code_values<kBits>(c, Rows<T>{v_rows, c.d}, place);
    }
  });
}

template <class T>
void copy_rows(const KvAppendParams& p) {
  const CacheRef& c = p.cache;
  const CacheLayout& l = c.layout;
  const int64_t s = p.k.size(1), window = l.residual + l.group;
  const size_t row = static_cast<size_t>(c.d) * sizeof(T);
  parallel_for(0, c.b * s, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t ib = task / s, is = task % s, old = c.length[ib], stop = old + p.count[ib];
      if (is >= p.count[ib]) continue;
      const int64_t position = old + is, index = position - l.sinks;
      const int64_t last = history_end(l, stop);
      T *k, *v;
      int64_t head;
      if (index < 0) {
        k = c.k_sink.ptr<T>(), v = c.v_sink.ptr<T>();
        const int64_t at = (ib * c.m * l.sinks + position) * c.d;
        k += at, v += at, head = l.sinks * c.d;
      } else if (l.bits) {
        if (index < last) continue;
        const int64_t at = (ib * c.m * window + index % window) * c.d;
        k = c.k_recent.ptr<T>() + at, v = c.v_recent.ptr<T>() + at, head = window * c.d;
      } else {
        if (index < history_begin(l, last)) continue;
        const int64_t slot = history_slot(l, index), page = c.table[ib * c.table_pages + slot / l.page];
        const int64_t at = (page * c.m * l.page + slot % l.page) * c.d;
        k = c.k_rows.ptr<T>() + at, v = c.v_rows.ptr<T>() + at, head = l.page * c.d;
      }
      for (int64_t im = 0; im < c.m; ++im) {
        memcpy(k + im * head, row_of<T>(p.k, ib, is, im), row);
        memcpy(v + im * head, row_of<T>(p.v, ib, is, im), row);
      }
    }
  });
}

template <class T>
void append(const KvAppendParams& p) {
  switch (p.cache.layout.bits) {
    case 2:
      code_groups<2, T>(p);
      break;
    case 4:
      code_groups<4, T>(p);
      break;
    case 8:
      code_groups<8, T>(p);
      break;
    default:
      break;
  }
  copy_rows<T>(p);
}

}  // namespace

void kv_append(const KvAppendParams& p) {
  switch (p.cache.dtype) {
    case Dtype::bf16:
      return append<bf16>(p);
    case Dtype::f16:
      return append<f16>(p);
    default:
      return append<float>(p);
  }
}

}  // namespace vk::VK_ISA
