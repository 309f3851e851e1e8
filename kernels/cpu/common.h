// What every op file of the CPU backend uses: choosing a type by dtype, and checks of operands.
#pragma once

#include <string>
#include <utility>

#include "../checks.h"

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

/// Refuses a 4-bit weight whose parts do not have the sizes that [n, k] needs.
inline Status check_weight4(const char* op, const Weight4& w) {
  if (!is_blocksize(w.blocksize)) return refuse(op, "blocksize " + std::to_string(w.blocksize));
  if (w.n < 0 || w.k < 0) return refuse(op, "a weight of negative size");
  const int64_t size = w.n * w.k;
  const int64_t blocks = (size + w.blocksize - 1) / w.blocksize;
  if (w.codes.dtype != DType::u8 || w.codes.size() != (size + 1) / 2 || !w.codes.is_contiguous()) {
    return refuse(op, "codes must be " + std::to_string((size + 1) / 2) + " contiguous bytes");
  }
  const bool nested = static_cast<bool>(w.nested_absmax);
  if (w.absmax.dtype != (nested ? DType::u8 : DType::f32) || w.absmax.size() != blocks ||
      !w.absmax.is_contiguous()) {
    return refuse(op,
                  "absmax must have one contiguous entry for each of " + std::to_string(blocks) + " blocks");
  }
  if (!nested) return {};
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  const auto holds = [](const View& v, int64_t n) {
    return v && v.dtype == DType::f32 && v.size() == n && v.is_contiguous();
  };
  if (!holds(w.nested_absmax, groups) || !holds(w.nested_code, 256) || !holds(w.offset, 1)) {
    return refuse(op, "a nested absmax needs float32 nested_absmax [" + std::to_string(groups) +
                          "], nested_code [256] and offset [1]");
  }
  return {};
}

}  // namespace halfbyte::cpu
