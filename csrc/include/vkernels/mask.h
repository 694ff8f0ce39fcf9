// Who may see whom, written once for host and device: what remains of a mask after lowering (docs/masks.md).
#pragma once

#include <cstdint>

#include "vkernels/host_device.h"

namespace vk {

// Half-open interval of keys, in processing order.
struct KeyRange {
  int32_t begin, end;
};

// The `index`-th interval of a query row, clamped to the keys that exist. `row` null: every live key.
VK_HD KeyRange key_range(const int32_t* row, int index, int32_t len_k) {
  if (!row) return {0, len_k};
  const int32_t begin = row[2 * index] < 0 ? 0 : row[2 * index];
  const int32_t end = row[2 * index + 1] > len_k ? len_k : row[2 * index + 1];
  return {begin, end > begin ? end : begin};
}

VK_HD bool in_range(KeyRange r, int32_t key) { return key >= r.begin && key < r.end; }

// One relation of a box: lo <= a_k - a_q <= hi.
VK_HD bool related(int32_t a_q, int32_t a_k, int32_t lo, int32_t hi) { return a_k - a_q >= lo && a_k - a_q <= hi; }

// Can any pair of two attribute intervals be related?
VK_HD bool may_relate(KeyRange a_q, KeyRange a_k, int32_t lo, int32_t hi) {
  return a_k.end - a_q.begin >= lo && a_k.begin - a_q.end <= hi;
}

}  // namespace vk
