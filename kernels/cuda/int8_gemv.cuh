// The LLM.int8() layer for up to 16 rows of x in one launch. int8_gemv.cu
#pragma once

#include "launch.cuh"

namespace halfbyte::cuda {

/// y [M, N] = the LLM.int8() product of x [M, K] and weight int8 [N, K] with scb float32 [N], + bias +
/// residual; x and y row-major, x 16-byte aligned, the weight 16-byte aligned.
template <typename T>
struct Linear8 {
  Output<T> out;
  const T* x;
  const int8_t* weight;
  const float* scb;
  int64_t m, k;
  float threshold;  // 0: no outliers
};

/// Whether int8_gemv() takes m rows of x: up to 16, with K % 16 = 0; sm_80 and up.
bool int8_gemv_takes(const Launch& on, int64_t m, int64_t k);
template <typename T>
cudaError_t int8_gemv(const Launch& on, const Linear8<T>& layer);

}  // namespace halfbyte::cuda
