// What every .cu file of the CUDA backend uses: element types, conversions, 16-byte vectors, block
// reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../checks.h"
#include "../workspace.h"
#include "cuda_backend.h"

namespace halfbyte::cuda {

using half_t = __half;
using bf16_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
  return __float2bfloat16_rn(x);
}

/// Calls body with a null pointer of the device's element type for a float dtype.
template <typename Body>
auto with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f16:
      return body(static_cast<half_t*>(nullptr));
    case DType::bf16:
      return body(static_cast<bf16_t*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

/// 1 / x as bitsandbytes' kernels take it: the hardware's approximation, subnormals flushed.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// N elements moved by one instruction where N * sizeof(T) is 16, 8 or 4.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

/// A vector written by one instruction: a plain assignment the compiler may take apart into its elements.
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* to, const Vec<T, N>& vector) {
  if constexpr (N * sizeof(T) == 16)
    __stcg(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&vector));
  else
    *reinterpret_cast<Vec<T, N>*>(to) = vector;
}

/// Two values of a 16-bit type in one register.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  Vec<T, 2> pair;
  pair.v[0] = from_float<T>(low);
  pair.v[1] = from_float<T>(high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__host__ __device__ inline bool is_aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// Largest over the block, in every thread. Safe to call again at once.
__device__ __forceinline__ float block_max(float x) {
  __shared__ float partial[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_max(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  if (warp == 0) {
    const float most = warp_max(lane < static_cast<int>(blockDim.x + 31) / 32 ? partial[lane] : -INFINITY);
    if (lane == 0) partial[32] = most;
  }
  __syncthreads();
  const float most = partial[32];
  __syncthreads();
  return most;
}

inline unsigned blocks_for(int64_t work, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

}  // namespace halfbyte::cuda
