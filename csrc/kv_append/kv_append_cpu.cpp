// Tokens into a KV cache. First every group that is now complete becomes codes (one task per sequence, head and group;
// its tokens come from the recent window or from the call), then the rows of sinks, history and window are copied: a
// window slot may hold a token that the first step still reads.
#include "kv_append.h"
#include "vkernels/cpu/parallel.h"
#include "vkernels/cpu/simd.h"

namespace vk::VK_ISA {
namespace {

constexpr int kMostTokens = 128, kMostChannels = 256;

VK_INLINE f32v clamped(f32v x) { return min(splat(kHalfMax), max(splat(-kHalfMax), x)); }  // keeps NaN
VK_INLINE i32v code(f32v x, f32v zero, f32v inverse, f32v top) {
  const f32v magic = splat(12582912.0f);                            // 1.5 * 2^23: adding it rounds to an integer
  const f32v t = min(max((x - zero) * inverse, splat(0.0f)), top);  // NaN becomes 0
  return (i32v)(t + magic) - (i32v)magic;
}

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

template <int kBits, class T>
void code_keys(const CacheRef& c, const T* const* rows, int64_t place) {
  const int64_t g = c.layout.group, d = c.d, words = code_words(d, kBits);
  alignas(64) uint8_t bytes[kMostTokens * kMostChannels];
  const int64_t row = c.d_pad();
  f16* delta = c.k_scale.ptr<f16>() + place * 2 * d;
  f16* zero = delta + d;
  for (int64_t j = 0; j < row; j += kLanes) {
    const int64_t count = d - j;
    if (count <= 0) {
      for (int64_t t = 0; t < g; ++t) memset(bytes + t * row + j, 0, kLanes);
      continue;
    }
    f32v low = splat(kHalfMax), high = splat(-kHalfMax);
    i32v nan{};
    for (int64_t t = 0; t < g; ++t) {
      const f32v x = clamped(load(rows[t] + j, count));
      low = min(x, low);
      high = max(x, high);
      nan |= x != x;
    }
    f32v z{}, inverse{};
    for (int64_t i = 0; i < kLanes && i < count; ++i) {
      const float bad = std::numeric_limits<float>::quiet_NaN();
      const QuantScale s = quant_scale(nan[i] ? bad : low[i], nan[i] ? bad : high[i], kBits);
      delta[j + i] = s.delta;
      zero[j + i] = s.zero;
      z[i] = s.zero_value;
      inverse[i] = s.inverse;
    }
    const f32v top = splat(float((1 << kBits) - 1));
    for (int64_t t = 0; t < g; ++t) {
      typedef uint8_t u8v __attribute__((vector_size(kLanes)));
      const u8v q = __builtin_convertvector(code(clamped(load(rows[t] + j, count)), z, inverse, top), u8v);
      memcpy(bytes + t * row + j, &q, sizeof q);
    }
  }
  int32_t* to = c.k_codes.ptr<int32_t>() + place * words * g;
  for (int64_t w = 0; w < words; ++w)
    for (int64_t t = 0; t < g; ++t)
      to[w * g + t] = static_cast<int32_t>(pack_bytes<kBits>(bytes + t * row + w * (32 / kBits)));
}

template <int kBits, class T>
void code_values(const CacheRef& c, const T* const* rows, int64_t place) {
  constexpr int kPer = 32 / kBits;
  const int64_t g = c.layout.group, d = c.d, d_pad = c.d_pad(), groups = c.channel_groups();
  f16* delta = c.v_scale.ptr<f16>() + place * 2 * groups * g;
  f16* zero = delta + groups * g;
  int32_t* to = c.v_codes.ptr<int32_t>() + place * code_words(g, kBits) * d_pad;
  float z[kMostTokens], inverse[kMostTokens];
  const f32v top = splat(float((1 << kBits) - 1));
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t begin = i * g, end = begin + g < d ? begin + g : d, padded = end == d ? d_pad : end;
    for (int64_t t = 0; t < g; ++t) {
      f32v low = splat(kHalfMax), high = splat(-kHalfMax), nan{};
      for (int64_t j = begin; j < end; j += kLanes) {
        const i32v inside = iota() < splat(static_cast<int32_t>(end - j));
        const f32v x = clamped(load(rows[t] + j, end - j));
        low = inside ? min(x, low) : low;
        high = inside ? max(x, high) : high;
        nan = inside ? nan + x * 0.0f : nan;
      }
      const float bad = reduce_add(nan);  // 0, or NaN
      const QuantScale s = quant_scale(-reduce_max(-low) + bad, reduce_max(high) + bad, kBits);
      delta[i * g + t] = s.delta;
      zero[i * g + t] = s.zero;
      z[t] = s.zero_value;
      inverse[t] = s.inverse;
    }
    for (int64_t t = 0; t < g; t += kPer)
      for (int64_t j = begin; j < padded; j += kLanes) {
        u32v word{};
        if (j < end)
          for (int k = 0; k < kPer; ++k) {
            const f32v x = clamped(load(rows[t + k] + j, end - j));
            word |= (u32v)code(x, splat(z[t + k]), splat(inverse[t + k]), top) << (kBits * k);
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
  parallel_for(0, c.b * most * c.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t ib = task / (most * c.m), im = task % c.m, old = c.length[ib];
      const int64_t index = (first_group(ib) + task / c.m % most) * g;
      if (index >= history_end(l, old + p.count[ib])) continue;
      const T *k_rows[kMostTokens], *v_rows[kMostTokens];
      for (int64_t t = 0; t < g; ++t) {
        const int64_t position = index + t + l.sinks;
        if (position >= old) {
          k_rows[t] = row_of<T>(p.k, ib, position - old, im);
          v_rows[t] = row_of<T>(p.v, ib, position - old, im);
        } else {
          const int64_t at = ((ib * c.m + im) * window + (index + t) % window) * c.d;
          k_rows[t] = c.k_recent.ptr<const T>() + at;
          v_rows[t] = c.v_recent.ptr<const T>() + at;
        }
      }
      const int64_t slot = history_slot(l, index), page = c.table[ib * c.table_pages + slot / l.page];
      const int64_t place = (page * c.m + im) * (l.page / g) + slot % l.page / g;
      code_keys<kBits>(c, k_rows, place);
      code_values<kBits>(c, v_rows, place);
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
