// What the C++ twins ask of the emulator (tests/cuda/fibres.cpp). Never part of the shipped library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vk::device {
struct Site;
}

namespace vk::emulated {

// The running fibre's place in block and grid, and its block's shared memory.
struct Self {
  int thread, threads;
  int64_t block_x, block_y, blocks_x, blocks_y;
  char* shared;
  size_t shared_bytes;
};
const Self& self();

// Stops the kernel; the launch throws `what` with the kernel, the block and the thread in front of it.
[[noreturn]] void fail(const char* what, ...) __attribute__((format(printf, 1, 2)));

// The lanes of `mask` meet. Once all of them are here, `complete` gets what each brought (null outside the mask) and
// all go on. An aligned instruction must be the same one, at the same place, for all of them.
using Complete = void (*)(void* const (&brought)[32]);
void meet_warp(const char* what, bool aligned, device::Site site, uint32_t mask, void* brought, Complete complete);

// Barrier `index` of the block; it opens when `threads` have arrived (all of them: 0). Waits for that, or only arrives.
void meet_block(int index, int threads, bool wait, device::Site site);

// Refuses an access that is not aligned to its size or lies outside the tensors of the call, or outside the block's
// shared memory. A call that named no tensors may go anywhere.
void check_global(const void* address, size_t bytes);
void check_shared(const void* address, size_t bytes);

// A copy of `bytes` bytes, zeros past `valid`. It lands when its group is waited for, and not before: until then the
// target holds poison.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid);
void commit_copies();
void wait_for_copies(int groups_left);

// Runs one block after the other on this thread.
struct Shape {
  int64_t x, y;
  int threads;
  size_t shared_bytes;
};
void run(const char* kernel, const Shape& shape, void (*body)(const void*), const void* arguments);

// In which order the threads of a block take their turns: mixed takes one of the first three by the block's
// index and size.
enum class Order : int { forward = 0, backward = 1, shuffled = 2, mixed = 3 };

}  // namespace vk::emulated
