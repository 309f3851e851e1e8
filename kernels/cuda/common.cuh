// What every .cu file of the CUDA backend uses: element types, conversions, 16-byte vectors, block
// reductions, the layout of a strided view, and launching with a checked return.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

/// Sum over the block, in every thread. Safe to call again at once.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  if (warp == 0) {
    const float total = warp_sum(lane < static_cast<int>(blockDim.x + 31) / 32 ? partial[lane] : 0.0f);
    if (lane == 0) partial[32] = total;
  }
  __syncthreads();
  const float total = partial[32];
  __syncthreads();
  return total;
}
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

/// A view's shape and strides as a kernel parameter, with neighbouring dimensions joined where all views
/// allow it.
struct Strides {
  int64_t s[kMaxDims];
};
struct Extent {
  int ndim;
  int64_t size;
  int64_t shape[kMaxDims];
};

/// Joins dimensions that are contiguous to each other in every one of the views; returns what is left.
template <int N>
Extent join_dims(const View (&views)[N], Strides (&strides)[N]) {
  Extent e{0, views[0].size(), {}};
  for (int d = 0; d < views[0].ndim; ++d) {
    const int64_t length = views[0].shape[d];
    if (length == 1) continue;
    bool joins = e.ndim > 0;
    for (int i = 0; i < N && joins; ++i) joins = strides[i].s[e.ndim - 1] == views[i].strides[d] * length;
    if (joins) {
      e.shape[e.ndim - 1] *= length;
      for (int i = 0; i < N; ++i) strides[i].s[e.ndim - 1] = views[i].strides[d];
    } else {
      e.shape[e.ndim] = length;
      for (int i = 0; i < N; ++i) strides[i].s[e.ndim] = views[i].strides[d];
      ++e.ndim;
    }
  }
  if (e.ndim == 0) {
    e.ndim = 1;
    e.shape[0] = e.size;
    for (int i = 0; i < N; ++i) strides[i].s[0] = 1;
  }
  return e;
}

inline unsigned blocks_for(int64_t work, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

/// Parts of a workspace start where any access is aligned.
inline size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline Status refuse(const char* op, const std::string& what) {
  return Status::error(Code::shape, std::string(op) + ": " + what);
}
inline Status refuse_dtype(const char* op, const std::string& what) {
  return Status::error(Code::dtype, std::string(op) + ": " + what);
}

}  // namespace halfbyte::cuda
