// acc int32 [M, N] = a int8 [M, K] b int8 [N, K]^T, queued: cuBLASLt where it can, else dp4a kernels of our
// own.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

cudaError_t int8_product(int device, cudaStream_t stream, int32_t* acc, const int8_t* a, const int8_t* b,
                         int64_t m, int64_t n, int64_t k, void* workspace, size_t workspace_bytes);

}  // namespace halfbyte::cuda
