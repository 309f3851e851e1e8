// LLM.int8() row quantisation and its inverse.
//
// A block a row: absmax over the elements below the threshold, then the codes, from registers where the row
// fits (kKept vectors a thread), else from cache. Elements at or above the threshold mark their column in a
// byte mask (plain stores of 1: the order does not matter) and have code 0. With a threshold a second launch
// zeroes the marked columns in every row; it reads little else than the mask when there are none. Rules to
// the letter (bitsandbytes): codes = rint(x * (127 / absmax)); an all-zero row gives zeros; a NaN gives 0.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

__device__ __forceinline__ int8_t encode(float x, float scale) {
  const float q = rintf(x * scale);
  // NaN (0 * inf, or a NaN element) fails every comparison
  return q >= -127.0f && q <= 127.0f ? static_cast<int8_t>(q)
         : q > 127.0f                ? int8_t{127}
         : q < -127.0f               ? int8_t{-127}
                                     : int8_t{0};
}

template <typename T, int N>
__device__ __forceinline__ void read(const T* x, bool fp16_input, float (&out)[N]) {
  const auto in = *reinterpret_cast<const Vec<T, N>*>(x);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    out[j] = to_float(in.v[j]);
    if (fp16_input) out[j] = __half2float(__float2half_rn(out[j]));
  }
}

template <typename T, int N>
__global__ void quantize_kernel(int8_t* codes, float* row_absmax, uint8_t* mask, const T* x, int64_t rows,
                                int64_t cols, float threshold, bool fp16_input) {
  constexpr int kKept = 2;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N, first = threadIdx.x * N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* in = x + row * cols;
    int8_t* to = codes + row * cols;
    float kept[kKept][N];
    float most = 0.0f;
    const auto look = [&](int64_t at, float(&v)[N]) {
      read(in + at, fp16_input, v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (threshold > 0.0f && fabsf(v[j]) >= threshold) {
          mask[at + j] = 1;
          v[j] = 0.0f;
        }
        most = fmaxf(most, fabsf(v[j]));
      }
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * step < cols) look(first + i * step, kept[i]);
    }
    for (int64_t at = first + kKept * step; at < cols; at += step) {
      float v[N];
      look(at, v);
    }
    most = block_max(most);
    if (threadIdx.x == 0) row_absmax[row] = most;
    // 127 / absmax overflows for the smallest numbers: there both sides are scaled up, elsewhere by one
    const float lift = most < 1e-35f ? 1.2676506e30f : 1.0f;
    const float scale = 127.0f * reciprocal(most * lift);
    const auto finish = [&](int64_t at, const float(&v)[N]) {
      Vec<int8_t, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.v[j] = encode(v[j] * lift, scale);
      *reinterpret_cast<Vec<int8_t, N>*>(to + at) = out;
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * step < cols) finish(first + i * step, kept[i]);
    }
    for (int64_t at = first + kKept * step; at < cols; at += step) {
      float v[N];
      look(at, v);
      finish(at, v);
    }
  }
}

/// Codes of marked columns become 0. A block looks at 256 columns and, where any is marked, goes down its
/// share of rows.
__global__ void zero_columns_kernel(int8_t* codes, const uint8_t* mask, int64_t rows, int64_t cols) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (column >= cols || !mask[column]) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) codes[row * cols + column] = 0;
}

template <typename T, int N>
__global__ void dequantize_kernel(T* y, const int8_t* codes, const float* scb, int64_t rows, int64_t cols) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float scale = scb[row];
    for (int64_t i = threadIdx.x * N; i < cols; i += static_cast<int64_t>(blockDim.x) * N) {
      const auto in = *reinterpret_cast<const Vec<int8_t, N>*>(codes + row * cols + i);
      Vec<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.v[j] = from_float<T>(in.v[j] * scale * kInt8Scale);
      *reinterpret_cast<Vec<T, N>*>(y + row * cols + i) = out;
    }
  }
}

unsigned threads_for(int64_t steps) {
  const int64_t wanted = (steps / 2 + 31) / 32 * 32;  // two vectors a thread
  return static_cast<unsigned>(wanted > 512 ? 512 : wanted < 32 ? 32 : wanted);
}

}  // namespace

Status CudaBackend::int8_quantize_rows(Queue queue, View codes, View row_absmax, View outlier_mask, View x,
                                       float threshold, bool fp16_input) {
  if (Status status = enter(); !status.ok()) return status;
  const int64_t rows = x.rows(), cols = x.cols();
  if (!is_float(x.dtype) || codes.dtype != DType::i8 || row_absmax.dtype != DType::f32) {
    return refuse_dtype("int8_quantize_rows", "x must be float, codes int8, row_absmax float32");
  }
  if (codes.size() != x.size() || row_absmax.size() < rows || !x.is_contiguous() || !codes.is_contiguous()) {
    return refuse("int8_quantize_rows", "codes or row_absmax do not fit x");
  }
  if (threshold > 0.0f && (!outlier_mask || outlier_mask.dtype != DType::u8 || outlier_mask.size() != cols)) {
    return refuse("int8_quantize_rows", "a threshold needs an outlier mask uint8 [K]");
  }
  const cudaStream_t on = stream(queue);
  if (threshold > 0.0f && cols > 0) {
    Status status = check(cudaMemsetAsync(outlier_mask.data, 0, cols, on), "int8_quantize_rows");
    if (!status.ok()) return status;
  }
  if (x.size() == 0) {
    return rows == 0 ? Status{}
                     : check(cudaMemsetAsync(row_absmax.data, 0, rows * 4, on), "int8_quantize_rows");
  }
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const auto run = [&](auto width) {
      constexpr int N = decltype(width)::value;
      const unsigned blocks = blocks_for(rows, 1, 1 << 16), threads = threads_for(cols / N);
      uint8_t* mask = threshold > 0.0f ? outlier_mask.as<uint8_t>() : nullptr;
      quantize_kernel<T, N><<<blocks, threads, 0, on>>>(codes.as<int8_t>(), row_absmax.as<float>(), mask,
                                                        x.as<const T>(), rows, cols, threshold, fp16_input);
      if (mask) {
        const dim3 grid(blocks_for(cols, 256, INT32_MAX), blocks_for(rows, 16, 64));
        zero_columns_kernel<<<grid, 256, 0, on>>>(codes.as<int8_t>(), mask, rows, cols);
      }
    };
    constexpr int N = 16 / sizeof(T);
    const bool wide = cols % N == 0 && is_aligned(x.data, 16) && is_aligned(codes.data, N) &&
                      (threshold <= 0.0f || is_aligned(outlier_mask.data, N));
    if (wide)
      run(std::integral_constant<int, N>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  return check(cudaGetLastError(), "int8_quantize_rows");
}

Status CudaBackend::int8_dequantize_rows(Queue queue, View y, View codes, View scb) {
  if (Status status = enter(); !status.ok()) return status;
  const int64_t rows = codes.rows(), cols = codes.cols();
  if (!is_float(y.dtype) || codes.dtype != DType::i8 || scb.dtype != DType::f32) {
    return refuse_dtype("int8_dequantize_rows", "y must be float, codes int8, scb float32");
  }
  if (y.size() != codes.size() || scb.size() < rows || !y.is_contiguous() || !codes.is_contiguous()) {
    return refuse("int8_dequantize_rows", "y or scb do not fit codes");
  }
  if (y.size() == 0) return {};
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    constexpr int N = 16 / sizeof(T);
    const auto run = [&](auto kernel, int64_t steps) {
      kernel<<<blocks_for(rows, 1, 1 << 16), threads_for(steps), 0, stream(queue)>>>(
          y.as<T>(), codes.as<const int8_t>(), scb.as<const float>(), rows, cols);
    };
    if (cols % N == 0 && is_aligned(y.data, 16) && is_aligned(codes.data, N))
      run(dequantize_kernel<T, N>, cols / N);
    else
      run(dequantize_kernel<T, 1>, cols);
  });
  return check(cudaGetLastError(), "int8_dequantize_rows");
}

}  // namespace halfbyte::cuda
