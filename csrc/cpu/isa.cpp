#include "vkernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vk {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

// Tiles of bf16, and the system's leave to use them: their 8 KiB of registers are given to a process that asks.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // of leaf 7, edx
  constexpr long kAskFor = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

bool usable(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512vbmi");
    case Isa::amx: {
      static const bool tiles = has_tiles();
      return tiles && usable(Isa::avx512_bf16);
    }
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

int index_of(const std::string& name) {
  const std::vector<std::string> names = isa_names();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<int>(i);
  std::string known;
  for (const std::string& n : names) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("isa: name must be one of " + known + ", got " + name);
}

int best() {
  if (const char* forced = std::getenv("VKERNELS_CPU_ISA"); forced && *forced) {
    const int index = index_of(forced);
    if (!usable(static_cast<Isa>(index)))
      throw std::invalid_argument(std::string("isa: VKERNELS_CPU_ISA must name what this processor runs, got ") +
                                  forced);
    return index;
  }
  int index = static_cast<int>(isa_names().size()) - 1;
  while (!usable(static_cast<Isa>(index))) --index;
  return index;
}

}  // namespace

std::vector<std::string> isa_names() {
#define VK_ISA_TEXT(name) #name,
  return {VK_FOR_EACH_ISA(VK_ISA_TEXT)};
#undef VK_ISA_TEXT
}

std::vector<std::string> isa_usable() {
  std::vector<std::string> names;
  const std::vector<std::string> all = isa_names();
  for (size_t i = 0; i < all.size(); ++i)
    if (usable(static_cast<Isa>(i))) names.push_back(all[i]);
  return names;
}

std::string isa_name(Isa isa) { return isa_names()[static_cast<size_t>(isa)]; }

Isa active_isa() {
  int index = chosen.load(std::memory_order_relaxed);
  if (index == kUnset) chosen.store(index = best(), std::memory_order_relaxed);
  return static_cast<Isa>(index);
}

void force_isa(const std::string& name) {
  const int index = index_of(name);
  if (!usable(static_cast<Isa>(index)))
    throw std::invalid_argument("isa: name must be one this processor runs, got " + name);
  chosen.store(index, std::memory_order_relaxed);
}

}  // namespace vk
