// y [M, N] = x [M, K] W [N, K]^T on the tensor cores by mma.sync, 16-bit operands, fp32 accumulation.
//
// A block makes kM x kN outputs with 8 warps (2 x 4), each 64 x kN / 4. Both operands are K-contiguous, so
// both go through the same path: 16-byte asynchronous copies into a ring of kStages tiles of 32 k, rows of 64
// bytes whose four 16-byte pieces are exchanged by (row / 2) % 4 so that neither the copies nor ldmatrix meet
// in a bank.
//
//        k ->                      shared tile: row r, piece p  ->  r * 64 + (p ^ (r / 2 % 4)) * 16
//   x [kM rows], W [kN rows] -> ring of kStages -> ldmatrix -> mma m16n8k16 -> fp32 registers -> bias,
//   residual, y
//
// Needs K % 8 = 0 and 16-byte aligned operands; any M and N (rows beyond the end are filled with zeros).
#pragma once

#include "mma.cuh"
#include "output.cuh"

namespace halfbyte::cuda {

template <int kM, int kN>
struct Gemm {
  static constexpr int kK = 32, kStages = 4, kThreads = 256;
  static constexpr int kTileBytes = (kM + kN) * kK * 2;
  static constexpr int kSharedBytes = kTileBytes * kStages;
};

template <typename T, int kM, int kN>
__global__ void __launch_bounds__(256)
    gemm_kernel(Output<T> out, const T* __restrict__ x, const T* __restrict__ w, int64_t m, int64_t k) {
  using G = Gemm<kM, kN>;
  static_assert(kM == 128 && kN % 64 == 0, "8 warps lie 2 x 4");
  constexpr int kWarpM = kM / 2, kWarpN = kN / 4, kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / 4 * kWarpM, warp_n = warp % 4 * kWarpN;

  // Blocks run down M in groups of 8 rows of blocks, so that those in flight share columns of W in L2.
  const int64_t blocks_m = (m + kM - 1) / kM, blocks_n = (out.n + kN - 1) / kN;
  const int64_t group = blockIdx.x / (8 * blocks_n), rows_in_group = min(int64_t{8}, blocks_m - group * 8);
  const int64_t in_group = blockIdx.x % (8 * blocks_n);
  const int64_t first_m = (group * 8 + in_group % rows_in_group) * kM,
                first_n = in_group / rows_in_group * kN;

  const int steps = static_cast<int>((k + G::kK - 1) / G::kK);
  const auto fetch = [&](int step) {
    const uint32_t stage = base + step % G::kStages * G::kTileBytes;
#pragma unroll
    for (int i = 0; i < (kM + kN) * 4 / G::kThreads; ++i) {
      const int piece = threadIdx.x + i * G::kThreads, row = piece / 4, p = piece % 4;
      const bool from_x = row < kM;  // uniform per iteration: kM * 4 is a multiple of the threads
      const int64_t source_row = from_x ? first_m + row : first_n + row - kM;
      const int64_t rows = from_x ? m : out.n, at = static_cast<int64_t>(step) * G::kK + p * 8;
      const bool inside = source_row < rows && at < k;
      const T* source = inside ? (from_x ? x : w) + source_row * k + at : x;
      copy_async(stage + row * 64 + ((p ^ (row / 2 % 4)) * 16), source, inside ? 16 : 0);
    }
  };
#pragma unroll
  for (int s = 0; s < G::kStages - 1; ++s) {
    if (s < steps) fetch(s);
    commit_copies();
  }

  float acc[kTilesM][kTilesN][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<G::kStages - 2>();
    __syncthreads();
    if (step + G::kStages - 1 < steps) fetch(step + G::kStages - 1);
    commit_copies();
    const uint32_t stage = base + step % G::kStages * G::kTileBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int row = warp_m + i * 16 + lane % 16, p = half * 2 + lane / 16;
        load_matrices(a[i], stage + row * 64 + ((p ^ (row / 2 % 4)) * 16));
      }
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) {
        const int row = kM + warp_n + j * 16 + lane % 8 + lane / 16 * 8, p = half * 2 + lane / 8 % 2;
        load_matrices(b[j], stage + row * 64 + ((p ^ (row / 2 % 4)) * 16));
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
          multiply(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = first_m + warp_m + i * 16 + lane / 4 + e / 2 * 8;
        const int64_t column = first_n + warp_n + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && column < out.n) out.store(row, column, acc[i][j][e]);
      }
    }
  }
}

template <typename T, int kM, int kN>
cudaError_t launch_gemm(cudaStream_t stream, const Output<T>& out, const T* x, const T* w, int64_t m,
                        int64_t k) {
  const auto kernel = gemm_kernel<T, kM, kN>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm<kM, kN>::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ((m + kM - 1) / kM) * ((out.n + kN - 1) / kN);
  kernel<<<static_cast<unsigned>(blocks), 256, Gemm<kM, kN>::kSharedBytes, stream>>>(out, x, w, m, k);
  return cudaGetLastError();
}

}  // namespace halfbyte::cuda
