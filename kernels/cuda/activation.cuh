// The activations of a value in a register.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

/// 2^x, and e^x by it, as the hardware takes it: results below the normal floats are 0.
__device__ __forceinline__ float rough_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float kLog2E = 1.44269504088896341f;

/// The complement of the error function to a few millionths of its value, in the tail too: a polynomial in
/// 1 / (1 + |x| / 2) in the exponent (Press et al., Numerical Recipes, "erfcc"; here to the base of 2).
__device__ __forceinline__ float rough_erfc(float x) {
  const float z = fabsf(x), t = reciprocal(fmaf(0.5f, z, 1.0f));
  float p = 0.17087277f * kLog2E;
  p = fmaf(p, t, -0.82215223f * kLog2E);
  p = fmaf(p, t, 1.48851587f * kLog2E);
  p = fmaf(p, t, -1.13520398f * kLog2E);
  p = fmaf(p, t, 0.27886807f * kLog2E);
  p = fmaf(p, t, -0.18628806f * kLog2E);
  p = fmaf(p, t, 0.09678418f * kLog2E);
  p = fmaf(p, t, 0.37409196f * kLog2E);
  p = fmaf(p, t, 1.00002368f * kLog2E);
  p = fmaf(p, t, -1.26551223f * kLog2E);
  const float tail = t * rough_exp2(fmaf(-kLog2E * z, z, p));
  return x < 0.0f ? 2.0f - tail : tail;
}

/// `rough`: for results rounded to 16 bits, where the fast exponential and division are exact enough.
template <bool rough>
__device__ __forceinline__ float activate(Activation act, float x) {
  switch (act) {
    case Activation::silu:
      return rough ? __fdividef(x, 1.0f + __expf(-x)) : x / (1.0f + expf(-x));
    case Activation::gelu:
      // exact in the negative tail as well
      return 0.5f * x * (rough ? rough_erfc(x * -0.70710678118654752f) : erfcf(x * -0.70710678118654752f));
    case Activation::gelu_tanh:
      // x / 2 (1 + tanh u) is x times the sigmoid of 2 u
      if (rough) return __fdividef(x, 1.0f + __expf(-1.59576912160573071f * (x + 0.044715f * x * x * x)));
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::sigmoid:
      return rough ? reciprocal(1.0f + rough_exp2(-kLog2E * x)) : 1.0f / (1.0f + expf(-x));
    case Activation::tanh:
      return tanhf(x);
    case Activation::exp:
      return expf(x);
    case Activation::neg:
      return -x;
    default:
      return x;
  }
}

}  // namespace halfbyte::cuda
