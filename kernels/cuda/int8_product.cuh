// Products of int8 codes, and how the kernels of the LLM.int8() layer are called.
#pragma once

#include "output.cuh"

namespace halfbyte::cuda {

/// acc int32 [M, N] = a int8 [M, K] b int8 [N, K]^T, queued, by what suits the shape: see int8_matmul.cu. The
/// workspace may be null.
cudaError_t int8_product(const Launch& on, int32_t* acc, const int8_t* a, const int8_t* b, int64_t m,
                         int64_t n, int64_t k, void* workspace, size_t workspace_bytes);

/// Outlier columns of x and of the weight, side by side, for the tensor cores: x's in 16 bits, the weight's
/// as codes in the same type, zeros up to a multiple of 16 columns. An fp32 column is three of bf16 (high,
/// middle, low), which together have all of its bits, beside three copies of the weight's.
constexpr int kOutlierSlots = 256;  // columns that there is room for
template <typename T>
struct OutlierType {
  using type = T;
  static constexpr int kPieces = 1;
};
template <>
struct OutlierType<int32_t> {
  using type = half_t;
  static constexpr int kPieces = 1;
};
template <>
struct OutlierType<float> {
  using type = bf16_t;
  static constexpr int kPieces = 3;
};
template <typename T>
struct Outliers {
  using Half = typename OutlierType<T>::type;
  const int32_t* list;  // count, then ascending columns; null: there are none
  Half* x;              // [M, kOutlierSlots]
  Half* weight;         // [N, kOutlierSlots]
};
/// Piece `piece` of x: all of it, or a part of what the pieces before have left.
template <typename T>
__device__ __forceinline__ typename OutlierType<T>::type piece_of(T x, int piece) {
  if constexpr (std::is_same_v<T, float>) {
    bf16_t part = __float2bfloat16_rz(x);  // not to the nearest, which may be an infinity
    for (int i = 0; i < piece; ++i) {
      x = isinf(x) ? 0.0f : x - to_float(part);
      part = __float2bfloat16_rz(x);
    }
    return part;
  } else {
    return x;
  }
}

/// y [M, N] = (a b^T * row_absmax / 127 + outlier columns) * scb / 127 + bias + residual. T = int32_t: the
/// sums of a b^T alone.
template <typename T>
struct Product8 {
  Output<T> out;
  const int8_t* a;  // [M, K], 0 in the outlier columns
  const int8_t* b;  // [N, K]
  const float* row_absmax;
  const float* scb;
  const T* x;  // [M, K]
  int64_t m, k;
  Outliers<T> outliers;
};

/// Up to so many slots the product gathers itself, and gather_outliers() does nothing.
constexpr int kGatheredByProduct = 8;
/// Fills product.outliers by a kernel that reads the list on the device. int8_outliers.cu
template <typename T>
cudaError_t gather_outliers(const Launch& on, const Product8<T>& product);

/// Any M and N, made for 9 rows and more; K a multiple of 16, a and b on 16 bytes; only where Launch::wgmma.
/// int8_gemm_sm90.cu
template <typename T>
cudaError_t int8_gemm_sm90(const Launch& on, const Product8<T>& product);

/// The same by mma.sync, sm_80 and up; of the outliers it needs the list alone. int8_gemm_sm80.cu
template <typename T>
cudaError_t int8_gemm_sm80(const Launch& on, const Product8<T>& product);

}  // namespace halfbyte::cuda
