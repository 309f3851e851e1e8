// 8-bit blockwise quantisation with a 256-entry ascending code, and its inverse.
//
// The rule is bitsandbytes': x / absmax is searched from entry 127 in steps 64, 32, ... 1; the final pivot is
// then compared with the midpoint to its neighbour on the side where x lies, strictly, so a tie stays at the
// pivot. Quantise: a thread block a quantisation block, which is read again from cache after its absmax is
// known; the code is in shared memory. Any blocksize.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

__device__ __forceinline__ int nearest(const float* code, float x) {
  int pivot = 127, upper = 255, lower = 0;
  float value = code[pivot], above = 1.0f, below = code[0];
#pragma unroll
  for (int step = 64; step > 0; step /= 2) {
    if (x > value) {
      lower = pivot;
      below = value;
      pivot += step;
    } else {
      upper = pivot;
      above = value;
      pivot -= step;
    }
    value = code[pivot];
  }
  if (upper == 255) above = code[255];
  if (lower == 0) below = code[0];
  if (x > value) return x > (above + value) * 0.5f ? upper : pivot;
  return x < (below + value) * 0.5f ? lower : pivot;
}

template <typename T>
__global__ void quantize_kernel(uint8_t* __restrict__ codes, float* __restrict__ absmax,
                                const T* __restrict__ x, const float* __restrict__ code, int64_t n,
                                int64_t blocksize, int64_t blocks) {
  __shared__ float table[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = code[i];
  __syncthreads();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t begin = block * blocksize, end = begin + blocksize < n ? begin + blocksize : n;
    float most = 0.0f;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) most = fmaxf(most, fabsf(to_float(x[i])));
    most = blockDim.x == 32 ? warp_max(most) : block_max(most);
    if (threadIdx.x == 0) absmax[block] = most;
    const float scale = most >= 1.17549435e-38f ? reciprocal(most) : 0.0f;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      codes[i] = static_cast<uint8_t>(nearest(table, to_float(x[i]) * scale));
    }
  }
}

template <typename T>
__global__ void dequantize_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes,
                                  const float* __restrict__ absmax, const float* __restrict__ code, int64_t n,
                                  int64_t blocksize) {
  __shared__ float table[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = code[i];
  __syncthreads();
  constexpr int N = 4;
  for (int64_t begin = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N; begin < n;
       begin += static_cast<int64_t>(gridDim.x) * blockDim.x * N) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (begin + j < n)
        y[begin + j] = from_float<T>(table[codes[begin + j]] * absmax[(begin + j) / blocksize]);
    }
  }
}

Status check_blockwise(const char* op, View codes, View absmax, View x, View code, int64_t blocksize) {
  const int64_t n = x.size();
  if (blocksize < 1) return refuse(op, "blocksize must be positive");
  if (!is_float(x.dtype) || codes.dtype != DType::u8 || absmax.dtype != DType::f32 ||
      code.dtype != DType::f32) {
    return refuse_dtype(op, "values must be float, codes uint8, absmax and code float32");
  }
  if (codes.size() != n || code.size() != 256 || absmax.size() < (n + blocksize - 1) / blocksize ||
      !x.is_contiguous() || !codes.is_contiguous()) {
    return refuse(op, "codes, absmax and code do not fit the values");
  }
  return {};
}

}  // namespace

Status CudaBackend::quantize_blockwise(Queue queue, View codes, View absmax, View x, View code,
                                       int64_t blocksize) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_blockwise("quantize_blockwise", codes, absmax, x, code, blocksize);
      !status.ok()) {
    return status;
  }
  const int64_t n = x.size();
  if (n == 0) return {};
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  const int threads = blocksize <= 128 ? 32 : blocksize <= 1024 ? 128 : 256;
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    quantize_kernel<T><<<blocks_for(blocks, 1, 1 << 16), threads, 0, stream(queue)>>>(
        codes.as<uint8_t>(), absmax.as<float>(), x.as<const T>(), code.as<const float>(), n, blocksize,
        blocks);
  });
  return check(cudaGetLastError(), "quantize_blockwise");
}

Status CudaBackend::dequantize_blockwise(Queue queue, View y, View codes, View absmax, View code,
                                         int64_t blocksize) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_blockwise("dequantize_blockwise", codes, absmax, y, code, blocksize);
      !status.ok()) {
    return status;
  }
  const int64_t n = y.size();
  if (n == 0) return {};
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    dequantize_kernel<T><<<blocks_for(n, 256 * 4), 256, 0, stream(queue)>>>(
        y.as<T>(), codes.as<const uint8_t>(), absmax.as<const float>(), code.as<const float>(), n, blocksize);
  });
  return check(cudaGetLastError(), "dequantize_blockwise");
}

}  // namespace halfbyte::cuda
