// One kernel per instruction of csrc/include/vkernels/device/: what every lane brings and what it gets, seen by Python.
#include "bind.h"
#include "vkernels/device/codes.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/divide.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/math.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/ticket.h"
#include "vkernels/device/warp.h"

namespace vk {
namespace {

using namespace device;
using Words = std::vector<std::vector<uint32_t>>;  // lane, register
using Floats = std::vector<std::vector<float>>;

struct Tile {
  const char* qkv;
  float* out;
};

constexpr Stream kNowhere{0, nullptr};

template <class Body>
struct Call {
  const Body* body;
};
template <class Body>
VK_KERNEL(1024)
call_body(Call<Body> c) {
  (*c.body)();
}
template <class Body>
void on_threads(int threads, size_t shared_bytes, const Body& body, int64_t blocks = 1) {
  launch("twin", call_body<Body>, {blocks, 1, threads, shared_bytes}, kNowhere, Call<Body>{&body});
}

Floats multiply(const Words& a, const Words& b, Floats c, bool brain) {
  on_threads(32, 0, [&] {
    const size_t l = static_cast<size_t>(lane());
    FragmentA fa;
    FragmentB fb;
    FragmentC fc;
    for (size_t i = 0; i < 4; ++i) fa.reg[i] = a[l][i], fc.value[i] = c[l][i];
    for (size_t i = 0; i < 2; ++i) fb.reg[i] = b[l][i];
    brain ? multiply_add<bf16>(fc, fa, fb) : multiply_add<f16>(fc, fa, fb);
    for (size_t i = 0; i < 4; ++i) c[l][i] = fc.value[i];
  });
  return c;
}

// `shared` (16-bit elements) is what the block's memory holds; lane i brings the address of element rows[i].
Words matrices(const std::vector<uint16_t>& shared, const std::vector<int>& rows, int count, bool transposed) {
  Words out(32);
  on_threads(32, shared.size() * 2, [&] {
    uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
    if (lane() == 0) std::copy(shared.begin(), shared.end(), memory);
    sync_warp();
    const uint16_t* row = memory + rows[static_cast<size_t>(lane())];
    uint32_t four[4], two[2];
    if (count == 4) transposed ? load_matrices<true>(four, row) : load_matrices<false>(four, row);
    if (count == 2) transposed ? load_matrices<true>(two, row) : load_matrices<false>(two, row);
    const uint32_t* got = count == 4 ? four : two;
    out[static_cast<size_t>(lane())].assign(got, got + count);
  });
  return out;
}

std::vector<uint32_t> transposed(std::vector<uint32_t> words) {
  on_threads(32, 0, [&] {
    uint32_t& word = words[static_cast<size_t>(lane())];
    word = transpose_matrix(word);
  });
  return words;
}

// What each thread of a quad makes of its words of a unit: pairs of float16.
template <int kBits>
Words unpacked(const Words& words) {
  Words out(4);
  on_threads(4, 0, [&] {
    const size_t t = static_cast<size_t>(lane());
    uint32_t mine[Codes<kBits>::kWords], pair[4];
    std::copy_n(words[t].begin(), Codes<kBits>::kWords, mine);
    unpack<kBits>(mine, lane(), pair);
    out[t].assign(pair, pair + 4);
  });
  return out;
}

// Which of `blocks` blocks came last, by its own account, and what the counter is left at.
std::pair<std::vector<int>, int> tickets(int blocks) {
  std::vector<int> last(static_cast<size_t>(blocks));
  int counter = 0;
  on_threads(
      64, 16,
      [&] {
        const bool mine = last_to_come(&counter, blocks, reinterpret_cast<int*>(shared_memory()));
        if (thread_index() == 63) last[static_cast<size_t>(block_x())] = mine;
      },
      blocks);
  return {last, counter};
}

std::vector<int> shuffled(const std::string& how, std::vector<int> values, int by, uint32_t mask) {
  on_threads(static_cast<int>(values.size()), 0, [&] {
    if (!(mask >> lane() & 1u)) return;
    int& x = values[static_cast<size_t>(lane())];
    if (how == "to") x = shuffle(x, by, mask);
    if (how == "xor") x = shuffle_xor(x, by, mask);
    if (how == "down") x = shuffle_down(x, by, mask);
    if (how == "ballot") x = static_cast<int>(ballot(x > 0, mask));
  });
  return values;
}

std::vector<float> over_lanes(std::vector<float> values, bool sum, int lanes) {
  on_threads(32, 0, [&] {
    float& x = values[static_cast<size_t>(lane())];
    if (lanes == 32) x = sum ? sum_over_lanes(x) : max_over_lanes(x);
    if (lanes == 4) x = sum ? sum_over_lanes<4>(x) : max_over_lanes<4>(x);
  });
  return values;
}

std::vector<int> extremes(std::vector<int> values) {
  on_threads(32, 0, [&] {
    const size_t l = static_cast<size_t>(lane());
    const int least = min_over_warp(values[l]), largest = max_over_warp(values[l]);
    values[l] = l % 2 ? largest : least;
  });
  return values;
}

// A pair through a 16-byte vector, rounded; and 2^x, log2 x.
std::vector<float> rounded(std::vector<float> x, bool brain) {
  on_threads(1, 0, [&] {
    float eight[8], back[8];
    for (size_t i = 0; i < 8; ++i) eight[i] = x[i];
    brain ? widen<bf16>(narrow<bf16>(eight), back) : widen<f16>(narrow<f16>(eight), back);
    for (size_t i = 0; i < 8; ++i) x[i] = back[i];
    x.push_back(brain ? widen_one(narrow_one<bf16>(x[0])) : widen_one(narrow_one<f16>(x[0])));
  });
  return x;
}

// softmax(q k') v of 16 queries, 16 keys and 16 channels (bf16, rows in a row) on one warp: copies, ldmatrix, two
// products, and a softmax that never leaves the registers.
VK_KERNEL(32) attend(Tile t) {
  char* shared = shared_memory();
  for (int i = lane(); i < 3 * 32; i += kWarp) copy_async16(shared + 16 * i, t.qkv + 16 * i);
  commit_copies();
  wait_for_copies<0>();
  sync_warp();
  const auto row = [&](int tensor, int r, int column) { return shared + 512 * tensor + 32 * r + 2 * column; };
  FragmentA q;
  load_matrices(q.reg, row(0, lane() % 16, lane() / 16 * 8));
  FragmentC scores[2] = {}, out[2] = {};
  for (int n = 0; n < 2; ++n) {
    FragmentB k;
    load_matrices(k.reg, row(1, 8 * n + lane() % 8, lane() / 8 % 2 * 8));
    multiply_add<bf16>(scores[n], q, k);
  }
  for (int half = 0; half < 2; ++half) {  // rows lane / 4 and lane / 4 + 8
    float* s[4] = {&scores[0].value[2 * half], &scores[0].value[2 * half + 1], &scores[1].value[2 * half],
                   &scores[1].value[2 * half + 1]};
    const float top = max_over_lanes<4>(fmaxf(fmaxf(*s[0], *s[1]), fmaxf(*s[2], *s[3])));
    for (float* x : s) *x = exp2_fast(*x - top);
    const float sum = sum_over_lanes<4>(*s[0] + *s[1] + *s[2] + *s[3]);
    for (float* x : s) *x /= sum;
  }
  const FragmentA p = as_operand<bf16>(scores[0], scores[1]);
  for (int n = 0; n < 2; ++n) {
    FragmentB v;
    load_matrices<true>(v.reg, row(2, lane() % 16, 8 * n));
    multiply_add<bf16>(out[n], p, v);
    for (int i = 0; i < 4; ++i)
      store(t.out + 16 * FragmentC::row(lane(), i) + 8 * n + FragmentC::column(lane(), i), out[n].value[i]);
  }
}

}  // namespace

void bind_twins(py::module_& m) {
  m.def("multiply_add", &multiply);
  m.def("load_matrices", &matrices);
  m.def("transpose_matrix", &transposed);
  m.def("divide", [](int x, int64_t by) {
    const Divisor divisor(by);
    return std::pair(quotient(x, divisor), remainder(x, divisor));
  });
  m.def("permute_bytes", [](uint32_t low, uint32_t high, uint32_t pick) { return permute_bytes(low, high, pick); });
  m.def("multiply_add_two", [](uint32_t a, uint32_t b, uint32_t c) { return multiply_add_two(a, b, c); });
  m.def("unpack", [](int bits, const Words& words) {
    return bits == 8 ? unpacked<8>(words) : bits == 4 ? unpacked<4>(words) : unpacked<2>(words);
  });
  m.def("order", [](int bits, int member) {
    return bits == 8 ? Codes<8>::order(member) : bits == 4 ? Codes<4>::order(member) : Codes<2>::order(member);
  });
  m.def("tickets", &tickets);
  m.def("shuffle", &shuffled);
  m.def("over_lanes", &over_lanes);
  m.def("extremes", &extremes);
  m.def("rounded", &rounded);
  m.def("attend", [](TensorRef qkv, TensorRef out) {
    launch("attend", attend, {1, 1, 32, 1536}, kNowhere, Tile{qkv.ptr<const char>(), out.ptr<float>()});
  });
  m.def("exp2_fast", [](float x) { return exp2_fast(x); });
  m.def("log2_fast", [](float x) { return log2_fast(x); });
  m.def("fragment_places", [](const std::string& which, int lane, int i) {
    if (which == "a") return std::pair(FragmentA::row(lane, i), FragmentA::column(lane, i));
    if (which == "b") return std::pair(FragmentB::row(lane, i), FragmentB::column(lane, i));
    return std::pair(FragmentC::row(lane, i), FragmentC::column(lane, i));
  });
}

}  // namespace vk
