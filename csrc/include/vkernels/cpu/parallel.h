// Threads are torch's: two of its C functions are handed over at import, so torch.set_num_threads() holds here too and
// no second pool exists. Without them everything runs on the calling thread. Bodies must not throw.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace vk {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

void set_torch_threads(void* torch_parallel_for, void* torch_get_num_threads);
int num_threads();
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

// 64-byte aligned memory of the calling thread, kept between calls and grown on demand. Users that are live at the same
// time take different slots.
inline constexpr int kScratchSlots = 8;
void* scratch(int slot, size_t bytes);

// Asks the system to back this memory with huge pages where it can; changes nothing else. Inner whole pages only.
void advise_huge_pages(void* data, size_t bytes);

// body(begin, end): contiguous pieces of at least `grain`; for work that is even.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  run_parallel(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(task): threads take the next task when they finish one; for work that is uneven. Order the longest first.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, tasks < num_threads() ? tasks : num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(task);
  });
}

}  // namespace vk
