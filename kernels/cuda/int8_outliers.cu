// What outlier columns hold of x [M, K] beside its codes, side by side, for int8_gemm_sm90 with many rows:
// of kRestRounds rounds of columns, a row of kRoundSlots slots each, the last filled up with zeros.
// Beside it how many columns there are. A thread makes 8 slots of a row.
#include "int8_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(typename OutlierType<T>::type* to, const T* __restrict__ x,
                  const float* __restrict__ row_absmax, const ColumnMarks* marks, float threshold,
                  int32_t* count_to, int64_t m, int64_t k) {
  using Half = typename OutlierType<T>::type;
  constexpr int kPieces = OutlierType<T>::kPieces, kColumns = kRoundColumns<T>;
  __shared__ int columns[kRestRounds * kColumns], found;
  let_next_start();
  wait_for_results();
  if (threadIdx.x < 32) {
    const int end = static_cast<int>((k + 127) / 128 * 128);
    const int all = list_columns(marks, 0, end, 0, kRestRounds * kColumns, columns);
    if (threadIdx.x == 0) {
      found = all;
      if (blockIdx.x == 0) *count_to = all;
    }
  }
  __syncthreads();
  if (found == 0) return;
  const int count = min(found, kRestRounds * kColumns),
            rounds = (count - 1) / kColumns;  // those before the last
  const int last = count - rounds * kColumns;
  const int parts = rounds * (kRoundSlots / 8) + filled_slots(last * kPieces) / 8;  // of a row
  const int64_t size = m * parts;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / parts;
    const int part = static_cast<int>(i % parts), round = part / (kRoundSlots / 8);
    const int first = part % (kRoundSlots / 8) * 8, here = round == rounds ? last : kColumns;
    EightSlots<T> eight;
    eight.fetch(x + row * k, columns + round * kColumns, here, first);
    *reinterpret_cast<Vec<Half, 8>*>(to + row * (kRestRounds * kRoundSlots) + part * 8) =
        eight.rest(Rest<T>(row_absmax[row], threshold), here, first);
  }
}

}  // namespace

template <typename T>
cudaError_t gather_rest(const Launch& on, const Product8<T>& product) {
  LaunchShape shape;
  shape.grid = dim3(blocks_for(product.m * 8, kThreads, on.multiprocessors * 8));
  shape.block = dim3(kThreads);
  return launch_kernel(on, shape, gather_kernel<T>, product.rest, product.x, product.row_absmax,
                       product.marks, product.threshold, product.rest_count, product.m, product.k);
}

template cudaError_t gather_rest(const Launch&, const Product8<half_t>&);
template cudaError_t gather_rest(const Launch&, const Product8<bf16_t>&);
template cudaError_t gather_rest(const Launch&, const Product8<float>&);

}  // namespace halfbyte::cuda
