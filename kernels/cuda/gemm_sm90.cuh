#pragma once

#include "output.cuh"

namespace halfbyte::cuda {

/// gemm_sm90.cu: y [m, n] = x [m, k] w [n, k]^T, 16-bit, on sm_90a. K % 8 = 0, x and w on 16 bytes, m and n
/// below 2^31.
template <typename T>
cudaError_t gemm_sm90(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m, int64_t k);

}  // namespace halfbyte::cuda
