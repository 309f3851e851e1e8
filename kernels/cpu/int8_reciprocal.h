// The factor 127 / absmax of row-wise quantisation, as the GPUs that define the format compute it.
//
// There it is 127 times an approximate reciprocal, which for some operands is one unit in the last place away
// from the correctly rounded one. That decides elements whose exact code is a half, which float16 input has
// plenty of. The reciprocal's error depends on the mantissa alone, and float16 and bfloat16 maxima have at
// most ten mantissa bits, so that two bitmaps over them, measured on the hardware, say where it is one unit
// low or high. Other maxima (float32 input) use the correctly rounded reciprocal.
#pragma once

#include "../formats.h"

namespace halfbyte::cpu {

// clang-format off
constexpr uint64_t kReciprocalLow[16] = {
    0x4000400100004040ull, 0xc000000001c02040ull, 0x0009000100000080ull, 0x0000000028400000ull,
    0x0000000080040000ull, 0x0000000020000020ull, 0x2800000080020000ull, 0x0000000006000000ull,
    0x0000400000000000ull, 0x0000004000000000ull, 0x0000000000000000ull, 0x0000800000000000ull,
    0x0000000000008000ull, 0x0000000000000000ull, 0x3440000000000000ull, 0x0104000000000020ull,
};
constexpr uint64_t kReciprocalHigh[16] = {
    0x0001000000160800ull, 0x0002030608000000ull, 0x0000000002180400ull, 0x1000000600021800ull,
    0x0003050000000010ull, 0x0008000004000000ull, 0x0080020203081804ull, 0x0a04010200080462ull,
    0x0018000880090380ull, 0x0008000000000000ull, 0x3000801808000d80ull, 0x0000000001100000ull,
    0x008020a0002e0000ull, 0x2000550000000000ull, 0x0001000109000000ull, 0x0000002018000100ull,
};
// clang-format on

/// absmax > 0 and normal.
static inline float int8_factor(float absmax) {
  const uint32_t bits = float_to_bits(absmax);
  uint32_t reciprocal = float_to_bits(1.0f / absmax);
  if ((bits & 0x1fffu) == 0 && absmax <= 3.0e38f) {
    const uint32_t mantissa = (bits >> 13) & 1023u;
    reciprocal += static_cast<uint32_t>(kReciprocalHigh[mantissa >> 6] >> (mantissa & 63u)) & 1u;
    reciprocal -= static_cast<uint32_t>(kReciprocalLow[mantissa >> 6] >> (mantissa & 63u)) & 1u;
  }
  return 127.0f * bits_to_float(reciprocal);
}

}  // namespace halfbyte::cpu
