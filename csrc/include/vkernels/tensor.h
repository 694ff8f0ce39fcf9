// What a kernel sees of a tensor: a pointer, a dtype, sizes and strides in elements. No torch.
#pragma once

#include <array>
#include <cstdint>

namespace vk {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3, i64 = 4, u8 = 5, i8 = 6, f64 = 7, boolean = 8 };

struct TensorRef {
  static constexpr int kMaxRank = 8;

  bool given = false;  // an optional argument may be absent
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int rank = 0;
  std::array<int64_t, kMaxRank> sizes{};
  std::array<int64_t, kMaxRank> strides{};

  explicit operator bool() const { return given; }
  int64_t size(int i) const { return sizes[i < 0 ? i + rank : i]; }
  int64_t stride(int i) const { return strides[i < 0 ? i + rank : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= sizes[i];
    return n;
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace vk
