#include "vkernels/cpu/parallel.h"

#include <cstdlib>
#include <new>

#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vk {
namespace {

int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, RangeFunction, void*) = nullptr;
int32_t (*torch_get_num_threads)(uint32_t*) = nullptr;

struct Scratch {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~Scratch() {
    for (int slot = 0; slot < kScratchSlots; ++slot) give_back(slot);
  }
  void give_back(int slot);
};
thread_local Scratch thread_scratch;
std::atomic<int64_t> held{0};

void Scratch::give_back(int slot) {
  std::free(data[slot]);
  data[slot] = nullptr;
  held -= static_cast<int64_t>(bytes[slot]);
  bytes[slot] = 0;
}

}  // namespace

void set_torch_threads(void* parallel_for, void* get_num_threads) {
  torch_parallel_for = reinterpret_cast<decltype(torch_parallel_for)>(parallel_for);
  torch_get_num_threads = reinterpret_cast<decltype(torch_get_num_threads)>(get_num_threads);
}

int num_threads() {
  uint32_t count = 1;
  if (torch_get_num_threads) torch_get_num_threads(&count);
  return count > 0 ? static_cast<int>(count) : 1;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  if (torch_parallel_for && end - begin > grain)
    torch_parallel_for(begin, end, grain, function, context);
  else
    function(begin, end, context);
}

void* scratch(int slot, size_t bytes) {
  Scratch& s = thread_scratch;
  if (s.bytes[slot] < bytes) {
    s.give_back(slot);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    s.data[slot] = std::aligned_alloc(64, rounded);
    if (!s.data[slot]) throw std::bad_alloc();
    s.bytes[slot] = rounded;
    held += static_cast<int64_t>(rounded);
  }
  return s.data[slot];
}

int64_t scratch_bytes() { return held; }

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vk
