// What every op file of the CPU backend uses: choosing a type by dtype, and refusing operands.
#pragma once

#include <string>
#include <utility>

#include "../backend.h"

namespace halfbyte::cpu {

/// Calls body with a null pointer of the element type: with_float_type(x.dtype, [&](auto* p) { using T = ...
/// }). The caller has checked is_float(dtype).
template <typename Body>
auto with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f16:
      return body(static_cast<F16*>(nullptr));
    case DType::bf16:
      return body(static_cast<BF16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

inline Status refuse(const char* op, const std::string& what) {
  return Status::error(Code::shape, std::string(op) + ": " + what);
}
inline Status refuse_dtype(const char* op, const std::string& what) {
  return Status::error(Code::dtype, std::string(op) + ": " + what);
}

}  // namespace halfbyte::cpu
