// Packed codes (vkernels/quantize.h) on their way into a tensor core: unpacked in registers, two at a time.
//
// A unit is 32 neighbours along the axis a product sums over, kBits words of one lane of the storage. The four threads
// of a quad share it: thread t holds members 4 spread(2 t) + i and 4 spread(2 t + 1) + i, i < 4, as four pairs, which
// is how they come out of a word with one instruction each: 16 bits apart in it. In a fragment, pair i is the elements
// (2 t, 2 t + 1) of step i / 2, eight further for odd i; so whatever a product puts beside codes (queries, weights,
// scales) follows the same order, and the row that holds element g of step i / 2 is member 4 spread(g) + i.
#pragma once

#include "vkernels/device/math.h"

namespace vk::device {

// Bytes of the eight of {low, high}, four times, by the nibbles of `pick`: 0..3 are those of `low`, 4..7 of `high`.
VK_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t pick) {
#if defined(__CUDACC__)
  return __byte_perm(low, high, pick);
#else
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (8 * (pick >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return out;
#endif
}

// a b + c on pairs of float16, rounded once.
VK_DEVICE uint32_t multiply_add_two(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  const auto at = [](uint32_t x, int i) { return double(to_float(f16{uint16_t(x >> (16 * i))})); };
  const auto one = [&](int i) { return f16_bits(float(at(a, i) * at(b, i) + at(c, i))); };
  return one(0) | uint32_t(one(1)) << 16;
#endif
}

// word & kMask | kOr: one instruction, which the compiler does not always make of it.
template <uint32_t kMask, uint32_t kOr>
VK_DEVICE uint32_t pick_bits(uint32_t word) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "n"(kMask), "n"(kOr));
  return r;
#else
  return (word & kMask) | kOr;
#endif
}

// The same float16 in both halves; x has to be one.
VK_HD uint32_t twice(float x) { return f16_bits(x) * 0x10001u; }

// Element i of each of two vectors, as a pair.
VK_DEVICE uint32_t pair_of(const uint32_t* a, const uint32_t* b, int i) {
  return permute_bytes(a[i / 2], b[i / 2], i % 2 ? 0x7632 : 0x5410);
}

template <int kBits>
struct Codes {
  static_assert(kBits == 8 || kBits == 4 || kBits == 2, "the packed widths");
  static constexpr int kUnit = 32;
  static constexpr int kWords = kBits == 8 ? 2 : 1;  // that a thread unpacks of a unit
  static constexpr float kMiddle = 1 << (kBits - 1);

  // Which four members of a unit, 4 spread(g) .. 4 spread(g) + 3, row g of a fragment holds.
  VK_HD int spread(int g) { return kBits == 2 ? g / 4 * 4 + g / 2 % 2 + g % 2 * 2 : g; }
  // Where a member stands once the pairs of threads 0 .. 3 follow one another (`spread` is its own inverse).
  VK_HD int order(int member) {
    const int g = spread(member / 4);
    return g / 2 * 8 + member % 4 * 2 + g % 2;
  }
};

// (code - middle) / 2 of a thread's four pairs: exact in float16. As integers below 1024 are the last bits of the
// float16 numbers from 1024 on, a mask makes them numbers, and one product moves them to their place.
template <int kBits>
VK_DEVICE void unpack(const uint32_t (&word)[Codes<kBits>::kWords], int thread, uint32_t (&pair)[4]) {
  constexpr uint32_t k1024 = 0x64006400u;
  constexpr float kHalfMiddle = Codes<kBits>::kMiddle / 2;
  const auto halved = [](uint32_t raised, float place) {  // 1024 + place code
    return multiply_add_two(raised, twice(0.5f / place), twice(-512.0f / place - kHalfMiddle));
  };
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = permute_bytes(word[0], word[1], i < 2 ? 0x5140 : 0x7362);  // bytes i of both words, and more
      pair[i] = halved(permute_bytes(two, k1024, i % 2 ? 0x7372 : 0x7170), 1.0f);
    }
  } else if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t mine = word[0] >> (4 * i);
      pair[i] = halved(pick_bits<0x000f000fu, k1024>(mine), 1.0f);
      pair[i + 1] = halved(pick_bits<0x00f000f0u, k1024>(mine), 16.0f);
    }
  } else {
    const uint32_t mine = word[0] >> (8 * (thread % 2));
    pair[0] = halved(pick_bits<0x00030003u, k1024>(mine), 1.0f);
    pair[1] = halved(pick_bits<0x000c000cu, k1024>(mine), 4.0f);
    pair[2] = halved(pick_bits<0x00300030u, k1024>(mine), 16.0f);
    pair[3] = halved(pick_bits<0x00c000c0u, k1024>(mine), 64.0f);
  }
}

// Half of what the codes of a thread's pairs stand for, delta code + zero, is delta (code - middle) / 2 + centre.
struct PairScale {
  uint32_t delta[4], centre[4];
};

// `delta` and `zero`: the unit's 32 members, in shared memory. In halves, as zero + delta code may just exceed float16.
template <int kBits>
VK_DEVICE PairScale load_pair_scale(const f16* delta, const f16* zero, int thread) {
  struct alignas(8) Four {
    uint32_t word[2];
  };
  const auto four = [&](const f16* from, int g) {
    return load_shared(reinterpret_cast<const Four*>(from + 4 * Codes<kBits>::spread(g)));
  };
  const Four deltas[2] = {four(delta, 2 * thread), four(delta, 2 * thread + 1)};
  const Four zeros[2] = {four(zero, 2 * thread), four(zero, 2 * thread + 1)};
  PairScale scale;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale.delta[i] = pair_of(deltas[0].word, deltas[1].word, i);
    const uint32_t half = multiply_add_two(pair_of(zeros[0].word, zeros[1].word, i), twice(0.5f), 0);
    scale.centre[i] = multiply_add_two(scale.delta[i], twice(Codes<kBits>::kMiddle / 2), half);
  }
  return scale;
}

// Halves of the values of four pairs.
template <int kBits>
VK_DEVICE void decode_pairs(const uint32_t (&word)[Codes<kBits>::kWords], int thread, const PairScale& scale,
                            uint32_t (&pair)[4]) {
  unpack<kBits>(word, thread, pair);
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = multiply_add_two(pair[i], scale.delta[i], scale.centre[i]);
}

}  // namespace vk::device
