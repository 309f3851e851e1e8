// int8 x int8 -> int32, exact, and the scaling of such sums as bitsandbytes does it.
//
//   M <= 8     stream_kernel: b is read once, 16 codes a lane and step, dp4a; a warp makes 2 columns
//   larger M   on tensor cores where K is a multiple of 16: int8_gemm_sm90.cu, int8_gemm_sm80.cu; on sm_75
//              the latter where cuBLASLt is not found; else tile_kernel (dp4a)
// K % 4 != 0 or unaligned rows: the same kernels, codes read byte by byte.
#include "cublaslt.h"
#include "int8_product.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;

/// Four codes from at; zeros behind the end.
__device__ __forceinline__ int load4(const int8_t* row, int64_t at, int64_t k, bool aligned) {
  if (aligned) return at < k ? *reinterpret_cast<const int*>(row + at) : 0;
  uint32_t word = 0;
  for (int i = 0; i < 4 && at + i < k; ++i)
    word |= static_cast<uint32_t>(static_cast<uint8_t>(row[at + i])) << (8 * i);
  return static_cast<int>(word);
}

template <int M>
__global__ void __launch_bounds__(kWarps * 32)
    stream_kernel(int32_t* acc, const int8_t* __restrict__ a, const int8_t* __restrict__ b, int64_t m,
                  int64_t n, int64_t k, bool wide) {
  constexpr int kColumns = 2;
  const int lane = threadIdx.x % 32;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32) * kColumns;
  if (first >= n) return;
  int sum[kColumns][M] = {};
  if (wide) {
#pragma unroll 2
    for (int64_t at = lane * 16; at < k; at += 512) {
      int4 weights[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        weights[c] = *reinterpret_cast<const int4*>(b + (first + c < n ? first + c : n - 1) * k + at);
      }
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int4 x = *reinterpret_cast<const int4*>(a + (i < m ? i : m - 1) * k + at);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum[c][i] = __dp4a(weights[c].x, x.x, sum[c][i]);
          sum[c][i] = __dp4a(weights[c].y, x.y, sum[c][i]);
          sum[c][i] = __dp4a(weights[c].z, x.z, sum[c][i]);
          sum[c][i] = __dp4a(weights[c].w, x.w, sum[c][i]);
        }
      }
    }
  } else {
    for (int64_t at = lane * 4; at < k; at += 128) {
      for (int i = 0; i < M && i < m; ++i) {
        const int x = load4(a + i * k, at, k, false);
        for (int c = 0; c < kColumns && first + c < n; ++c) {
          sum[c][i] = __dp4a(load4(b + (first + c) * k, at, k, false), x, sum[c][i]);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      int total = sum[c][i];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (lane == 0 && first + c < n && i < m) acc[i * n + first + c] = total;
    }
  }
}

/// 64 x 64 sums a block of 256 threads, 4 x 4 each; tiles of 32 codes a row.
__global__ void __launch_bounds__(256)
    tile_kernel(int32_t* acc, const int8_t* __restrict__ a, const int8_t* __restrict__ b, int64_t m,
                int64_t n, int64_t k, bool aligned) {
  __shared__ int as[8][68], bs[8][68];
  const int64_t first_m = blockIdx.y * int64_t{64}, first_n = blockIdx.x * int64_t{64};
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  int sum[4][4] = {};
  for (int64_t start = 0; start < k; start += 32) {
    for (int i = threadIdx.x; i < 64 * 8; i += 256) {
      const int r = i / 8, c = i % 8;
      as[c][r] = first_m + r < m ? load4(a + (first_m + r) * k, start + c * 4, k, aligned) : 0;
      bs[c][r] = first_n + r < n ? load4(b + (first_n + r) * k, start + c * 4, k, aligned) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int4 u = *reinterpret_cast<const int4*>(&as[c][row]),
                 v = *reinterpret_cast<const int4*>(&bs[c][column]);
      const int x[4] = {u.x, u.y, u.z, u.w}, w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = __dp4a(x[i], w[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first_m + row + i < m && first_n + column + j < n)
        acc[(first_m + row + i) * n + first_n + column + j] = sum[i][j];
    }
  }
}

template <typename T, typename B>
__global__ void dequantize_kernel(T* y, const int32_t* acc, const float* row_absmax, const float* col_absmax,
                                  const B* bias, int64_t size, int64_t n) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t column = i % n;
    const float scaled =
        __fmul_rn(__fmul_rn(static_cast<float>(acc[i]), row_absmax[i / n]), col_absmax[column]);
    y[i] = from_float<T>(fmaf(scaled, kInt8ProductScale, bias ? to_float(bias[column]) : 0.0f));
  }
}

}  // namespace

cudaError_t int8_product(const Launch& on, int32_t* acc, const int8_t* a, const int8_t* b, int64_t m,
                         int64_t n, int64_t k, void* workspace, size_t workspace_bytes) {
  const cudaStream_t stream = on.stream;
  const bool wide = k % 16 == 0 && is_aligned(a, 16) && is_aligned(b, 16);
  if (m <= 8) {
    const unsigned blocks = blocks_for(n, kWarps * 2, INT32_MAX);
    if (m == 1)
      stream_kernel<1><<<blocks, kWarps * 32, 0, stream>>>(acc, a, b, m, n, k, wide);
    else if (m <= 4)
      stream_kernel<4><<<blocks, kWarps * 32, 0, stream>>>(acc, a, b, m, n, k, wide);
    else
      stream_kernel<8><<<blocks, kWarps * 32, 0, stream>>>(acc, a, b, m, n, k, wide);
    return cudaGetLastError();
  }
  if (wide && k > 0 && on.arch < 80 && n % 4 == 0) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const DenseProduct product{CUDA_R_8I, CUDA_R_32I, m, n, k, a, b, nullptr, acc};
    if (cublaslt_product(device, stream, product, workspace, workspace_bytes)) return cudaSuccess;
  }
  if (wide && k > 0) {
    Product8<int32_t> product = {};
    product.out.y = acc;
    product.out.n = n;
    product.a = a;
    product.b = b;
    product.m = m;
    product.k = k;
    return on.wgmma ? int8_gemm_sm90(on, product) : int8_gemm_sm80(on, product);
  }
  const bool aligned = k % 4 == 0 && is_aligned(a, 4) && is_aligned(b, 4);
  for (int64_t first = 0; first < m; first += int64_t{65535} * 64) {
    const int64_t rows = m - first < int64_t{65535} * 64 ? m - first : int64_t{65535} * 64;
    const dim3 grid(static_cast<unsigned>((n + 63) / 64), static_cast<unsigned>((rows + 63) / 64));
    tile_kernel<<<grid, 256, 0, stream>>>(acc + first * n, a + first * k, b, rows, n, k, aligned);
  }
  return cudaGetLastError();
}

Status CudaBackend::int8_matmul(Queue queue, View acc, View a, View b) {
  if (Status status = enter(); !status.ok()) return status;
  if (a.ndim != 2 || b.ndim != 2 || acc.ndim != 2 || a.shape[1] != b.shape[1] || acc.shape[0] != a.shape[0] ||
      acc.shape[1] != b.shape[0] || !a.is_contiguous() || !b.is_contiguous() || !acc.is_contiguous()) {
    return refuse("int8_matmul", "a, b and acc must be [M, K], [N, K] and [M, N], contiguous");
  }
  if (a.dtype != DType::i8 || b.dtype != DType::i8 || acc.dtype != DType::i32) {
    return refuse_dtype("int8_matmul", "a and b must be int8, acc int32");
  }
  if (acc.size() == 0) return {};
  Launch on = launch_;
  on.stream = stream(queue);
  return check(int8_product(on, acc.as<int32_t>(), a.as<const int8_t>(), b.as<const int8_t>(), a.shape[0],
                            b.shape[0], a.shape[1], nullptr, 0),
               "int8_matmul");
}

Status CudaBackend::int8_matmul_dequantize(Queue queue, View y, View acc, View row_absmax, View col_absmax,
                                           View bias) {
  if (Status status = enter(); !status.ok()) return status;
  const int64_t n = acc.cols();
  if (acc.dtype != DType::i32 || !is_float(y.dtype) || row_absmax.dtype != DType::f32 ||
      col_absmax.dtype != DType::f32 || (bias && !is_float(bias.dtype))) {
    return refuse_dtype("int8_matmul_dequantize", "acc must be int32, y and bias float, absmax float32");
  }
  if (y.size() != acc.size() || row_absmax.size() < acc.rows() || col_absmax.size() < n ||
      (bias && bias.size() < n)) {
    return refuse("int8_matmul_dequantize", "y, absmax or bias do not fit acc");
  }
  if (y.size() == 0) return {};
  with_float_type(y.dtype, [&](auto* t) {
    with_float_type(bias ? bias.dtype : DType::f32, [&](auto* v) {
      using T = std::remove_pointer_t<decltype(t)>;
      using B = std::remove_pointer_t<decltype(v)>;
      dequantize_kernel<T, B><<<blocks_for(y.size(), 256, 1 << 16), 256, 0, stream(queue)>>>(
          y.as<T>(), acc.as<const int32_t>(), row_absmax.as<const float>(), col_absmax.as<const float>(),
          bias ? bias.as<const B>() : nullptr, y.size(), n);
    });
  });
  return check(cudaGetLastError(), "int8_matmul_dequantize");
}

}  // namespace halfbyte::cuda
