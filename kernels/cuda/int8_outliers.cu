// Outlier columns of x [M, K] and of the int8 weight [N, K] side by side, for the tensor cores of the int8
// products: what the list on the device says, at most kOutlierSlots of them, filled up with zeros to a
// multiple of 16. Nothing is read or written when there are none. A thread makes 8 slots of a row.
#include "int8_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // slots of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Outliers<T> to, const T* __restrict__ x, const int8_t* __restrict__ weight, int64_t m,
                  int64_t n, int64_t k) {
  using Half = typename OutlierType<T>::type;
  constexpr int kPieces = OutlierType<T>::kPieces;
  let_next_start();
  wait_for_results();
  const int slots = min(to.list[0], kOutlierSlots / kPieces) * kPieces;
  if (slots <= kGatheredByProduct) return;
  __shared__ int columns[kOutlierSlots];
  for (int i = threadIdx.x; i < kOutlierSlots; i += kThreads)
    columns[i] = to.list[1 + min(i, slots - 1) / kPieces];
  __syncthreads();
  const int parts = (slots + 15) / 16 * (16 / kEach);  // of a row
  const int64_t size = (m + n) * parts;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / parts;
    const int first = static_cast<int>(i % parts) * kEach;
    const bool of_x = row < m;
    Vec<Half, kEach> out;
    if (of_x) {
      T in[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) in[j] = x[row * k + columns[first + j]];
#pragma unroll
      for (int j = 0; j < kEach; ++j) out.v[j] = piece_of(in[j], (first + j) % kPieces);
    } else {
      int8_t in[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) in[j] = weight[(row - m) * k + columns[first + j]];
#pragma unroll
      for (int j = 0; j < kEach; ++j) out.v[j] = from_float<Half>(in[j]);
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (first + j >= slots) out.v[j] = from_float<Half>(0.0f);
    }
    Half* const at = of_x ? to.x + row * kOutlierSlots : to.weight + (row - m) * kOutlierSlots;
    *reinterpret_cast<Vec<Half, kEach>*>(at + first) = out;
  }
}

}  // namespace

template <typename T>
cudaError_t gather_outliers(const Launch& on, const Product8<T>& product) {
  const int64_t n = product.out.n;
  LaunchShape shape;
  shape.grid = dim3(blocks_for((product.m + n) * 8, kThreads, on.multiprocessors * 8));
  shape.block = dim3(kThreads);
  return launch_kernel(on, shape, gather_kernel<T>, product.outliers, product.x, product.b, product.m, n,
                       product.k);
}

template cudaError_t gather_outliers(const Launch&, const Product8<half_t>&);
template cudaError_t gather_outliers(const Launch&, const Product8<bf16_t>&);
template cudaError_t gather_outliers(const Launch&, const Product8<float>&);

}  // namespace halfbyte::cuda
