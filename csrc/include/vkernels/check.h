// Refusals raised by native code, in the same form as vkernels/check.py:
//   {op}: {argument} must {rule}, got {value}
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "vkernels/tensor.h"

namespace vk {

inline std::string shape_text(const TensorRef& t) {
  std::ostringstream s;
  s << "(";
  for (int i = 0; i < t.rank; ++i) s << (i ? ", " : "") << t.sizes[i];
  s << ")";
  return s.str();
}

template <class Value>
[[noreturn]] void refuse(const char* op, const char* argument, const std::string& rule, const Value& value) {
  std::ostringstream s;
  s << op << ": " << argument << " must " << rule << ", got " << value;
  throw std::invalid_argument(s.str());
}

// Evaluates `value` only when the rule is broken.
#define VK_CHECK(condition, op, argument, rule, value)         \
  do {                                                         \
    if (!(condition)) ::vk::refuse(op, argument, rule, value); \
  } while (0)

inline void check_rank(const char* op, const char* argument, const TensorRef& t, int rank) {
  VK_CHECK(t.given && t.rank == rank, op, argument, "have rank " + std::to_string(rank),
           t.given ? shape_text(t) : std::string("nothing"));
}

inline void check_size(const char* op, const char* argument, const TensorRef& t, int dim, int64_t size) {
  VK_CHECK(t.size(dim) == size, op, argument,
           "have size " + std::to_string(size) + " in dimension " + std::to_string(dim), shape_text(t));
}

// Rows are read with vector loads.
inline void check_unit_stride(const char* op, const char* argument, const TensorRef& t) {
  VK_CHECK(t.rank == 0 || t.numel() == 0 || t.size(-1) == 1 || t.stride(-1) == 1, op, argument,
           "have stride 1 in its last dimension", t.stride(-1));
}

inline void check_dtype(const char* op, const char* argument, const TensorRef& t, Dtype dtype) {
  VK_CHECK(t.dtype == dtype, op, argument, "have dtype code " + std::to_string(static_cast<int>(dtype)),
           static_cast<int>(t.dtype));
}

}  // namespace vk
