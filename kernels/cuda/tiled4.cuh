// 4-bit products on tiled weights (formats.h): what each kernel gets, and where each is to be found.
#pragma once

#include "output.cuh"
#include "weight4.cuh"

namespace halfbyte::cuda {

struct Tiled4 {
  const uint8_t* codes;  // [N / 16][K / 64][512]
  Absmax absmax;         // fp32 or uint8 [N / 16][K / 64][16], row g + 8 h of a tile at 2 g + h
  QuantType type;
  int64_t n, k;

  /// absmax of row `row` in k tile `kt`.
  __device__ __forceinline__ float scale(int64_t row, int64_t kt) const {
    return absmax.value(tiled_block(row, kt, k), row * (k / kTileK) + kt);
  }
};

inline Tiled4 tiled_of(const Weight4& w) {
  return {w.codes.as<const uint8_t>(), absmax_of(w), w.type, w.n, w.k};
}

/// y [M, N] = x [M, K] w^T + bias + residual; x and y row-major, x 16-byte aligned.
template <typename T>
struct Product4 {
  Output<T> out;
  const T* x;
  int64_t m;
  Tiled4 w;
};

/// Whether gemv4() takes m rows of x: up to 8, with K >= 256. On sm_80 very long K takes fewer.
bool gemv4_takes(int arch, int64_t m, int64_t k);
/// One to kMaxGroup products of one x, their weights all plain or all nested and of one type. gemv4.cu,
/// gemv4_sm90.cu
template <typename T>
cudaError_t gemv4(const Launch& on, const Product4<T>* products, int count);
/// The same of two, gate and up, of as many rows: gate's out.y = act(x gate^T + bias) * (x up^T + bias).
template <typename T>
cudaError_t gemv4_gated(const Launch& on, const Product4<T>* products, Activation act);

/// Any rows of x, made for 3 to 64; only where Launch::wgmma. Without `parts` (Launch::parts), which no
/// other product may use at the same time, a block takes whole rows of the weight. skinny4_sm90.cu
template <typename T>
cudaError_t skinny4_sm90(Launch on, Product4<T> product, float* parts);
/// Bytes of Launch::parts.
size_t skinny4_sm90_parts(const Launch& on);

/// Any rows of x, made for 65 and more; only where Launch::wgmma, y 16-byte aligned. gemm4_sm90.cu
template <typename T>
cudaError_t gemm4_sm90(const Launch& on, const Product4<T>& product);

/// As skinny4_sm90() by mma.sync: sm_80 and up, made for 9 to 64 rows. Without the workspace items stay
/// whole; with it no other product may run at the same time (Launch::arrivals). skinny4_sm80.cu
template <typename T>
cudaError_t skinny4_sm80(const Launch& on, const Product4<T>& product, void* workspace);
size_t skinny4_sm80_workspace(const Launch& on, int64_t m, int64_t n, int64_t k);

/// As gemm4_sm90() by mma.sync: sm_80 and up, any alignment of y. gemm4_sm80.cu
template <typename T>
cudaError_t gemm4_sm80(const Launch& on, const Product4<T>& product);

/// A few rows of x of any float dtype, a weight of either layout. stream4.cu
cudaError_t stream4(cudaStream_t stream, const View& y, const View& x, const Weight4& w,
                    const Epilogue& epilogue);

/// y [N, K] (float) = the weight's values. tile4.cu
cudaError_t dequantize_tiled(cudaStream_t stream, const View& y, const Tiled4& w);

}  // namespace halfbyte::cuda
