// One source, several instruction sets. A file named *_cpu.cpp is compiled once per instruction set with
// -DVK_ISA=<name>; everything it defines lives in namespace vk::<name>. The choice is made once, at the first call.
// amx is avx512_bf16 where kernels that have them use matrix tiles (products.h): one compilation serves both.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__)
#define VK_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16) X(amx)
#else
#define VK_FOR_EACH_ISA(X) X(baseline)
#endif

namespace vk {

#define VK_ISA_NAME(name) name,
enum class Isa { VK_FOR_EACH_ISA(VK_ISA_NAME) };
#undef VK_ISA_NAME

Isa active_isa();                       // VKERNELS_CPU_ISA, else the best one this processor runs
std::vector<std::string> isa_names();   // compiled in, weakest first
std::vector<std::string> isa_usable();  // of those, the ones this processor runs
std::string isa_name(Isa isa);
void force_isa(const std::string& name);  // throws std::invalid_argument on an unknown or unusable name

// Declares `signature` in every instruction set's namespace.
#if defined(__x86_64__)
#define VK_DECLARE_KERNEL(...) \
  namespace baseline {         \
  __VA_ARGS__;                 \
  }                            \
  namespace avx2 {             \
  __VA_ARGS__;                 \
  }                            \
  namespace avx512 {           \
  __VA_ARGS__;                 \
  }                            \
  namespace avx512_bf16 {      \
  __VA_ARGS__;                 \
  }
#define VK_DISPATCH(function, ...)                       \
  [&] {                                                  \
    switch (::vk::active_isa()) {                        \
      case ::vk::Isa::amx:                               \
      case ::vk::Isa::avx512_bf16:                       \
        return ::vk::avx512_bf16::function(__VA_ARGS__); \
      case ::vk::Isa::avx512:                            \
        return ::vk::avx512::function(__VA_ARGS__);      \
      case ::vk::Isa::avx2:                              \
        return ::vk::avx2::function(__VA_ARGS__);        \
      default:                                           \
        return ::vk::baseline::function(__VA_ARGS__);    \
    }                                                    \
  }()
#else
#define VK_DECLARE_KERNEL(...) \
  namespace baseline {         \
  __VA_ARGS__;                 \
  }
#define VK_DISPATCH(function, ...) ::vk::baseline::function(__VA_ARGS__)
#endif

}  // namespace vk
