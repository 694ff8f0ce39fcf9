// A piece: the neighbouring elements one thread moves at a time, as they lie in memory. 16 bytes where rows allow it.
#pragma once

#include "vkernels/device/math.h"

namespace vk::device {

struct alignas(8) HalfVector {
  uint32_t word[2];
};

namespace pieces {
template <class T, int kBytes>
struct Of {
  static_assert(kBytes == sizeof(T), "16, 8 or one element");
  using type = T;
};
template <class T>
struct Of<T, 16> {
  using type = Vector;
};
template <class T>
struct Of<T, 8> {
  using type = HalfVector;
};
}  // namespace pieces

template <class T, int kWidth>
using Piece = typename pieces::Of<T, kWidth* int(sizeof(T))>::type;

template <class T, int kWidth, Cache kCache = Cache::once>
VK_DEVICE Piece<T, kWidth> load_piece(const T* from) {
  using P = Piece<T, kWidth>;
  if constexpr (sizeof(P) == sizeof(Vector))
    return load16<kCache>(from);
  else
    return load(reinterpret_cast<const P*>(from));
}

template <class T, int kWidth>
VK_DEVICE void store_piece(T* to, const Piece<T, kWidth>& piece) {
  using P = Piece<T, kWidth>;
  if constexpr (sizeof(P) == sizeof(Vector))
    store16(to, piece);
  else
    store(reinterpret_cast<P*>(to), piece);
}

template <class T, int kWidth>
VK_DEVICE void widen_piece(const Piece<T, kWidth>& piece, float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    x[0] = widen_one(piece);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = bits_float(piece.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) widen_two(piece.word[i], x[2 * i], x[2 * i + 1], T{});
  }
}

template <class T, int kWidth>
VK_DEVICE Piece<T, kWidth> narrow_piece(const float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    return narrow_one<T>(x[0]);
  } else {
    Piece<T, kWidth> piece;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) piece.word[i] = float_bits(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) piece.word[i] = round_two(x[2 * i], x[2 * i + 1], T{});
    }
    return piece;
  }
}

// The same from and to addresses that are a multiple of nothing but an element.
template <class T, int kWidth>
VK_DEVICE Piece<T, kWidth> load_elements(const T* from) {
  T x[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = load(from + i);
  Piece<T, kWidth> piece;
  memcpy(&piece, x, sizeof piece);
  return piece;
}

template <class T, int kWidth>
VK_DEVICE void store_elements(T* to, const Piece<T, kWidth>& piece) {
  T x[kWidth];
  memcpy(x, &piece, sizeof piece);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) store(to + i, x[i]);
}

// The same number of floats that all blocks read: bias, weights of norms.
template <int kWidth>
VK_DEVICE void load_floats(const float* from, float (&x)[kWidth]) {
  constexpr int kStep = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    const auto piece = load_piece<float, kStep, Cache::keep>(from + i);
    float part[kStep];
    widen_piece<float, kStep>(piece, part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) x[i + j] = part[j];
  }
}

template <int kWidth>
VK_DEVICE void store_floats(float* to, const float (&x)[kWidth]) {
  constexpr int kStep = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    float part[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) part[j] = x[i + j];
    store_piece<float, kStep>(to + i, narrow_piece<float, kStep>(part));
  }
}

}  // namespace vk::device
