// Kernels with a mistake a GPU would not report, and the same kernels without it: the emulator must tell them apart.
#include "bind.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/warp.h"

namespace vk {
namespace {

using namespace device;

struct Fault {
  const float* from;  // 64
  float* to;          // 64
  bool planted;
};

// Neighbours swapped through shared memory, twice in a row.
VK_KERNEL(64) missing_barrier(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  store_shared(shared + i, load(f.from + i));
  if (!f.planted) sync_block();
  store(f.to + i, load_shared(shared + 63 - i));
}

// The second round fills the memory others may still read.
VK_KERNEL(64) barrier_before_reuse(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    store_shared(shared + i, load(f.from + i) * float(round + 1));
    sync_block();
    sum += load_shared(shared + 63 - i);
    if (!f.planted) sync_block();
  }
  store(f.to + i, sum);
}

VK_KERNEL(64) warp_barrier(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  store_shared(shared + i, load(f.from + i));
  if (!f.planted) sync_warp();
  store(f.to + i, load_shared(shared + (i ^ 1)));
}

// One warp hands over to the other through a named barrier.
VK_KERNEL(64) named_barrier(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  if (warp() == 1) {
    store_shared(shared + i, load(f.from + i));
    arrive_at_barrier(1, 64);
    store(f.to + i, load(f.from + i));
  } else {
    if (!f.planted) sync_barrier(1, 64);
    store(f.to + i, load_shared(shared + 32 + i));
    if (f.planted) sync_barrier(1, 64);
  }
}

VK_KERNEL(64) uncommitted_copy(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  if (i < 16) copy_async16(shared + 4 * i, f.from + 4 * i);
  if (!f.planted) commit_copies();
  wait_for_copies<0>();
  sync_block();
  store(f.to + i, load_shared(shared + i));
}

VK_KERNEL(64) copy_not_waited_for(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  for (int half = 0; half < 2; ++half) {
    if (i < 8) copy_async16(shared + 32 * half + 4 * i, f.from + 32 * half + 4 * i);
    commit_copies();
  }
  f.planted ? wait_for_copies<1>() : wait_for_copies<0>();
  sync_block();
  store(f.to + i, load_shared(shared + i));
}

VK_KERNEL(64) outside_shared(Fault f) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  store_shared(shared + i + (f.planted ? 1 : 0), load(f.from + i));
  sync_block();
  store(f.to + i, load_shared(shared + i));
}

// Past the checks of store_shared: found in the red zone, or by AddressSanitizer.
VK_KERNEL(64) outside_shared_unseen(Fault f) {
  volatile float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  if (f.planted && i == 63) shared[64] = 1.0f;
  store(f.to + i, load(f.from + i));
}

VK_KERNEL(64) outside_global(Fault f) {
  const int i = thread_index();
  const float next = f.planted || i < 63 ? load(f.from + i + 1) : 0.0f;
  store(f.to + i, load(f.from + i) + 0.0f * next);
}

VK_KERNEL(64) misaligned(Fault f) {
  const int i = thread_index();
  if (i < 15) store16(f.to + 4 * i, load16(f.from + 4 * i + (f.planted ? 2 : 0)));
  if (i >= 60) store(f.to + i, load(f.from + i));
}

// A barrier only half of the block comes to.
VK_KERNEL(64) divergent_barrier(Fault f) {
  const int i = thread_index();
  if (!f.planted || i % 2) sync_block();
  if (f.planted && !(i % 2)) sync_block();
  store(f.to + i, load(f.from + i));
}

VK_KERNEL(64) left_before_barrier(Fault f) {
  const int i = thread_index();
  store(f.to + i, load(f.from + i));
  if (f.planted && i == 5) return;
  sync_block();
}

VK_KERNEL(64) divergent_shuffle(Fault f) {
  const int i = thread_index();
  const float x = load(f.from + i);
  if (f.planted && lane() == 3)
    store(f.to + i, shuffle_xor(x, 0));
  else
    store(f.to + i, f.planted ? shuffle(x, lane()) : shuffle_xor(x, 0));
}

VK_KERNEL(64) mismatched_masks(Fault f) {
  const int i = thread_index();
  const uint32_t mask = f.planted && lane() == 7 ? 0x0000ffffu : kWholeWarp;
  store(f.to + i, shuffle_xor(load(f.from + i), 0, mask));
}

VK_KERNEL(64) lane_outside_its_mask(Fault f) {
  const int i = thread_index();
  store(f.to + i, shuffle_xor(load(f.from + i), 0, f.planted ? 0x0000ffffu : kWholeWarp));
}

// Half of a warp multiplies elsewhere: fine for shuffles, not for instructions of the whole warp.
VK_KERNEL(64) divergent_matrix(Fault f) {
  const int i = thread_index();
  FragmentA a{};
  FragmentB b{};
  FragmentC c{};
  if (f.planted && lane() < 16)
    multiply_add<bf16>(c, a, b);
  else
    multiply_add<bf16>(c, a, b);
  store(f.to + i, load(f.from + i) + c.value[0]);
}

// Ones times the identity's first column, whose row index the planted kernel takes from the wrong lane bits.
VK_KERNEL(64) wrong_fragment_lane(Fault f) {
  const int i = thread_index();
  FragmentA a{};
  FragmentB b{};
  FragmentC c{};
  const auto one = [](bool yes) { return yes ? 0x3f80u : 0u; };
  for (int e = 0; e < 8; ++e) {
    const int row = f.planted ? lane() % 8 + (e / 2 % 2 ? 8 : 0) : FragmentA::row(lane(), e);
    a.reg[e / 2] |= one(row == FragmentA::column(lane(), e)) << (e % 2 * 16);
  }
  for (int e = 0; e < 4; ++e) {
    const float x = load(f.from + FragmentB::row(lane(), e));
    b.reg[e / 2] |= uint32_t(from_float<bf16>(x).bits) << (e % 2 * 16);
  }
  multiply_add<bf16>(c, a, b);
  for (int e = 0; e < 4; ++e)
    if (FragmentC::column(lane(), e) == 0 && warp() == 0) store(f.to + FragmentC::row(lane(), e), c.value[e]);
  if (i >= 16) store(f.to + i, load(f.from + i));
}

VK_KERNEL(64) tail_off_by_one(Fault f) {
  const int i = thread_index(), end = f.planted ? 63 : 64;
  if (i < end) store(f.to + i, load(f.from + i));
}

// Waits for a barrier nobody else will come to.
VK_KERNEL(64) deadlock(Fault f) {
  const int i = thread_index();
  if (f.planted && warp() == 0) sync_barrier(2, 64);
  store(f.to + i, load(f.from + i));
}

}  // namespace

void bind_faults(py::module_& m) {
  py::dict faults;
  const auto add = [&](const char* name, void (*kernel)(Fault)) {
    faults[name] = py::cpp_function([=](TensorRef from, TensorRef to, bool planted) {
      launch(name, kernel, {1, 1, 64, 64 * sizeof(float)}, device::Stream{0, nullptr},
             Fault{from.ptr<const float>(), to.ptr<float>(), planted});
    });
  };
#define VK_FAULT(name) add(#name, name);
  VK_FAULT(missing_barrier)
  VK_FAULT(barrier_before_reuse)
  VK_FAULT(warp_barrier)
  VK_FAULT(named_barrier)
  VK_FAULT(uncommitted_copy)
  VK_FAULT(copy_not_waited_for)
  VK_FAULT(outside_shared)
  VK_FAULT(outside_shared_unseen)
  VK_FAULT(outside_global)
  VK_FAULT(misaligned)
  VK_FAULT(divergent_barrier)
  VK_FAULT(left_before_barrier)
  VK_FAULT(divergent_shuffle)
  VK_FAULT(mismatched_masks)
  VK_FAULT(lane_outside_its_mask)
  VK_FAULT(divergent_matrix)
  VK_FAULT(wrong_fragment_lane)
  VK_FAULT(tail_off_by_one)
  VK_FAULT(deadlock)
#undef VK_FAULT
  m.attr("faults") = faults;
}

}  // namespace vk
