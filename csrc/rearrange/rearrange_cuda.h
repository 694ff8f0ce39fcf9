#pragma once

#include "rearrange.h"
#include "vkernels/device/stream.h"

namespace vk {

// What the kernels take: sources, their row axes after merging, channels of a row that is held whole, and bytes of sums
// for the gradients of a row's parameters.
inline constexpr int kMostCudaSources = 4, kMostRowAxes = 3;
inline constexpr int64_t kWidestRow = 8192;
inline constexpr int64_t kMostSumBytes = 128 << 10;

void rearrange_rows_cuda(const RearrangeRowsParams& p, const device::Stream& stream);
void rearrange_rows_bwd_cuda(const RearrangeRowsBwdParams& p, const device::Stream& stream);
void rearrange_affine_cuda(const RearrangeAffineParams& p, const device::Stream& stream);

}  // namespace vk
