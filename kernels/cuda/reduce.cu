// mean (in double) and count_nonfinite, over all elements. One block of 1024 threads makes the sum in a fixed
// order, so that a result does not change from run to run: what these reduce is small (absmax of a weight) or
// read once at load.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 1024;

__global__ void mean_kernel(float* y, const float* __restrict__ x, int64_t n) {
  __shared__ double partial[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) y[0] = static_cast<float>(partial[0] / static_cast<double>(n));
}

template <typename T>
__global__ void count_nonfinite_kernel(int32_t* y, const T* __restrict__ x, int64_t n) {
  int64_t count = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    count += !isfinite(to_float(x[i]));
  }
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
  if (threadIdx.x % 32 == 0 && count > 0) {
    // more than 2^31 - 1 are told as that many
    atomicAdd(y, static_cast<int32_t>(count < INT32_MAX ? count : INT32_MAX));
  }
}

}  // namespace

Status CudaBackend::mean(Queue queue, View y, View x) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.dtype != DType::f32 || x.dtype != DType::f32) return refuse_dtype("mean", "x and y must be float32");
  if (y.size() < 1 || !x.is_contiguous()) return refuse("mean", "x must be contiguous, y have an element");
  mean_kernel<<<1, kThreads, 0, stream(queue)>>>(y.as<float>(), x.as<const float>(), x.size());
  return check(cudaGetLastError(), "mean");
}

Status CudaBackend::count_nonfinite(Queue queue, View y, View x) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.dtype != DType::i32 || !is_float(x.dtype))
    return refuse_dtype("count_nonfinite", "x must be float, y int32");
  if (y.size() < 1 || !x.is_contiguous())
    return refuse("count_nonfinite", "x must be contiguous, y have an element");
  if (Status status = check(cudaMemsetAsync(y.data, 0, 4, stream(queue)), "count_nonfinite"); !status.ok())
    return status;
  if (x.size() == 0) return {};
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    count_nonfinite_kernel<T>
        <<<blocks_for(x.size(), 256 * 8, launch_.multiprocessors * 8), 256, 0, stream(queue)>>>(
            y.as<int32_t>(), x.as<const T>(), x.size());
  });
  return check(cudaGetLastError(), "count_nonfinite");
}

}  // namespace halfbyte::cuda
