// Runs CUDA kernels on the CPU: the threads of a block are fibres that take turns, one at a time, in a fixed order.
//
// A fibre runs until it has to wait for others (a barrier, or an instruction of the whole warp) or leaves. The last one
// to arrive does the work of the instruction for all. Nothing is ever decided by the clock, so a run repeats exactly.
#include "fibres.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VK_ASAN 1
#else
#define VK_ASAN 0
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores its address, continues on another stack.
extern "C" void vk_switch_stack(void** from, void* to);
asm(R"(
.text
.type vk_switch_stack, @function
vk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vk_switch_stack, .-vk_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace vk::emulated {
namespace {

constexpr size_t kStack = 128 << 10, kRedZone = 256;
constexpr int kMaxThreads = 1024, kBarriers = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every float, -1 in every integer

class Context {
 public:
  void start(char* stack, void (*entry)()) {
    stack_ = stack;
#if VK_ASAN
    size_ = kStack;
    __asan_unpoison_memory_region(stack, kStack);
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;  // where entry would return to; it does not
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::fill(top, top + 6, nullptr);
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, entry, 0);
#endif
  }

  // From here to `other`; returns when somebody switches back. `last`: nobody will.
  void switch_to(Context& other, bool last = false) {
#if VK_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_, other.stack_, other.size_);
#endif
    (void)last;
#if defined(__x86_64__)
    vk_switch_stack(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
    arrived(nullptr);
  }

  // First thing on a stack that was switched to. `from`: a stack whose bounds are not known yet.
  void arrived(Context* from) {
#if VK_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_, &bottom, &size);
    if (from) from->stack_ = static_cast<char*>(const_cast<void*>(bottom)), from->size_ = size;
#endif
    (void)from;
  }

 private:
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
#if VK_ASAN
  void* fake_ = nullptr;

  size_t size_ = 0;
#endif
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes, valid;
  int group;
};

struct Fibre {
  enum State { ready, waiting, left };

  Context context;
  Self self;
  State state;
  // What it waits for: barrier >= 0, or an instruction of the lanes in mask.
  const char* what;
  device::Site site;
  int barrier;
  bool aligned;
  uint32_t mask;
  void* brought;
  std::vector<Copy> copies;
  int group;
};

struct Barrier {
  int arrived, expected;
  device::Site site;
};

// Everything about the launch that is running; one at a time.
struct Run {
  const char* kernel = nullptr;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::unique_ptr<Fibre[]> fibres{new Fibre[kMaxThreads]};
  char* stacks = nullptr;
  Fibre* current = nullptr;
  Context main;
  int threads = 0;
  Barrier barriers[kBarriers];
  std::string error;
} r;

Order wanted_order = Order::mixed;
int64_t switch_count = 0;

void pause(bool last = false) { r.current->context.switch_to(r.main, last); }

void enter() {
  r.current->context.arrived(&r.main);
  r.body(r.arguments);
  r.current->state = Fibre::left;
  pause(true);
}

std::string place(const Fibre& f) {
  if (f.barrier >= 0)
    return "barrier " + std::to_string(f.barrier) + " (" + f.site.file + ":" + std::to_string(f.site.line) + ")";
  return std::string(f.what) + " (" + f.site.file + ":" + std::to_string(f.site.line) + ")";
}

// Where every thread is when none can go on: one line for each place.
std::string stuck() {
  std::vector<std::pair<std::string, std::vector<int>>> places;
  for (int i = 0; i < r.threads; ++i) {
    const Fibre& f = r.fibres[i];
    const std::string where = f.state == Fibre::left ? "its end" : place(f);
    auto known = std::find_if(places.begin(), places.end(), [&](auto& p) { return p.first == where; });
    if (known == places.end()) known = places.insert(places.end(), {where, {}});
    known->second.push_back(i);
  }
  std::string text = "threads wait for each other";
  for (auto& [where, threads] : places)
    text +=
        "; " + std::to_string(threads.size()) + " at " + where + ", the first is thread " + std::to_string(threads[0]);
  return text;
}

void turn_order(Order order, int64_t block, int threads, std::vector<int>& turns) {
  if (order == Order::mixed) order = static_cast<Order>((block + threads / 32) % 3);
  turns.resize(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) turns[size_t(i)] = order == Order::backward ? threads - 1 - i : i;
  if (order != Order::shuffled) return;
  uint64_t state = static_cast<uint64_t>(block) * 2654435761u + 1;
  for (int i = threads - 1; i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(turns[size_t(i)], turns[size_t(state >> 33) % size_t(i + 1)]);
  }
}

void run_block(const Shape& shape, int64_t x, int64_t y, std::vector<char>& memory, std::vector<int>& turns) {
  r.threads = shape.threads;
  r.error.clear();
  for (Barrier& b : r.barriers) b = Barrier{0, 0, {nullptr, 0}};
  char* shared = memory.data() + kRedZone;
  std::fill(memory.begin(), memory.end(), static_cast<char>(kPoison));
#if VK_ASAN
  __asan_poison_memory_region(memory.data(), kRedZone);
  __asan_poison_memory_region(shared + shape.shared_bytes, kRedZone);
#endif
  for (int i = 0; i < shape.threads; ++i) {
    Fibre& f = r.fibres[i];
    f.self = {i, shape.threads, x, y, shape.x, shape.y, shared, shape.shared_bytes};
    f.state = Fibre::ready;
    f.copies.clear();
    f.group = 0;
    f.context.start(r.stacks + size_t(i) * kStack, &enter);
  }
  for (int left = shape.threads; left > 0 && r.error.empty();) {
    bool moved = false;
    for (size_t first = 0; first < turns.size() && r.error.empty();) {
      const int warp = turns[first] / 32;
      bool went = false;  // a warp goes as far as it can before the next one does
      size_t at = first;
      for (; at < turns.size() && turns[at] / 32 == warp && r.error.empty(); ++at) {
        Fibre& f = r.fibres[turns[at]];
        if (f.state != Fibre::ready) continue;
        moved = went = true;
        r.current = &f;
        ++switch_count;
        r.main.switch_to(f.context);
        if (r.error.empty()) left -= f.state == Fibre::left;
      }
      if (!went) first = at;
    }
    if (!moved) {
      r.current = nullptr;
      r.error = stuck();
    }
  }
#if VK_ASAN
  __asan_unpoison_memory_region(memory.data(), memory.size());
#endif
  const auto poisoned = [](const char* from, size_t bytes) {
    return std::all_of(from, from + bytes, [](char c) { return static_cast<unsigned char>(c) == kPoison; });
  };
  if (r.error.empty() && !(poisoned(memory.data(), kRedZone) && poisoned(shared + shape.shared_bytes, kRedZone)))
    r.current = nullptr, r.error = "the block wrote outside its shared memory";
  if (r.error.empty()) return;
  const std::string thread = r.current ? ", thread " + std::to_string(r.current->self.thread) : "";
  r.current = nullptr;
  throw std::runtime_error(std::string(r.kernel) + ": block (" + std::to_string(x) + ", " + std::to_string(y) + ")" +
                           thread + ": " + r.error);
}

int64_t element_bytes(Dtype d) {
  switch (d) {
    case Dtype::bf16:
    case Dtype::f16:
      return 2;
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::i64:
    case Dtype::f64:
      return 8;
    default:
      return 1;
  }
}

// A tensor of the call, its dimensions from the largest stride to the smallest; those of one element left out.
struct Allowed {
  const char* data;
  int64_t item, sizes[TensorRef::kMaxRank], strides[TensorRef::kMaxRank];
  int rank = 0;

  explicit Allowed(const TensorRef& t) : data(static_cast<const char*>(t.data)), item(element_bytes(t.dtype)) {
    int order[TensorRef::kMaxRank];
    for (int i = 0; i < t.rank; ++i)
      if (t.sizes[i] > 1 && t.strides[i] > 0) order[rank++] = i;
    std::sort(order, order + rank, [&](int x, int y) { return t.strides[x] > t.strides[y]; });
    for (int i = 0; i < rank; ++i) sizes[i] = t.sizes[order[i]], strides[i] = t.strides[order[i]];
  }

  // Bytes from `address` on that belong to the tensor without a gap; 0: it is no element.
  size_t run(const char* address) const {
    int64_t offset = address - data, left = 1;
    if (offset < 0 || offset % item) return 0;
    offset /= item;
    for (int i = 0; i < rank; ++i) {
      const int64_t index = std::min(offset / strides[i], sizes[i] - 1);
      offset -= index * strides[i];
      if (strides[i] == 1) left = sizes[i] - index;
    }
    return offset == 0 ? static_cast<size_t>(left * item) : 0;
  }
};

std::vector<Allowed> allowed;

bool may_touch(const char* address, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    size_t step = 0;
    for (const Allowed& t : allowed)
      if ((step = t.run(address + done)) > 0) break;
    if (step == 0) return false;
    done += step;
  }
  return true;
}

void land(const Copy& c) {
  memcpy(c.to, c.from, c.valid);
  memset(c.to + c.valid, 0, c.bytes - c.valid);
}

}  // namespace

const Self& self() { return r.current->self; }

void fail(const char* what, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, what);
  vsnprintf(text, sizeof text, what, arguments);
  va_end(arguments);
  r.error = text;
  for (;;) pause();  // the launch never comes back here
}

void meet_warp(const char* what, bool aligned, device::Site site, uint32_t mask, void* brought, Complete complete) {
  Fibre& f = *r.current;
  const int first = f.self.thread / 32 * 32;
  if (!(mask >> (f.self.thread % 32) & 1u)) fail("%s: the lane is not in its own mask %08x", what, mask);
  f.what = what, f.site = site, f.barrier = -1, f.aligned = aligned, f.mask = mask, f.brought = brought;
  void* all[32] = {};
  bool complete_now = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    if (first + i >= r.threads) fail("%s: lane %d of the mask is past the block", what, i);
    Fibre& other = r.fibres[first + i];
    if (other.state == Fibre::left) fail("%s: lane %d of the mask has left", what, i);
    if (&other != &f && other.state != Fibre::waiting) {
      complete_now = false;
      continue;
    }
    if (&other != &f) {
      if (other.barrier >= 0 || strcmp(other.what, what) != 0)
        fail("lanes of a warp part: %s here, lane %d at %s", place(f).c_str(), i, place(other).c_str());
      if (other.mask != mask) fail("%s: mask %08x here, %08x on lane %d", place(f).c_str(), mask, other.mask, i);
      if (aligned && (other.site.line != site.line || strcmp(other.site.file, site.file) != 0))
        fail("lanes of a warp part: %s here, lane %d at %s", place(f).c_str(), i, place(other).c_str());
    }
    all[i] = other.brought;
  }
  if (!complete_now) {
    f.state = Fibre::waiting;
    pause();
    return;
  }
  complete(all);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1u) r.fibres[first + i].state = Fibre::ready;
}

void meet_block(int index, int threads, bool wait, device::Site site) {
  Fibre& f = *r.current;
  if (index < 0 || index >= kBarriers) fail("barrier %d does not exist", index);
  if (threads % 32 != 0) fail("barrier %d: %d threads are not whole warps", index, threads);
  Barrier& b = r.barriers[index];
  f.site = site, f.barrier = index;
  if (threads == 0) {
    threads = r.threads;
    for (int i = 0; i < r.threads; ++i)
      if (r.fibres[i].state == Fibre::left) fail("%s: thread %d has left", place(f).c_str(), i);
    if (b.arrived > 0 && (b.site.line != site.line || strcmp(b.site.file, site.file) != 0))
      fail("threads of a block part: %s here, others at %s:%d", place(f).c_str(), b.site.file, b.site.line);
  }
  if (b.arrived > 0 && b.expected != threads)
    fail("%s: %d threads here, others count %d", place(f).c_str(), threads, b.expected);
  b.expected = threads, b.site = site;
  if (++b.arrived == threads) {
    b.arrived = 0;
    for (int i = 0; i < r.threads; ++i)
      if (r.fibres[i].state == Fibre::waiting && r.fibres[i].barrier == index) r.fibres[i].state = Fibre::ready;
    return;
  }
  if (!wait) return;
  f.state = Fibre::waiting;
  pause();
}

void check_global(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("global address %p is not aligned to %zu bytes", address, bytes);
  if (allowed.empty()) return;
  if (!may_touch(static_cast<const char*>(address), bytes))
    fail("%zu bytes at %p are outside the tensors of the call", bytes, address);
}

void check_shared(const void* address, size_t bytes) {
  const Self& s = self();
  const char* p = static_cast<const char*>(address);
  if (p < s.shared || p + bytes > s.shared + s.shared_bytes)
    fail("%zu bytes at %td are outside the %zu bytes of shared memory", bytes, p - s.shared, s.shared_bytes);
  const size_t aligned = bytes < 16 ? bytes : 16;
  if ((p - s.shared) % static_cast<ptrdiff_t>(aligned))
    fail("shared address %td is not aligned to %zu bytes", p - s.shared, bytes);
}

void copy_async(void* shared, const void* global, size_t bytes, size_t valid) {
  if (valid > bytes) fail("a copy of %zu bytes cannot have %zu valid ones", bytes, valid);
  check_shared(shared, bytes);
  if (valid == bytes)
    check_global(global, bytes);
  else if (valid && !allowed.empty() && !may_touch(static_cast<const char*>(global), valid))
    fail("%zu bytes at %p are outside the tensors of the call", valid, global);
  memset(shared, kPoison, bytes);
  r.current->copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, r.current->group});
}

void commit_copies() { ++r.current->group; }

void wait_for_copies(int groups_left) {
  auto& copies = r.current->copies;
  const auto done = [&](const Copy& c) { return c.group < r.current->group - groups_left; };
  for (const Copy& c : copies)
    if (done(c)) land(c);
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
}

void allow(const std::vector<TensorRef>& tensors) {
  allowed.clear();
  for (const TensorRef& t : tensors)
    if (t.given && t.numel() > 0) allowed.emplace_back(t);
}

void set_order(Order order) { wanted_order = order; }
int64_t switches() { return switch_count; }

void run(const char* kernel, const Shape& shape, void (*body)(const void*), const void* arguments) {
  if (r.current) throw std::runtime_error(std::string(kernel) + ": a kernel is running already");
  if (shape.threads < 1 || shape.threads > kMaxThreads)
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(shape.threads) + " threads in a block");
  if (shape.shared_bytes > 227 * 1024)
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory");
  if (!r.stacks) {
    void* stacks =
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the fibres");
    r.stacks = static_cast<char*>(stacks);
  }
  r.kernel = kernel, r.body = body, r.arguments = arguments;
  std::vector<char> memory(shape.shared_bytes + 2 * kRedZone + 16);
  std::vector<int> turns;
  for (int64_t y = 0; y < shape.y; ++y)
    for (int64_t x = 0; x < shape.x; ++x) {
      turn_order(wanted_order, x + y * shape.x, shape.threads, turns);
      run_block(shape, x, y, memory, turns);
    }
  r.current = nullptr;
}

}  // namespace vk::emulated
