// Marks a function that both the CPU and the CUDA drivers call. Internal linkage: each translation unit keeps its own
// copy, so code compiled for one instruction set is never linked into another.
#pragma once

#if defined(__CUDACC__)
#define VK_HD __host__ __device__ static __forceinline__
#else
#define VK_HD static inline __attribute__((always_inline))
#endif
