// mean (in double) and count_nonfinite, over all elements. The mean is the sum of the sums of up to kBlocks
// blocks, each in an order that depends on the size alone, so that a result does not change from run to run.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 1024;
constexpr int64_t kLeast = 16384;  // elements a block

/// In every thread of the block.
__device__ double block_sum(double x) {
  __shared__ double partial[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0;
  for (double part : partial) x += part;
  return x;
}

__global__ void __launch_bounds__(kThreads)
    sums_kernel(double* sums, const float* __restrict__ x, int64_t n, bool wide) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, vectors = wide ? n / 4 : 0;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = first; i < vectors; i += step) {
    const float4 some = reinterpret_cast<const float4*>(x)[i];
    sum += static_cast<double>(some.x) + some.y + some.z + some.w;
  }
  for (int64_t i = vectors * 4 + first; i < n; i += step) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) mean_kernel(float* y, const double* sums, int count, int64_t n) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) y[0] = static_cast<float>(sum / static_cast<double>(n));
}

template <typename T>
__global__ void count_nonfinite_kernel(int32_t* y, const T* __restrict__ x, int64_t n, bool wide) {
  constexpr int N = 16 / sizeof(T);
  int64_t count = 0;
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t vectors = wide ? n / N : 0;
#pragma unroll 4
  for (int64_t i = first; i < vectors; i += step) {
    const auto some = reinterpret_cast<const Vec<T, N>*>(x)[i];
    int found = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) found += !isfinite(to_float(some.v[j]));
    count += found;
  }
  for (int64_t i = vectors * N + first; i < n; i += step) count += !isfinite(to_float(x[i]));
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
  if (threadIdx.x % 32 == 0 && count > 0) {
    // more than 2^31 - 1 are told as that many
    atomicAdd(y, static_cast<int32_t>(count < INT32_MAX ? count : INT32_MAX));
  }
}

}  // namespace

size_t CudaBackend::mean_workspace(const View&) const { return kBlocks * sizeof(double); }

Status CudaBackend::mean(Queue queue, View y, View x, View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.dtype != DType::f32 || x.dtype != DType::f32) return refuse_dtype("mean", "x and y must be float32");
  if (y.size() < 1 || !x.is_contiguous()) return refuse("mean", "x must be contiguous, y have an element");
  if (!workspace || static_cast<size_t>(workspace.size()) < mean_workspace(x))
    return refuse("mean", "the workspace is too small");
  const unsigned blocks = x.size() == 0 ? 1 : blocks_for(x.size(), kLeast, kBlocks);
  auto* sums = workspace.as<double>();
  sums_kernel<<<blocks, kThreads, 0, stream(queue)>>>(sums, x.as<const float>(), x.size(),
                                                      is_aligned(x.data, 16));
  mean_kernel<<<1, kThreads, 0, stream(queue)>>>(y.as<float>(), sums, static_cast<int>(blocks), x.size());
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
            y.as<int32_t>(), x.as<const T>(), x.size(), is_aligned(x.data, 16));
  });
  return check(cudaGetLastError(), "count_nonfinite");
}

}  // namespace halfbyte::cuda
