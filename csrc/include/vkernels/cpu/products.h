// Who multiplies: the same panels, by vectors or by the matrix tiles of AMX. A kernel names one of the two as a
// template parameter and takes from it how many rows a strip has and how many keys a slab.
#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/cpu/panel.h"

namespace vk::VK_ISA {

template <bool kPairedWords>
struct Vectors {
  static constexpr bool kPairs = kPairedWords;
  static constexpr int kRows = kStrip;
  static constexpr int64_t kSlab = 512;  // keys whose scores are held at once
  static constexpr int64_t kStepUnit = 1;

  static void product(const float* a, int64_t a_row, const float* b, int64_t b_panel, int64_t steps, float* c,
                      int64_t c_row, int64_t columns, bool add) {
    vk::VK_ISA::product<kPairs>(a, a_row, 1, b, b_panel, steps, c, c_row, columns, add);
  }

  // c[row][column] += sum over steps of a[step][row] * b[step][column], for `rows` whole panels of rows.
  static constexpr bool kTurned = false;  // `turned` holds rows * steps words
  static void product_turned(const float* a, int64_t a_step, int64_t rows, const float* b, int64_t b_panel,
                             int64_t steps, float* c, int64_t c_row, int64_t columns, float* /*turned*/) {
    for (int64_t row = 0; row < rows; row += kRows)
      vk::VK_ISA::product<kPairs>(a + row, 1, a_step, b, b_panel, steps, c + row * c_row, c_row, columns, true);
  }
};

#if defined(__AVX512BF16__) && defined(__linux__)
#define VK_HAS_TILES 1

// Eight tiles of 16 rows of 16 words: 0 to 3 sum, 4 and 5 hold rows of a, 6 and 7 columns of b. A panel's layout is
// what the processor asks of its second operand: two bf16 along the summed axis in a word.
struct Tiles {
  static constexpr bool kPairs = true;
  static constexpr int kSide = 16, kRows = 2 * kSide;
  static constexpr int64_t kSlab = 512;
  static constexpr int64_t kStepUnit = kSide;  // words of the summed axis are padded to this with zeros

  // A thread's tiles, while the object lives. Whoever else multiplies with tiles configures them anew.
  class Configured {
   public:
    Configured() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Configured() { __asm__ volatile("tilerelease" ::: "memory"); }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;
  };

  template <int kTile>
  VK_INLINE void load(const float* from, int64_t row) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row * 4), "i"(kTile) : "memory");
  }
  template <int kTile>
  VK_INLINE void store(float* to, int64_t row) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row * 4), "i"(kTile) : "memory");
  }
  template <int kTile>
  VK_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kSum, int kA, int kB>
  VK_INLINE void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kSum));
  }

  // 2 x 2 sums, or 2 x 1 where a panel has one vector of columns left.
  template <bool kTwo>
  static __attribute__((noinline)) void block(const float* a, int64_t a_row, const float* b, int64_t steps, float* c,
                                              int64_t c_row, bool add) {
    float* low = c + kSide * c_row;
    if (add) {
      load<0>(c, c_row), load<2>(low, c_row);
      if constexpr (kTwo) load<1>(c + kSide, c_row), load<3>(low + kSide, c_row);
    } else {
      zero<0>(), zero<1>(), zero<2>(), zero<3>();
    }
    for (int64_t step = 0; step < steps; step += kSide) {
      load<4>(a + step, a_row), load<5>(a + kSide * a_row + step, a_row);
      load<6>(b + step * kPanel, kPanel);
      multiply_add<0, 4, 6>(), multiply_add<2, 5, 6>();
      if constexpr (kTwo) {
        load<7>(b + step * kPanel + kSide, kPanel);
        multiply_add<1, 4, 7>(), multiply_add<3, 5, 7>();
      }
    }
    store<0>(c, c_row), store<2>(low, c_row);
    if constexpr (kTwo) store<1>(c + kSide, c_row), store<3>(low + kSide, c_row);
  }

  static void product(const float* a, int64_t a_row, const float* b, int64_t b_panel, int64_t steps, float* c,
                      int64_t c_row, int64_t columns, bool add) {
    int64_t done = 0;
    for (; done + kSide < columns; done += kPanel, b += b_panel) block<true>(a, a_row, b, steps, c + done, c_row, add);
    if (done < columns) block<false>(a, a_row, b, steps, c + done, c_row, add);
  }

  static constexpr bool kTurned = true;
  static void product_turned(const float* a, int64_t a_step, int64_t rows, const float* b, int64_t b_panel,
                             int64_t steps, float* c, int64_t c_row, int64_t columns, float* turned) {
    for (int64_t step = 0; step < steps; step += kSide)
      for (int64_t row = 0; row < rows; row += kSide) {
        f32v tile[kSide];
        for (int i = 0; i < kSide; ++i) tile[i] = vk::VK_ISA::load(a + (step + i) * a_step + row);
        transpose(tile);
        for (int i = 0; i < kSide; ++i) vk::VK_ISA::store(turned + (row + i) * steps + step, tile[i]);
      }
    for (int64_t row = 0; row < rows; row += kRows)
      product(turned + row * steps, steps, b, b_panel, steps, c + row * c_row, c_row, columns, true);
  }
};
#endif

}  // namespace vk::VK_ISA
