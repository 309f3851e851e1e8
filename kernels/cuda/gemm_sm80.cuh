// y [M, N] = x [M, K] W [N, K]^T on the tensor cores by mma.sync, 16-bit operands, fp32 accumulation.
//
// A block makes kM x kN outputs, a warp 64 x 64, 64 x 32 or 64 x 16 of them. Both operands are K-contiguous,
// so both go through the same path: 16-byte asynchronous copies into a ring of kStages tiles of kK k, rows of
// 64 or 128 bytes whose 16-byte pieces are exchanged by the row so that neither the copies nor ldmatrix meet
// in a bank. The fragments of the next 16 k are loaded while those of the last are multiplied.
//
//        k ->
//   x [kM rows], W [kN rows] -> ring -> ldmatrix -> mma m16n8k16 -> fp32 registers -> bias, residual, y
//
// Needs K % 8 = 0 and 16-byte aligned operands, M, N and K below 2^31.
#pragma once

#include "mma.cuh"
#include "output.cuh"

namespace halfbyte::cuda {

template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kK_, int kStages_, int kBlocks_>
struct Gemm {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kK = kK_,
                       kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr int kThreads = kWarpsM * kWarpsN * 32, kPieces = kK / 8, kRowBytes = kK * 2;
  static constexpr int kTileBytes = (kM + kN) * kRowBytes, kSharedBytes = kTileBytes * kStages;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;  // of a warp
  static constexpr int kRowStep = kThreads / kPieces;  // rows that are copied at a time
  static_assert((kK == 32 || kK == 64) && kTilesN % 2 == 0 && kRowStep % 8 == 0);
  static_assert(kM % kRowStep == 0 && kN % kRowStep == 0);

  __device__ static __forceinline__ int place(int row, int piece) {
    return row * kRowBytes + (kK == 64 ? piece ^ (row % 8) : piece ^ (row / 2 % 4)) * 16;
  }
};
/// For many rows; for some hundreds; for fewer. The first fits an sm_86, the last an sm_75.
using GemmLarge = Gemm<128, 256, 2, 4, 32, 4, 1>;
using GemmMiddle = Gemm<64, 128, 1, 4, 64, 3, 3>;
using GemmSmall = Gemm<64, 64, 1, 4, 64, 4, 3>;

template <typename T, typename G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks)
    gemm_kernel(Output<T> out, const T* __restrict__ x, const T* __restrict__ w, int m, int k) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = static_cast<int>(out.n);
  const int warp_m = warp / G::kWarpsN * (G::kM / G::kWarpsM),
            warp_n = warp % G::kWarpsN * (G::kN / G::kWarpsN);

  // Blocks run down M in groups of 16 rows of blocks, so that those in flight share columns of W in L2.
  constexpr int kBand = 16;
  const int blocks_m = (m + G::kM - 1) / G::kM, blocks_n = (n + G::kN - 1) / G::kN;
  const int band = blockIdx.x / (kBand * blocks_n), in_band = blockIdx.x % (kBand * blocks_n);
  const int width = min(kBand, blocks_m - band * kBand);
  const int first_m = (band * kBand + in_band % width) * G::kM, first_n = in_band / width * G::kN;

  const int own_row = threadIdx.x / G::kPieces, own_k = threadIdx.x % G::kPieces * 8;
  const uint32_t own_place = base + G::place(own_row, own_k / 8);
  const auto fetch = [&](int step) {
    const uint32_t stage = own_place + step % G::kStages * G::kTileBytes;
    const int at = step * G::kK + own_k, bytes = at < k ? 16 : 0;
    const auto rows = [&](const T* from, int first, int last, int count, uint32_t to)
        __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < count / G::kRowStep; ++i) {
        const int row = min(first + own_row + i * G::kRowStep, last);  // what is beyond is not kept
        copy_async(to + i * G::kRowStep * G::kRowBytes,
                   bytes ? from + (static_cast<int64_t>(row) * k + at) : from, bytes);
      }
    };
    rows(x, first_m, m - 1, G::kM, stage);
    rows(w, first_n, n - 1, G::kN, stage + G::kM * G::kRowBytes);
  };
  const int steps = (k + G::kK - 1) / G::kK;
#pragma unroll
  for (int s = 0; s < G::kStages - 1; ++s) {
    if (s < steps) fetch(s);
    commit_copies();
  }

  float acc[G::kTilesM][G::kTilesN][4] = {};
  uint32_t a[2][G::kTilesM][4], b[2][G::kTilesN / 2][4];
  const auto load = [&](int slot, int step, int part) __attribute__((always_inline)) {
    const uint32_t stage = base + step % G::kStages * G::kTileBytes;
#pragma unroll
    for (int i = 0; i < G::kTilesM; ++i)
      load_matrices(a[slot][i], stage + G::place(warp_m + i * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < G::kTilesN / 2; ++j) {
      const int row = G::kM + warp_n + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b[slot][j], stage + G::place(row, part * 2 + lane / 8 % 2));
    }
  };
  wait_copies<G::kStages - 2>();
  __syncthreads();
  load(0, 0, 0);
  for (int step = 0; step < steps; ++step) {
    constexpr int kParts = G::kK / 16;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part < kParts - 1) {
        load((part + 1) % 2, step, part + 1);
      } else {  // the next step's; after the last one what nobody uses
        wait_copies<G::kStages - 2>();
        __syncthreads();
        load(0, step + 1, 0);
      }
      if (part == 0) {
        if (step + G::kStages - 1 < steps) fetch(step + G::kStages - 1);
        commit_copies();
      }
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j) {
          const uint32_t(&pair)[4] = b[part % 2][j / 2];
          multiply(acc[i][j], a[part % 2][i], pair[j % 2 * 2], pair[j % 2 * 2 + 1], T{});
        }
      }
    }
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_m + warp_m + i * 16 + lane / 4 + half * 8;
      if (row >= m) continue;
#pragma unroll
      for (int j = 0; j < G::kTilesN; ++j)
        out.store2(row, first_n + warp_n + j * 8 + lane % 4 * 2, acc[i][j][half * 2],
                   acc[i][j][half * 2 + 1]);
    }
  }
}

template <typename T, typename G>
cudaError_t launch_gemm(cudaStream_t stream, const Output<T>& out, const T* x, const T* w, int64_t m,
                        int64_t k) {
  const auto kernel = gemm_kernel<T, G>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ((m + G::kM - 1) / G::kM) * ((out.n + G::kN - 1) / G::kN);
  kernel<<<static_cast<unsigned>(blocks), G::kThreads, G::kSharedBytes, stream>>>(
      out, x, w, static_cast<int>(m), static_cast<int>(k));
  return cudaGetLastError();
}

template <typename T>
cudaError_t gemm_sm80(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m, int64_t k) {
  // whether its blocks would leave less than `idle` of the multiprocessors without one
  const auto fills = [&](int rows, int columns, int shared, double idle) {
    const int64_t blocks = ((m + rows - 1) / rows) * ((out.n + columns - 1) / columns);
    return static_cast<double>(blocks) >= (1.0 - idle) * on.multiprocessors && shared < on.shared;
  };
  if (fills(GemmLarge::kM, GemmLarge::kN, GemmLarge::kSharedBytes, 0.25))
    return launch_gemm<T, GemmLarge>(on.stream, out, x, w, m, k);
  if (fills(GemmMiddle::kM, GemmMiddle::kN, GemmMiddle::kSharedBytes, 0.0))
    return launch_gemm<T, GemmMiddle>(on.stream, out, x, w, m, k);
  return launch_gemm<T, GemmSmall>(on.stream, out, x, w, m, k);
}

}  // namespace halfbyte::cuda
