// Dense y = x W^T + bias + residual.
//
//   M <= 8            stream_kernel: W is read once at memory speed, whatever the dtypes of x and W; 16-bit
//                     x of more than 2 rows goes to cuBLASLt where it is
//   16-bit, one dtype cuBLASLt when it was found at run time and there is no bias, else gemm_sm90.cu or
//                     gemm_sm80.cuh; on the tensor cores
//   float32           cuBLASLt, else tile_kernel
//   everything else   tile_kernel: mixed dtypes, K % 8 != 0, unaligned operands; fp32 multiply-adds from
//                     shared memory
#include <algorithm>

#include "cublaslt.h"
#include "gemm_sm80.cuh"
#include "gemm_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kStreamed = 8;        // most rows of x that stream_kernel takes
constexpr int kStreamedHalves = 2;  // of 16-bit x, up to which it is faster than cuBLASLt

/// A warp makes kRows outputs for each of M rows of x. A lane's step is 16 bytes of W where rows allow it.
template <typename T, typename W, int M, int N>
__global__ void __launch_bounds__(kWarps * 32)
    stream_kernel(Output<T> out, const T* __restrict__ x, const W* __restrict__ w, int64_t k,
                  int64_t rows_of_x) {
  constexpr int kRows = 2;
  const int lane = threadIdx.x % 32;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32) * kRows;
  if (first >= out.n) return;
  float acc[kRows][M] = {};
#pragma unroll 2
  for (int64_t at = lane * N; at < k; at += 32 * N) {
    Vec<W, N> weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r < out.n ? first + r : out.n - 1;
      weights[r] = *reinterpret_cast<const Vec<W, N>*>(w + row * k + at);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int64_t row = m < rows_of_x ? m : rows_of_x - 1;
      const auto in = *reinterpret_cast<const Vec<T, N>*>(x + row * k + at);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < N; ++i) acc[r][m] = fmaf(to_float(weights[r].v[i]), to_float(in.v[i]), acc[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float total = warp_sum(acc[r][m]);
      if (lane == 0 && first + r < out.n && m < rows_of_x) out.store(m, first + r, total);
    }
  }
}

/// 64 x 64 outputs a block of 256 threads, 4 x 4 each; tiles of 16 k as float in shared memory.
template <typename T, typename W>
__global__ void __launch_bounds__(256)
    tile_kernel(Output<T> out, const T* __restrict__ x, const W* __restrict__ w, int64_t m, int64_t k) {
  __shared__ float xs[16][68], ws[16][68];
  const int64_t first_m = blockIdx.y * int64_t{64}, first_n = blockIdx.x * int64_t{64};
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float acc[4][4] = {};
  for (int64_t start = 0; start < k; start += 16) {
    for (int i = threadIdx.x; i < 64 * 16; i += 256) {
      const int r = i / 16, c = i % 16;
      const bool inside = start + c < k;
      xs[c][r] = inside && first_m + r < m ? to_float(x[(first_m + r) * k + start + c]) : 0.0f;
      ws[c][r] = inside && first_n + r < out.n ? to_float(w[(first_n + r) * k + start + c]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const float4 a = *reinterpret_cast<const float4*>(&xs[c][row]),
                   b = *reinterpret_cast<const float4*>(&ws[c][column]);
      const float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(u[i], v[j], acc[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first_m + row + i < m && first_n + column + j < out.n) {
        out.store(first_m + row + i, first_n + column + j, acc[i][j]);
      }
    }
  }
}

template <typename T, typename W>
void launch_stream(cudaStream_t stream, const Output<T>& out, const T* x, const W* w, int64_t m, int64_t k) {
  constexpr int N = 16 / (sizeof(T) > sizeof(W) ? sizeof(T) : sizeof(W));
  const bool wide = k % N == 0 && is_aligned(x, sizeof(T) * N) && is_aligned(w, sizeof(W) * N);
  const auto run = [&](auto kernel) {
    kernel<<<blocks_for(out.n, kWarps * 2, INT32_MAX), kWarps * 32, 0, stream>>>(out, x, w, k, m);
  };
  if (!wide) return run(stream_kernel<T, W, kStreamed, 1>);
  if (m == 1)
    run(stream_kernel<T, W, 1, N>);
  else if (m <= 4)
    run(stream_kernel<T, W, 4, N>);
  else
    run(stream_kernel<T, W, kStreamed, N>);
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::f16 ? CUDA_R_16F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

/// y += bias by rows, for the library's product, which has the residual already.
template <typename T>
__global__ void bias_kernel(Output<T> out, int64_t elements) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < elements;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out.y[i] = from_float<T>(to_float(out.y[i]) + out.bias_at(i % out.n));
  }
}

bool wants_library(const View& x, const View& weight) {
  return x.dtype == weight.dtype && x.rows() > (x.dtype == DType::f32 ? kStreamed : kStreamedHalves);
}

}  // namespace

size_t CudaBackend::linear_workspace(const View& x, const View& weight) const {
  return wants_library(x, weight) && has_cublaslt() ? kCublasWorkspace : 0;
}

Status CudaBackend::linear(Queue queue, View y, View x, View weight, const Epilogue& epilogue,
                           View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (weight.ndim != 2 || !weight.is_contiguous() || !is_float(weight.dtype)) {
    return refuse("linear", "the weight must be float [N, K], contiguous");
  }
  const int64_t m = x.rows(), n = weight.shape[0], k = weight.shape[1];
  if (Status status = check_linear("linear", y, x, n, k, epilogue); !status.ok()) return status;
  if (y.size() == 0) return {};
  const cudaStream_t on = stream(queue);
  // The library adds the residual before its rounding; a bias would be a second one, so it is left to our own
  // kernels in 16 bits. In float32 it is one more exact-enough addition.
  const bool library =
      k > 0 && wants_library(x, weight) && (!epilogue.bias || x.dtype == DType::f32) && has_cublaslt();
  if (library) {
    const DenseProduct product{data_type(x.dtype),
                               data_type(y.dtype),
                               m,
                               n,
                               k,
                               x.data,
                               weight.data,
                               epilogue.residual ? epilogue.residual.data : nullptr,
                               y.data};
    if (cublaslt_product(index_, on, product, workspace ? workspace.data : nullptr,
                         workspace ? static_cast<size_t>(workspace.size()) : 0)) {
      if (epilogue.bias) {
        bias_kernel<float>
            <<<blocks_for(y.size(), 256, 1 << 16), 256, 0, on>>>(output_of<float>(y, epilogue), y.size());
      }
      return check(cudaGetLastError(), "linear");
    }
  }
  cudaError_t error = cudaSuccess;
  with_float_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Output<T> out = output_of<T>(y, epilogue);
    if constexpr (sizeof(T) == 2) {
      // sm_75 multiplies float16 alone on its tensor cores
      const bool on_tensor_cores = launch_.arch >= 80 || std::is_same_v<T, half_t>;
      if (on_tensor_cores && m > kStreamed && weight.dtype == x.dtype && k % 8 == 0 && k > 0 &&
          std::max({m, n, k}) <= INT32_MAX && is_aligned(x.data, 16) && is_aligned(weight.data, 16)) {
        Launch tensor = launch_;
        tensor.stream = on;
        const auto* w = weight.as<const T>();
        error = launch_.wgmma ? gemm_sm90(tensor, out, x.as<const T>(), w, m, k)
                              : gemm_sm80(tensor, out, x.as<const T>(), w, m, k);
        return;
      }
    }
    with_float_type(weight.dtype, [&](auto* v) {
      using W = std::remove_pointer_t<decltype(v)>;
      if (m <= kStreamed) {
        launch_stream<T, W>(on, out, x.as<const T>(), weight.as<const W>(), m, k);
      } else {
        // grid.y holds 65535 row tiles: longer inputs go in parts
        for (int64_t first = 0; first < m; first += int64_t{65535} * 64) {
          const int64_t rows = m - first < int64_t{65535} * 64 ? m - first : int64_t{65535} * 64;
          Output<T> part = out;
          part.y += first * n;
          if (part.residual) part.residual += first * n;
          const dim3 grid(static_cast<unsigned>((n + 63) / 64), static_cast<unsigned>((rows + 63) / 64));
          tile_kernel<T, W>
              <<<grid, 256, 0, on>>>(part, x.as<const T>() + first * k, weight.as<const W>(), rows, k);
        }
      }
    });
    error = cudaGetLastError();
  });
  return check(error, "linear");
}

}  // namespace halfbyte::cuda
