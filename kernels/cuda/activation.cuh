// The activations of a value in a register.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

/// `rough`: for results rounded to 16 bits, where the fast exponential and division are exact enough.
template <bool rough>
__device__ __forceinline__ float activate(Activation act, float x) {
  switch (act) {
    case Activation::silu:
      return rough ? __fdividef(x, 1.0f + __expf(-x)) : x / (1.0f + expf(-x));
    case Activation::gelu:
      return 0.5f * x * erfcf(x * -0.70710678118654752f);  // exact in the negative tail as well
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::sigmoid:
      return 1.0f / (1.0f + expf(-x));
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
