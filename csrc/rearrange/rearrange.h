#pragma once

#include "vkernels/cpu/isa.h"
#include "vkernels/tensor.h"

namespace vk {

// out row r = taps of the input rows, then u = residual + scale * gate * (v + bias), then y = norm(u).
struct RearrangeRowsParams {
  static constexpr int kMaxSources = 8;

  TensorRef x[kMaxSources];  // every source b|1 rows.. c; a source may have several row axes
  int sources = 0;
  TensorRef ptr;          // int32 p n_out+1, absent: one tap per row
  TensorRef idx;          // int32 p nnz, -1: nothing (without ptr only)
  TensorRef weight;       // f32 p nnz, absent: ones
  TensorRef bias;         // f32 c
  TensorRef gate;         // f32 c
  TensorRef residual;     // b n_out c
  TensorRef norm_weight;  // f32 c
  TensorRef norm_bias;    // f32 c
  TensorRef rows;         // int32 p n_out: where output row r goes in y, -1: nowhere; absent: r itself
  TensorRef y;            // b n_out c, or b s c with rows
  TensorRef sum;          // b n_out c, absent: not wanted
  int reduce = 0;         // 0 sum, 1 max
  int norm = 0;           // 0 none, 1 layer, 2 rms
  float scale = 1.0f;
  float eps = 1e-5f;
  bool accumulate = false;
};

// du (gradient of u), dv (of the taps' sum) and per-chunk sums for the parameters.
struct RearrangeRowsBwdParams {
  RearrangeRowsParams forward;  // y, sum and rows unused
  TensorRef dy;                 // b n_out c
  TensorRef dsum;               // b n_out c, absent: zero
  TensorRef du;                 // b n_out c
  TensorRef dv;                 // b n_out c, absent: equal to du
  TensorRef partial;            // f32 chunks 4 c: dbias, dgate, dnorm_weight, dnorm_bias
};

struct RearrangeMaxBwdParams {
  TensorRef x;    // b n_in c
  TensorRef ptr;  // int32 p n_out+1
  TensorRef idx;  // int32 p nnz
  TensorRef dy;   // b n_out c
  TensorRef dx;   // f32 b n_in c, zero on entry
};

// A pure move: factors in output order, with their strides in x and y.
struct RearrangeAffineParams {
  static constexpr int kMaxFactors = 12;
  const char* x = nullptr;
  char* y = nullptr;
  int element_bytes = 4;
  int rank = 0;
  int64_t sizes[kMaxFactors] = {};
  int64_t x_strides[kMaxFactors] = {};  // elements
  int64_t y_strides[kMaxFactors] = {};
};

VK_DECLARE_KERNEL(void rearrange_rows(const RearrangeRowsParams& p))
VK_DECLARE_KERNEL(void rearrange_rows_bwd(const RearrangeRowsBwdParams& p))
VK_DECLARE_KERNEL(void rearrange_max_bwd(const RearrangeMaxBwdParams& p))
VK_DECLARE_KERNEL(void rearrange_affine(const RearrangeAffineParams& p))

}  // namespace vk
