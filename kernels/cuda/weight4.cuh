// A 4-bit weight as kernel parameters, and its absmax decoded where it is used. Layout: formats.h.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

/// An absmax of double quantisation; its two steps are rounded apart, as where it was made.
__device__ __forceinline__ float nested_value(float code, float nested, float offset) {
  return __fadd_rn(__fmul_rn(code, nested), offset);
}

struct Absmax {
  const float* plain;        // fp32 [blocks], or null when nested
  const uint8_t* codes;      // nested: uint8 [blocks]
  const float* nested;       // fp32 [blocks / 256]
  const float* nested_code;  // fp32 [256]
  const float* offset;       // fp32 [1]

  __device__ __forceinline__ float operator[](int64_t block) const { return value(block, block); }
  /// That of block `block`, which is stored at `at`.
  __device__ __forceinline__ float value(int64_t at, int64_t block) const {
    if (plain) return plain[at];
    return nested_value(nested_code[codes[at]], nested[block / kNestedBlocksize], *offset);
  }
};

inline Absmax absmax_of(const Weight4& w) {
  if (!w.nested_absmax) return {w.absmax.as<const float>(), nullptr, nullptr, nullptr, nullptr};
  return {nullptr, w.absmax.as<const uint8_t>(), w.nested_absmax.as<const float>(),
          w.nested_code.as<const float>(), w.offset.as<const float>()};
}

inline Status check_weight4(const char* op, const Weight4& w) {
  const int64_t n = w.n * w.k;
  if (w.n < 0 || w.k < 0 || !is_blocksize(w.blocksize))
    return refuse(op, "the weight's shape or blocksize is wrong");
  const int64_t blocks = (n + w.blocksize - 1) / w.blocksize;
  const auto holds = [](const View& v, DType dtype, int64_t least) {
    return v && v.dtype == dtype && v.is_contiguous() && v.size() >= least;
  };
  const bool nested = static_cast<bool>(w.nested_absmax);
  if (!holds(w.codes, DType::u8, (n + 1) / 2))
    return refuse(op, "the codes must be contiguous uint8 of " + std::to_string((n + 1) / 2) + " bytes");
  if (!holds(w.absmax, nested ? DType::u8 : DType::f32, blocks))
    return refuse(op, "absmax must be contiguous " + std::string(nested ? "uint8" : "float32") + " of " +
                          std::to_string(blocks) + " blocks");
  if (nested && (!holds(w.nested_absmax, DType::f32, (blocks + kNestedBlocksize - 1) / kNestedBlocksize) ||
                 !holds(w.nested_code, DType::f32, 256) || !holds(w.offset, DType::f32, 1)))
    return refuse(op, "a nested absmax needs contiguous float32 nested absmax, code [256] and offset [1]");
  if (w.layout == Layout4::tiled) {
    if (!can_tile(w.n, w.k, w.blocksize)) return refuse(op, "a weight of these sizes has no tiled layout");
    if (!is_aligned(w.codes.data, 16) || !is_aligned(w.absmax.data, w.nested_absmax ? 2 : 8))
      return refuse(op, "a tiled weight must be 16-byte aligned");
  }
  return {};
}

/// Of a power of two.
inline int log2_of(int64_t blocksize) {
  int log = 0;
  while ((int64_t{1} << log) < blocksize) ++log;
  return log;
}

__device__ constexpr float kCodebooks[2][16] = {
    {kNf4[0], kNf4[1], kNf4[2], kNf4[3], kNf4[4], kNf4[5], kNf4[6], kNf4[7], kNf4[8], kNf4[9], kNf4[10],
     kNf4[11], kNf4[12], kNf4[13], kNf4[14], kNf4[15]},
    {kFp4[0], kFp4[1], kFp4[2], kFp4[3], kFp4[4], kFp4[5], kFp4[6], kFp4[7], -0.0f, kFp4[9], kFp4[10],
     kFp4[11], kFp4[12], kFp4[13], kFp4[14], kFp4[15]}};

}  // namespace halfbyte::cuda
