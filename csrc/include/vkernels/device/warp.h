// Values from other lanes of the warp. Every lane of `mask` calls with the same mask.
#pragma once

#include "vkernels/device/kernel.h"

namespace vk::device {

#if !defined(__CUDACC__)
namespace twin {

template <class T>
struct Shuffle {
  T value;
  int from;
  T result;
};

template <class T>
T shuffle(const char* what, uint32_t mask, T value, int from, Site site) {
  Shuffle<T> mine{value, from, value};
  emulated::meet_warp(what, false, site, mask, &mine, [](void* const(&brought)[32]) {
    for (void* b : brought) {
      if (!b) continue;
      auto& s = *static_cast<Shuffle<T>*>(b);
      if (!brought[s.from]) emulated::fail("a lane reads lane %d, which is not in the mask", s.from);
      s.result = static_cast<Shuffle<T>*>(brought[s.from])->value;
    }
  });
  return mine.result;
}

}  // namespace twin
#endif

// The value of lane `from` (taken modulo 32).
template <class T>
VK_DEVICE T shuffle(T value, int from, uint32_t mask = kWholeWarp, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_sync(mask, value, from);
#else
  return twin::shuffle("shuffle", mask, value, from & 31, site);
#endif
}

// The value of the lane whose index differs in the bits of `bits`.
template <class T>
VK_DEVICE T shuffle_xor(T value, int bits, uint32_t mask = kWholeWarp, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(mask, value, bits);
#else
  return twin::shuffle("shuffle_xor", mask, value, lane() ^ (bits & 31), site);
#endif
}

// The value of the lane `delta` above; the last lanes keep their own.
template <class T>
VK_DEVICE T shuffle_down(T value, int delta, uint32_t mask = kWholeWarp, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_down_sync(mask, value, static_cast<unsigned>(delta));
#else
  return twin::shuffle("shuffle_down", mask, value, lane() + delta < kWarp ? lane() + delta : lane(), site);
#endif
}

// Bit i: lane i said yes.
VK_DEVICE uint32_t ballot(bool yes, uint32_t mask = kWholeWarp, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __ballot_sync(mask, yes);
#else
  struct Vote {
    bool yes;
    uint32_t result;
  } mine{yes, 0};
  emulated::meet_warp("ballot", false, site, mask, &mine, [](void* const(&brought)[32]) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if (brought[i] && static_cast<Vote*>(brought[i])->yes) votes |= 1u << i;
    for (void* b : brought)
      if (b) static_cast<Vote*>(b)->result = votes;
  });
  return mine.result;
#endif
}

// Over the `kLanes` neighbouring lanes a lane belongs to, in one fixed order: the same bits on every lane.
template <int kLanes = kWarp>
VK_DEVICE float sum_over_lanes(float x, Site site = Site::here()) {
  for (int bits = kLanes / 2; bits > 0; bits /= 2) x += shuffle_xor(x, bits, kWholeWarp, site);
  return x;
}
// The same where the number of lanes, a power of two, is known only at run time.
VK_DEVICE float sum_over_group(float x, int lanes, Site site = Site::here()) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) x += shuffle_xor(x, bits, kWholeWarp, site);
  return x;
}
template <int kLanes = kWarp>
VK_DEVICE float max_over_lanes(float x, Site site = Site::here()) {
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    const float other = shuffle_xor(x, bits, kWholeWarp, site);
    x = other > x ? other : x;
  }
  return x;
}

#if !defined(__CUDACC__)
namespace twin {

inline int reduce(const char* what, int x, bool largest, Site site) {
  struct Extreme {
    int value;
    bool largest;
  } mine{x, largest};
  emulated::meet_warp(what, true, site, kWholeWarp, &mine, [](void* const(&brought)[32]) {
    Extreme all = *static_cast<Extreme*>(brought[0]);
    for (void* b : brought) {
      const int value = static_cast<Extreme*>(b)->value;
      if (all.largest ? value > all.value : value < all.value) all.value = value;
    }
    for (void* b : brought) *static_cast<Extreme*>(b) = all;
  });
  return mine.value;
}

}  // namespace twin
#endif

// Of integers, over the whole warp.
VK_DEVICE int min_over_warp(int x, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __reduce_min_sync(kWholeWarp, x);
#else
  return twin::reduce("min_over_warp", x, false, site);
#endif
}
VK_DEVICE int max_over_warp(int x, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __reduce_max_sync(kWholeWarp, x);
#else
  return twin::reduce("max_over_warp", x, true, site);
#endif
}

}  // namespace vk::device
