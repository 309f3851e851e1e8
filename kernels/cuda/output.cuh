// The end of every linear kernel: bias and residual added in fp32, then one rounding into y.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

template <typename T>
struct Output {
  T* y;
  const T* residual;
  const void* bias;
  DType bias_dtype;
  int64_t n;

  __device__ __forceinline__ float bias_at(int64_t column) const {
    switch (bias_dtype) {
      case DType::f16:
        return __half2float(static_cast<const half_t*>(bias)[column]);
      case DType::bf16:
        return __bfloat162float(static_cast<const bf16_t*>(bias)[column]);
      default:
        return static_cast<const float*>(bias)[column];
    }
  }
  __device__ __forceinline__ void store(int64_t m, int64_t column, float value) const {
    if (bias) value += bias_at(column);
    if (residual) value += to_float(residual[m * n + column]);
    y[m * n + column] = from_float<T>(value);
  }
  /// Columns column ... column + 3, in one piece where `wide`.
  __device__ __forceinline__ void store4(int64_t m, int64_t column, float4 value, bool wide) const {
    const float values[4] = {value.x, value.y, value.z, value.w};
    if (!wide || residual) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store(m, column + i, values[i]);
      return;
    }
    Vec<T, 4> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.v[i] = from_float<T>(bias ? values[i] + bias_at(column + i) : values[i]);
    *reinterpret_cast<Vec<T, 4>*>(y + m * n + column) = four;
  }
  /// Columns `column`, an even one, and the next, as far as they are there.
  __device__ __forceinline__ void store2(int64_t m, int64_t column, float a, float b) const {
    if (n % 2 != 0 || bias || residual || reinterpret_cast<uintptr_t>(y) % (2 * sizeof(T)) != 0) {
      if (column < n) store(m, column, a);
      if (column + 1 < n) store(m, column + 1, b);
    } else if (column < n) {
      Vec<T, 2> both;
      both.v[0] = from_float<T>(a);
      both.v[1] = from_float<T>(b);
      *reinterpret_cast<Vec<T, 2>*>(y + m * n + column) = both;
    }
  }
};

template <typename T>
Output<T> output_of(const View& y, const Epilogue& epilogue) {
  return {y.as<T>(), epilogue.residual ? epilogue.residual.as<const T>() : nullptr,
          epilogue.bias ? epilogue.bias.data : nullptr, epilogue.bias ? epilogue.bias.dtype : DType::f32,
          y.cols()};
}

/// What every linear op asks of x [M, K], y [M, N] and the epilogue.
inline Status check_linear(const char* op, const View& y, const View& x, int64_t n, int64_t k,
                           const Epilogue& epilogue) {
  if (x.cols() != k || y.cols() != n || y.rows() != x.rows() || !x.is_contiguous() || !y.is_contiguous()) {
    return refuse(op, "x, y and the weight do not fit");
  }
  if (!is_float(x.dtype) || y.dtype != x.dtype) return refuse_dtype(op, "x and y must be of one float dtype");
  if (epilogue.bias &&
      (epilogue.bias.size() != n || !is_float(epilogue.bias.dtype) || !epilogue.bias.is_contiguous())) {
    return refuse(op, "bias must be float [N], contiguous");
  }
  if (epilogue.residual && (epilogue.residual.size() != y.size() || epilogue.residual.dtype != y.dtype ||
                            !epilogue.residual.is_contiguous())) {
    return refuse(op, "residual must be like y, contiguous");
  }
  return {};
}

}  // namespace halfbyte::cuda
