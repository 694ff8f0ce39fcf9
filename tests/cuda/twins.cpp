// One kernel per instruction of csrc/include/vkernels/device/: what every lane brings and what it gets, seen by Python.
#include "bind.h"
#include "vkernels/device/copy_async.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/math.h"
#include "vkernels/device/matrix.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/warp.h"

namespace vk {
namespace {

using namespace device;
using Words = std::vector<std::vector<uint32_t>>;  // lane, register
using Floats = std::vector<std::vector<float>>;

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

}  // namespace

void bind_twins(py::module_& m) {
  m.def("multiply_add", &multiply);
  m.def("load_matrices", &matrices);
  m.def("shuffle", &shuffled);
  m.def("over_lanes", &over_lanes);
  m.def("rounded", &rounded);
  m.def("exp2_fast", [](float x) { return exp2_fast(x); });
  m.def("log2_fast", [](float x) { return log2_fast(x); });
  m.def("fragment_places", [](const std::string& which, int lane, int i) {
    if (which == "a") return std::pair(FragmentA::row(lane, i), FragmentA::column(lane, i));
    if (which == "b") return std::pair(FragmentB::row(lane, i), FragmentB::column(lane, i));
    return std::pair(FragmentC::row(lane, i), FragmentC::column(lane, i));
  });
}

}  // namespace vk
