#pragma once

#include "decode_attention.h"
#include "vkernels/device/stream.h"

namespace vk {

// What one launch works on beside its arguments: `splits` blocks share the keys of a row of queries.
struct DecodeWorkspace {
  TensorRef part;     // float, at least decode_part_floats
  TensorRef counter;  // int32 zeros, one per program; left at zero
  int64_t splits;
};

// Queries one block takes at once, of those that share a key/value head: 8, or 16 where there are more.
inline int64_t decode_rows_of(int64_t shared) { return shared <= 8 ? 8 : 16; }
inline int64_t decode_programs(const CacheRef& c, int64_t shared) {
  const int64_t rows = decode_rows_of(shared);
  return c.b * c.m * ((shared + rows - 1) / rows);
}
// Every split leaves, per query, its output, its largest score and its sum of weights.
inline int64_t decode_part_floats(const CacheRef& c, int64_t shared, int64_t splits) {
  return decode_programs(c, shared) * splits * decode_rows_of(shared) * (c.d + 2);
}

void decode_attention_cuda(const DecodeAttentionParams& p, const DecodeWorkspace& work, const device::Stream& stream);

}  // namespace vk
