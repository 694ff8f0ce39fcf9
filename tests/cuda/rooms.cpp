// The rooms of csrc/include/vkernels/device/ that are more than one instruction, for tests/test_cuda_rooms.py.
#include "bind.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/softmax.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/tile.h"

namespace vk {
namespace {

using namespace device;
constexpr Stream kNowhere{0, nullptr};
constexpr int kRows = 32, kThreads = 64;

template <class Body>
void with_columns(int columns, const Body& body) {
  if (columns == 16) return body(std::integral_constant<int, 16>{});
  if (columns == 32) return body(std::integral_constant<int, 32>{});
  if (columns == 64) return body(std::integral_constant<int, 64>{});
  if (columns == 72) return body(std::integral_constant<int, 72>{});
  if (columns == 80) return body(std::integral_constant<int, 80>{});
  if (columns == 88) return body(std::integral_constant<int, 88>{});
  if (columns == 96) return body(std::integral_constant<int, 96>{});
  if (columns == 128) return body(std::integral_constant<int, 128>{});
  throw std::invalid_argument("no such width");
}

int place(int columns, int row, int vector) {
  int place = 0;
  with_columns(columns, [&](auto c) { place = vector_place<Tile<bf16, kRows, c()>>(row, vector); });
  return place;
}

struct Products {
  const void* x;  // rows of the tile: row map[r], or none where that is negative; `used` columns
  const int32_t* map;
  const void* w;        // kRows kRows
  float *gram, *mixed;  // x x', w x
  void* back;           // w x rounded, into the rows x came from
  int64_t stride;
  int used;
};

template <class T, int C>
VK_KERNEL(kThreads)
multiply_tiles(Products p) {
  const Tile<T, kRows, C> x{reinterpret_cast<T*>(shared_memory())};
  const Tile<T, kRows, kRows> w{x.data + kRows * C};
  const T* from = static_cast<const T*>(p.x);
  const auto row_at = [&](int r) { return load(p.map + r) < 0 ? nullptr : from + load(p.map + r) * p.stride; };
  copy_rows<kThreads>(x, p.used, from, row_at);
  copy_rows<kThreads>(w, kRows, from, [&](int r) { return static_cast<const T*>(p.w) + r * kRows; });
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  const int row = 16 * warp();
  FragmentC gram[kRows / 8] = {}, mixed[C / 8] = {};
  for (int k = 0; k < C; k += 16)
    for (int n = 0; n < kRows; n += 16) {
      FragmentB b[2];
      right_operands(b, x, n, k);
      for (int i = 0; i < 2; ++i) multiply_add<T>(gram[n / 8 + i], left_operand(x, row, k), b[i]);
    }
  for (int k = 0; k < kRows; k += 16)
    for (int n = 0; n < C; n += 16) {
      FragmentB b[2];
      right_operands_across(b, x, k, n);
      for (int i = 0; i < 2; ++i) multiply_add<T>(mixed[n / 8 + i], left_operand(w, row, k), b[i]);
    }
  const auto show = [&](float* to, int width, const FragmentC* c, int count) {
    for (int n = 0; n < count; ++n)
      for (int i = 0; i < 4; ++i)
        store(to + (row + c->row(lane(), i)) * width + 8 * n + c->column(lane(), i), c[n].value[i]);
  };
  show(p.gram, kRows, gram, kRows / 8);
  show(p.mixed, C, mixed, C / 8);
  sync_block();  // the tile is written over
  for (int n = 0; n < C / 8; ++n) put(x, row, 8 * n, mixed[n]);
  sync_warp();
  T* to = static_cast<T*>(p.back);
  store_rows<16, kWarp>(
      x, row, p.used, [&](int r) { return load(p.map + r) < 0 ? nullptr : to + load(p.map + r) * p.stride; }, lane());
}

void products(TensorRef x, TensorRef map, TensorRef w, TensorRef gram, TensorRef mixed, TensorRef back, int used) {
  const Products p{x.data,    map.ptr<int32_t>(), w.data, gram.ptr<float>(), mixed.ptr<float>(),
                   back.data, x.stride(0),        used};
  with_columns(static_cast<int>(mixed.size(1)), [&](auto c) {
    if constexpr (c() % 16 == 0) {
      const device::Grid grid{1, 1, kThreads, 2 * size_t(kRows) * (c() + kRows)};
      x.dtype == Dtype::bf16 ? launch("products", multiply_tiles<bf16, c()>, grid, kNowhere, p)
                             : launch("products", multiply_tiles<f16, c()>, grid, kNowhere, p);
    }
  });
}

// Scores [16, 8 N] of one warp pass by in steps of 16; weights as they stand in the end, lse and totals.
struct Scores {
  float *scores, *lse, *inverse;
  int steps;
  float scale;
};

VK_KERNEL(32) soften(Scores p) {
  OnlineSoftmax rows;
  const int width = 16 * p.steps;
  const auto at = [&](int step, int n, int i) {
    return p.scores + FragmentC::row(lane(), i) * width + 16 * step + 8 * n + FragmentC::column(lane(), i);
  };
  for (int step = 0; step < p.steps; ++step) {
    FragmentC s[2];
    float keep[2];
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) s[n].value[i] = load(at(step, n, i));
    softmax_step(rows, s, p.scale, keep);
    for (int before = 0; before < step; ++before) {
      FragmentC old[2];
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) old[n].value[i] = load(at(before, n, i));
      rescale(old, keep);
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) store(at(before, n, i), old[n].value[i]);
    }
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) store(at(step, n, i), s[n].value[i]);
  }
  complete(rows);
  for (int half = 0; half < 2; ++half) {
    const int row = FragmentC::row(lane(), 2 * half);
    store(p.lse + row, natural_lse(base_of(rows.top[half], p.scale), rows.total[half]));
    store(p.inverse + row, inverse_of(rows.total[half]));
  }
}

}  // namespace

void bind_rooms(py::module_& m) {
  m.def("vector_place", &place);
  m.def("products", &products);
  m.def("soften", [](TensorRef scores, TensorRef lse, TensorRef inverse, float scale) {
    launch("soften", soften, {1, 1, 32}, kNowhere,
           Scores{scores.ptr<float>(), lse.ptr<float>(), inverse.ptr<float>(), int(scores.size(1) / 16), scale});
  });
  m.def("lse_to_subtract", [](float lse) { return lse_to_subtract(lse); });
}

}  // namespace vk
