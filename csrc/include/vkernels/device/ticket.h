// How blocks of one launch learn that the others are done: each draws a ticket.
#pragma once

#include "vkernels/device/memory.h"
#include "vkernels/device/sync.h"

namespace vk::device {

// The counter's value before this draw. Whatever the drawing thread knows to be written is visible to who draws later.
VK_DEVICE int draw_ticket(int* counter) {
#if defined(__CUDACC__)
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  emulated::check_global(counter, sizeof *counter);
  return (*counter)++;
#endif
}

// Whether the other `blocks` - 1 blocks that count on `counter` have come here before: then the whole block may read
// what they stored. The last one leaves the counter at 0. `flag` is an int of the block's shared memory.
//
// PTX memory model: the stores of a block's threads happen before the barrier's end, hence before the one thread's
// ticket, which releases them to the GPU (a release is cumulative); whoever draws after it acquires them, and the
// second barrier carries that to all threads of the block.
VK_DEVICE bool last_to_come(int* counter, int blocks, int* flag) {
  sync_block();
  if (thread_index() == 0) {
    const bool last = draw_ticket(counter) == blocks - 1;
    if (last) store(counter, 0);
    store_shared(flag, int(last));
  }
  sync_block();
  return load_shared(flag) != 0;
}

}  // namespace vk::device
