// Every function of csrc/include/vkernels/device/, for nvcc: a test looks the instructions up in the machine code.
#include "vkernels/device/codes.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/math.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/ticket.h"
#include "vkernels/device/warp.h"

namespace vk::device {

struct Everything {
  char* memory;
};

template <class T>
VK_DEVICE void tensor_cores(const Everything& e) {
  FragmentA a;
  FragmentB b;
  FragmentC c{};
  load_matrices(a.reg, shared_memory() + 16 * lane());
  load_matrices<true>(b.reg, shared_memory() + 16 * lane());
  multiply_add<T>(c, a, b);
  load_matrices<true>(a.reg, shared_memory() + 16 * lane());
  load_matrices(b.reg, shared_memory() + 16 * lane());
  multiply_add<T>(c, a, b);
  multiply_add<T>(c, transpose_matrix(as_operand<T>(c, c)), b);
  for (int i = 0; i < 4; ++i) store(reinterpret_cast<float*>(e.memory) + 4 * thread_index() + i, c.value[i]);
}

VK_DEVICE void codes(const Everything& e) {
  const uint32_t word[2] = {load(reinterpret_cast<const uint32_t*>(e.memory)),
                            load(reinterpret_cast<const uint32_t*>(e.memory) + 1)};
  uint32_t pair[4];
  unpack<8>(word, lane() % 4, pair);
  const uint32_t turned = transpose_matrix(multiply_add_two(pair[0], pair[1], pair[2] ^ pair[3]));
  if (last_to_come(reinterpret_cast<int*>(e.memory), 7, reinterpret_cast<int*>(shared_memory())))
    store(reinterpret_cast<uint32_t*>(e.memory) + thread_index(), turned);
}

VK_KERNEL(256) every_instruction(Everything e) {
  codes(e);
  copy_async16(shared_memory() + 16 * thread_index(), e.memory + 16 * thread_index(), warp());
  commit_copies();
  wait_for_copies<1>();
  wait_for_copies<0>();
  sync_block();
  sync_barrier(1, thread_count());
  arrive_at_barrier(2, 64);
  sync_warp();
  tensor_cores<bf16>(e);
  tensor_cores<f16>(e);
  store16<Cache::once>(e.memory + 16 * thread_index(), load16<Cache::once>(e.memory + 64 * block_x()));
  store16<Cache::keep>(e.memory + 32 * thread_index(), load16<Cache::keep>(e.memory + 64 * block_y() * blocks_x()));
  float x = load_shared(reinterpret_cast<const float*>(shared_memory()) + thread_index());
  x = exp2_fast(x) + log2_fast(x) + shuffle(x, 3) + shuffle_down(x, 1) + sum_over_lanes(x) + max_over_lanes<4>(x);
  x += float(ballot(x > 0));
  x += float(min_over_warp(thread_index() ^ 5) + max_over_warp(thread_index() ^ 9));
  float eight[8], sixteen[8];
  widen<bf16>(load16(e.memory), eight);
  widen<f16>(load16(e.memory + 16), sixteen);
  for (int i = 0; i < 8; ++i) eight[i] += sixteen[i] + widen_one(narrow_one<f16>(x)) + widen_one(narrow_one<bf16>(x));
  store16(e.memory, narrow<bf16>(eight));
  store16(e.memory + 16, narrow<f16>(eight));
}

void launch_everything(char* memory) {
  launch("every_instruction", every_instruction, {1, 1, 256, 65536}, {0, nullptr}, Everything{memory});
}

}  // namespace vk::device
