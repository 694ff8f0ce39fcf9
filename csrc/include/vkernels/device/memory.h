// Global and shared memory. Kernels touch global memory only through load and store: the twins check every address.
#pragma once

#include "vkernels/device/kernel.h"

namespace vk::device {

// What one thread moves at a time.
struct alignas(16) Vector {
  uint32_t word[4];
};

template <class T>
inline constexpr int kLanesOf = 16 / sizeof(T);

// How an access treats the caches: once = do not keep it in L1, another thread does not need it.
enum class Cache { keep, once };

template <class T>
VK_DEVICE T load(const T* from) {
#if !defined(__CUDACC__)
  emulated::check_global(from, sizeof(T));
#endif
  return *from;
}

template <class T>
VK_DEVICE void store(T* to, T value) {
#if !defined(__CUDACC__)
  emulated::check_global(to, sizeof(T));
#endif
  *to = value;
}

// 16 bytes from a 16-byte address. Coherent (not ld.global.nc), so a kernel may write what it reads.
template <Cache kCache = Cache::once>
VK_DEVICE Vector load16(const void* from) {
  Vector v;
#if defined(__CUDACC__)
  if constexpr (kCache == Cache::once)
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(from)
                 : "memory");
  else
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(from)
                 : "memory");
#else
  emulated::check_global(from, sizeof v);
  memcpy(&v, from, sizeof v);
#endif
  return v;
}

template <Cache kCache = Cache::keep>
VK_DEVICE void store16(void* to, const Vector& v) {
#if defined(__CUDACC__)
  if constexpr (kCache == Cache::once)
    asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
#else
  emulated::check_global(to, sizeof v);
  memcpy(to, &v, sizeof v);
#endif
}

// The block's dynamic shared memory; its size is part of the launch. Uninitialised (poisoned in the emulator).
VK_DEVICE char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 vk_shared[];
  return reinterpret_cast<char*>(vk_shared);
#else
  return emulated::self().shared;
#endif
}

template <class T>
VK_DEVICE T load_shared(const T* from) {
#if !defined(__CUDACC__)
  emulated::check_shared(from, sizeof(T));
#endif
  return *from;
}

template <class T>
VK_DEVICE void store_shared(T* to, const T& value) {
#if !defined(__CUDACC__)
  emulated::check_shared(to, sizeof(T));
#endif
  *to = value;
}

#if defined(__CUDACC__)
VK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

}  // namespace vk::device
