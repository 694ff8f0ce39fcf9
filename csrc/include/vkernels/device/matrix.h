// Tensor cores: fragments as types that know where their elements lie (PTX ISA, mma.m16n8k16 and ldmatrix).
#pragma once

#include "vkernels/device/math.h"
#include "vkernels/device/warp.h"

namespace vk::device {

// A 16 x 16 (rows m, columns k), two elements to a register. Element i of a lane lies at (row(i), column(i)).
struct FragmentA {
  uint32_t reg[4];
  VK_HD int row(int lane, int i) { return lane / 4 + (i / 2 % 2 ? 8 : 0); }
  VK_HD int column(int lane, int i) { return lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0); }
};

// B 16 x 8 (rows k, columns n).
struct FragmentB {
  uint32_t reg[2];
  VK_HD int row(int lane, int i) { return lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0); }
  VK_HD int column(int lane, int) { return lane / 4; }
};

// C and D 16 x 8 (rows m, columns n), float32.
struct FragmentC {
  float value[4];
  VK_HD int row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
  VK_HD int column(int lane, int i) { return lane % 4 * 2 + i % 2; }
};

#if !defined(__CUDACC__)
namespace twin {

template <class T>
float half_of(const uint32_t* reg, int i) {
  T x;
  x.bits = uint16_t(reg[i / 2] >> (i % 2 * 16));
  return to_float(x);
}

template <class T>
struct Product {
  FragmentC* c;
  const FragmentA* a;
  const FragmentB* b;

  static void complete(void* const (&brought)[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& p = *static_cast<Product*>(brought[lane]);
      for (int i = 0; i < 8; ++i) a[FragmentA::row(lane, i)][FragmentA::column(lane, i)] = half_of<T>(p.a->reg, i);
      for (int i = 0; i < 4; ++i) b[FragmentB::row(lane, i)][FragmentB::column(lane, i)] = half_of<T>(p.b->reg, i);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& value = static_cast<Product*>(brought[lane])->c->value[i];
        double sum = value;  // products of 16-bit floats are exact in it
        for (int k = 0; k < 16; ++k)
          sum += double(a[FragmentC::row(lane, i)][k]) * double(b[k][FragmentC::column(lane, i)]);
        value = static_cast<float>(sum);
      }
  }
};

struct Rows {
  const void* row;
  int matrices;
  bool transposed;
  uint32_t* reg;

  static void complete(void* const (&brought)[32]) {
    uint16_t matrix[4][8][8];
    const int matrices = static_cast<Rows*>(brought[0])->matrices;
    for (int i = 0; i < 8 * matrices; ++i) memcpy(matrix[i / 8][i % 8], static_cast<Rows*>(brought[i])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      auto& r = *static_cast<Rows*>(brought[lane]);
      for (int m = 0; m < matrices; ++m) {
        const int g = lane / 4, t = lane % 4 * 2;
        r.reg[m] = r.transposed ? matrix[m][t][g] | uint32_t(matrix[m][t + 1][g]) << 16
                                : matrix[m][g][t] | uint32_t(matrix[m][g][t + 1]) << 16;
      }
    }
  }
};

inline void load_matrices(uint32_t* reg, int matrices, bool transposed, const void* row, Site site) {
  if (lane() < 8 * matrices) emulated::check_shared(row, 16);
  Rows mine{row, matrices, transposed, reg};
  emulated::meet_warp("load_matrices", true, site, kWholeWarp, &mine, &Rows::complete);
}

}  // namespace twin
#endif

// c += a b, on the whole warp.
template <class T>
VK_DEVICE void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b, Site site = Site::here()) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
#if defined(__CUDACC__)
  if constexpr (std::is_same<T, bf16>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
#else
  twin::Product<T> mine{&c, &a, &b};
  emulated::meet_warp("multiply_add", true, site, kWholeWarp, &mine, &twin::Product<T>::complete);
#endif
}

// 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j brings the address of row j of matrix i (16 bytes,
// aligned), and gets elements (lane / 4, lane % 4 * 2) and the one after it of every matrix; of the transposes, if
// asked.
template <bool kTransposed = false>
VK_DEVICE void load_matrices(uint32_t (&reg)[4], const void* row, Site site = Site::here()) {
#if defined(__CUDACC__)
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
  twin::load_matrices(reg, 4, kTransposed, row, site);
#endif
}

// Two of them: lanes 0..15 bring the rows.
template <bool kTransposed = false>
VK_DEVICE void load_matrices(uint32_t (&reg)[2], const void* row, Site site = Site::here()) {
#if defined(__CUDACC__)
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(reg[0]), "=r"(reg[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(reg[0]), "=r"(reg[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
  twin::load_matrices(reg, 2, kTransposed, row, site);
#endif
}

// An 8 x 8 matrix of 16-bit elements, two of row lane / 4 to a lane, transposed: the register of a fragment of rows
// becomes that of a fragment of columns.
VK_DEVICE uint32_t transpose(uint32_t reg, Site site = Site::here()) {
#if defined(__CUDACC__)
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(reg));
  (void)site;
  return r;
#else
  emulated::meet_warp("transpose", true, site, kWholeWarp, &reg, [](void* const(&brought)[32]) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 64; ++i) {
      const uint32_t two = *static_cast<uint32_t*>(brought[i / 2]);
      matrix[i / 8][i % 8] = uint16_t(two >> (i % 2 * 16));
    }
    for (int lane = 0; lane < 32; ++lane)
      *static_cast<uint32_t*>(brought[lane]) =
          matrix[lane % 4 * 2][lane / 4] | uint32_t(matrix[lane % 4 * 2 + 1][lane / 4]) << 16;
  });
  return reg;
#endif
}

// Two neighbouring tiles of a product as the left operand of the next: the elements already lie where it wants them.
template <class T>
VK_DEVICE FragmentA as_operand(const FragmentC& left, const FragmentC& right) {
  return {{round_two(left.value[0], left.value[1], T{}), round_two(left.value[2], left.value[3], T{}),
           round_two(right.value[0], right.value[1], T{}), round_two(right.value[2], right.value[3], T{})}};
}

}  // namespace vk::device
