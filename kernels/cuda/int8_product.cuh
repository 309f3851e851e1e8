// Products of int8 codes, and how the kernels of the LLM.int8() layer are called.
#pragma once

#include "int8_outliers.cuh"
#include "output.cuh"

namespace halfbyte::cuda {

/// acc int32 [M, N] = a int8 [M, K] b int8 [N, K]^T, queued, by what suits the shape: see int8_matmul.cu. The
/// workspace may be null.
cudaError_t int8_product(const Launch& on, int32_t* acc, const int8_t* a, const int8_t* b, int64_t m,
                         int64_t n, int64_t k, void* workspace, size_t workspace_bytes);

/// y [M, N] = (a b^T * row_absmax / 127 + outlier columns) * scb / 127 + bias + residual. T = int32_t: the
/// sums of a b^T alone.
template <typename T>
struct Product8 {
  Output<T> out;
  const int8_t* a;  // [M, K]
  const int8_t* b;  // [N, K]
  const float* row_absmax;
  const float* scb;
  const T* x;  // [M, K]
  int64_t m, k;
  const int32_t* list;  // sm_80: count, then ascending columns, whose codes in a are 0; null: there are none
  ColumnMarks* marks;   // sm_90: of outlier columns, whose codes in a are as they were quantised; or null
  float threshold;      // of the marks
  typename OutlierType<T>::type* rest;  // with marks: room for x in outlier columns, [M, kRestRounds,
                                        // kRoundSlots]
  uint32_t* gathered;                   // with marks: a zero (Int8Rows::zero), to count who has filled it
};

/// Rounds of columns for which there is room in `rest`.
constexpr int kRestRounds = 4;

/// Any M and N, made for 9 rows and more; K a multiple of 16, a and b on 16 bytes; only where Launch::wgmma.
/// int8_gemm_sm90.cu
template <typename T>
cudaError_t int8_gemm_sm90(const Launch& on, const Product8<T>& product);

/// The same by mma.sync, sm_80 and up. int8_gemm_sm80.cu
template <typename T>
cudaError_t int8_gemm_sm80(const Launch& on, const Product8<T>& product);

}  // namespace halfbyte::cuda
