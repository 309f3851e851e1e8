// cuBLASLt, found at run time: the few entry points that the dense products use, declared here because the
// library is neither linked nor needed. Searched: HALFBYTE_CUBLASLT (a path, or "off"), the loader's path,
// /usr/local/cuda, then the nvidia wheels of the Pythons on this machine; version 13, then 12.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace halfbyte::cuda {

/// One dense product per description: D [M, N] = A [M, K] B [N, K]^T + C, all row-major, fp32 accumulation.
/// int8 operands accumulate and come out in int32.
struct DenseProduct {
  cudaDataType_t type;         // of A and B
  cudaDataType_t result_type;  // of C and D
  int64_t m, n, k;
  const void* a;
  const void* b;
  const void* c;  // or null
  void* d;
};

constexpr size_t kCublasWorkspace = size_t{32} << 20;

/// True when the library was found. `where` tells its path, or what was tried.
bool has_cublaslt(std::string* where = nullptr);

/// Queues the product; false when cuBLASLt has no way to do it (alignment, shape), which the caller then does
/// itself.
bool cublaslt_product(int device, cudaStream_t stream, const DenseProduct& product, void* workspace,
                      size_t workspace_bytes);

}  // namespace halfbyte::cuda
