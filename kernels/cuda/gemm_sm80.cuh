// Products of K-contiguous operands on the tensor cores by mma.sync: a [M, K] b [N, K]^T of 16-bit elements
// or of int8 codes, and y = x W^T of 16 bits made of it.
//
// A block makes kM x kN sums, a warp kM / kWarpsM x kN / kWarpsN of them over its share of each step of K.
// Both operands go through the same path: 16-byte asynchronous copies into a ring of kStages tiles of
// kRowBytes of each row, whose 16-byte pieces are exchanged by the row so that neither the copies nor
// ldmatrix meet in a bank. The fragments of the next 32 bytes of a row are loaded while those of the last are
// multiplied.
//
//        k ->
//   a [kM rows], b [kN rows] -> ring -> ldmatrix -> mma m16n8k16 or m16n8k32 -> registers
//
// Needs rows of a multiple of 16 bytes, operands on 16 bytes, M and N below 2^31.
#pragma once

#include <limits>

#include "mma.cuh"
#include "output.cuh"

namespace halfbyte::cuda {

template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kRowBytes_, int kStages_,
          int kBlocks_>
struct Gemm {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_,
                       kRowBytes = kRowBytes_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;               // on a multiprocessor, as far as registers go
  static constexpr int kGroup = kWarpsM * kWarpsN * 32;  // threads that have a part of K in common
  static constexpr int kThreads = kGroup * kWarpsK, kPieces = kRowBytes / 16;
  static constexpr int kTileBytes = (kM + kN) * kRowBytes, kSharedBytes = kTileBytes * kStages;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;  // of a warp
  static constexpr int kParts = kRowBytes / 32 / kWarpsK;                        // of a step, of a warp
  static constexpr int kRowStep = kThreads / kPieces;  // rows that are copied at a time
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256);
  static_assert(kTilesN % 2 == 0 && kParts % 2 == 0 && kRowStep % 8 == 0);
  static_assert(kM % kRowStep == 0 && kN % kRowStep == 0);

  __device__ static __forceinline__ int place(int row, int piece) {
    return row * kRowBytes + (kRowBytes == 64 ? piece ^ (row / 2 % 4) : piece ^ (row % 8)) * 16;
  }
};

/// Where a block's sums are in the product.
struct Corner {
  int m, n;
};
/// Blocks run down M in groups of 16 rows of blocks, so that those in flight share rows of b in L2.
template <typename G>
__device__ __forceinline__ Corner corner_of(int block, int m, int n) {
  constexpr int kBand = 16;
  const int blocks_m = (m + G::kM - 1) / G::kM, blocks_n = (n + G::kN - 1) / G::kN;
  const int band = block / (kBand * blocks_n), in_band = block % (kBand * blocks_n);
  const int width = min(kBand, blocks_m - band * kBand);
  return {(band * kBand + in_band % width) * G::kM, in_band / width * G::kN};
}

/// Both operands as bytes.
struct Operands {
  const char *a, *b;
  int m, n;
  int64_t row_bytes;
};

/// sums += a b^T of this warp's part of the block's tile. `more(stage)` may copy something else into the
/// stage behind the last step's, which is there when this returns; all other stages are free then. Returns
/// its address.
template <typename G, typename In, typename Sum, typename More>
__device__ __forceinline__ uint32_t multiply_tiles(Sum (&sums)[G::kTilesM][G::kTilesN][4], uint32_t base,
                                                   const Operands& p, Corner first, const More& more) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % G::kGroup / 32, group = threadIdx.x / G::kGroup;
  const int warp_m = warp / G::kWarpsN * (G::kM / G::kWarpsM),
            warp_n = warp % G::kWarpsN * (G::kN / G::kWarpsN);
  const int steps = static_cast<int>((p.row_bytes + G::kRowBytes - 1) / G::kRowBytes);

  const int own_row = threadIdx.x / G::kPieces, own_byte = threadIdx.x % G::kPieces * 16;
  const uint32_t own_place = G::place(own_row, own_byte / 16);
  Copies<(G::kM + G::kN) / G::kRowStep> copies;
  const auto fetch = [&](int step) __attribute__((always_inline)) {
    const uint32_t stage = base + step % G::kStages * G::kTileBytes;
    if (step == steps) more(stage);
    if (step >= steps) return;
    const int64_t at = static_cast<int64_t>(step) * G::kRowBytes + own_byte;
    const int bytes = at < p.row_bytes ? 16 : 0;
#pragma unroll
    for (int i = 0; i < (G::kM + G::kN) / G::kRowStep; ++i) {
      const bool of_a = i < G::kM / G::kRowStep;
      const char* const from = of_a ? p.a : p.b;
      const int row = (of_a ? first.m : first.n - G::kM) + i * G::kRowStep + own_row;
      const int64_t there = min(row, (of_a ? p.m : p.n) - 1);  // what is beyond is not kept
      copies.begin(i, stage + own_place + i * G::kRowStep * G::kRowBytes,
                   bytes ? from + (there * p.row_bytes + at) : from, bytes);
    }
  };
#pragma unroll 1
  for (int s = 0; s < G::kStages - 1; ++s) {
    fetch(s);
    copies.hand_over();
    commit_copies();
  }

  uint32_t a[2][G::kTilesM][4], b[2][G::kTilesN / 2][4];
  const auto load = [&](int slot, int step, int part) __attribute__((always_inline)) {
    const uint32_t stage = base + step % G::kStages * G::kTileBytes;
    const int piece = (group * G::kParts + part) * 2;
#pragma unroll
    for (int i = 0; i < G::kTilesM; ++i)
      load_matrices(a[slot][i], stage + G::place(warp_m + i * 16 + lane % 16, piece + lane / 16));
#pragma unroll
    for (int j = 0; j < G::kTilesN / 2; ++j) {
      const int row = G::kM + warp_n + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b[slot][j], stage + G::place(row, piece + lane / 8 % 2));
    }
  };
  wait_copies<G::kStages - 2>();
  __syncthreads();
  load(0, 0, 0);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < G::kParts; ++part) {
      if (part < G::kParts - 1) {
        load((part + 1) % 2, step, part + 1);
      } else {  // the next step's; after the last one what nobody uses
        copies.hand_over();
        wait_copies<G::kStages - 2>();
        __syncthreads();
        load(0, step + 1, 0);
      }
      if (part == 0) {
        fetch(step + G::kStages - 1);
        commit_copies();
      }
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j) {
          const uint32_t(&pair)[4] = b[part % 2][j / 2];
          multiply(sums[i][j], a[part % 2][i], pair[j % 2 * 2], pair[j % 2 * 2 + 1], In{});
        }
      }
    }
  }
  return base + steps % G::kStages * G::kTileBytes;
}

/// Calls put(row, column, four) for every four sums side by side of the block's tile, which the warps of the
/// first group have: `column` is the same for a thread all the time. They go through the ring, a row of warps
/// after the other; nothing may be on its way there. In a loop, as a block comes through this code but once.
template <typename G, typename Sum, typename Put>
__device__ __forceinline__ void put_tile(const Sum (&sums)[G::kTilesM][G::kTilesN][4], char* ring,
                                         const Put& put) {
  constexpr int kStride = G::kN + 8, kRows = G::kM / G::kWarpsM, kColumns = G::kN / 4;
  static_assert(kRows * kStride * 4 <= G::kSharedBytes && G::kThreads % kColumns == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;  // those behind the first group have none
  Sum* const space = reinterpret_cast<Sum*>(ring);
#pragma unroll 1
  for (int part = 0; part < G::kWarpsM; ++part) {
    __syncthreads();
    if (warp / G::kWarpsN == part) {
      Sum* const to = space + lane / 4 * kStride + warp % G::kWarpsN * (G::kN / G::kWarpsN) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Vec<Sum, 2> pair = {{sums[i][j][h * 2], sums[i][j][h * 2 + 1]}};
            *reinterpret_cast<Vec<Sum, 2>*>(to + (i * 16 + h * 8) * kStride + j * 8) = pair;
          }
        }
      }
    }
    __syncthreads();
    const int column = threadIdx.x % kColumns * 4;
#pragma unroll 2
    for (int row = threadIdx.x / kColumns; row < kRows; row += G::kThreads / kColumns)
      put(part * kRows + row, column, *reinterpret_cast<const Vec<Sum, 4>*>(space + row * kStride + column));
  }
}

/// Stores what put_tile() hands over into y, times a scale of the column.
template <typename T>
struct TileOutput {
  Output<T> out;
  int m, first_m, column;
  float scale[4], bias[4];
  bool wide;

  /// `scales` may be null.
  __device__ __forceinline__ TileOutput(const Output<T>& y, int rows, int first, int column_,
                                        const float* scales, float factor)
      : out(y), m(rows), first_m(first), column(column_) {
    wide = out.n % 4 == 0 && is_aligned(out.y, 4 * sizeof(T)) && is_aligned(out.residual, 4 * sizeof(T));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = min(int64_t{column} + i, out.n - 1);
      scale[i] = scales ? scales[at] * factor : 1.0f;
      bias[i] = out.bias ? out.bias_at(at) : 0.0f;
    }
  }
  __device__ __forceinline__ void put(int row, Vec<float, 4> values) const {
    if (first_m + row >= m || column >= out.n) return;
    const int64_t at = (first_m + row) * out.n + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values.v[i] *= scale[i];
      if (out.bias) values.v[i] += bias[i];
    }
    if (wide) {
      Vec<T, 4> four;
      if (out.residual) four = *reinterpret_cast<const Vec<T, 4>*>(out.residual + at);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        four.v[i] = from_float<T>(out.residual ? values.v[i] + to_float(four.v[i]) : values.v[i]);
      *reinterpret_cast<Vec<T, 4>*>(out.y + at) = four;
    } else {
      for (int i = 0; i < 4 && column + i < out.n; ++i)
        out.y[at + i] =
            from_float<T>(out.residual ? values.v[i] + to_float(out.residual[at + i]) : values.v[i]);
    }
  }
};

/// How long a product takes in blocks of G, on a scale of its own: a multiprocessor has as many as the
/// busiest one. `each`: of a sum, where two blocks run beside each other; `alone`: where the last has no
/// other. Both measured on an H100, in ns for 4096 k and all its multiprocessors.
template <typename G>
double cost_of(const Launch& on, int64_t m, int64_t n, double each, double alone) {
  if (G::kSharedBytes > on.block_shared) return std::numeric_limits<double>::infinity();
  const int64_t blocks = (m + G::kM - 1) / G::kM * ((n + G::kN - 1) / G::kN);
  const int64_t rounds = (blocks + on.multiprocessors - 1) / on.multiprocessors;
  return (static_cast<double>(rounds - rounds % 2) * each + static_cast<double>(rounds % 2) * alone) * G::kM *
         G::kN;
}
/// 128 x 128 sums; with less shared memory fewer stages, so that two blocks fit a multiprocessor.
using GemmSquare = Gemm<128, 128, 2, 2, 1, 64, 4, 2>;
using GemmSquareLean = Gemm<128, 128, 2, 2, 1, 64, 3, 2>;
inline bool is_lean(const Launch& on) { return on.shared < 2 * (GemmSquare::kSharedBytes + 1024); }

template <typename T, typename G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks)
    gemm_kernel(Output<T> out, const T* __restrict__ x, const T* __restrict__ w, int m, int k) {
  static_assert(G::kWarpsK == 1);
  extern __shared__ __align__(128) char shared[];
  const int n = static_cast<int>(out.n);
  const Corner first = corner_of<G>(blockIdx.x, m, n);
  float acc[G::kTilesM][G::kTilesN][4] = {};
  const Operands operands{reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(w), m, n,
                          int64_t{2} * k};
  multiply_tiles<G, T>(acc, shared_address(shared), operands, first, [](uint32_t) {});
  wait_copies<0>();
  const TileOutput<T> y(out, m, first.m, first.n + threadIdx.x % (G::kN / 4) * 4, nullptr, 1.0f);
  put_tile<G>(acc, shared, [&](int row, int, const Vec<float, 4>& four) { y.put(row, four); });
}

template <typename T, typename G>
cudaError_t launch_gemm(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m,
                        int64_t k) {
  const auto kernel = gemm_kernel<T, G>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ((m + G::kM - 1) / G::kM) * ((out.n + G::kN - 1) / G::kN);
  kernel<<<static_cast<unsigned>(blocks), G::kThreads, G::kSharedBytes, on.stream>>>(
      out, x, w, static_cast<int>(m), static_cast<int>(k));
  return cudaGetLastError();
}

template <typename T>
cudaError_t gemm_sm80(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m, int64_t k) {
  cudaError_t (*best)(const Launch&, const Output<T>&, const T*, const T*, int64_t, int64_t) = nullptr;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](auto shape, double each, double alone) {
    using G = decltype(shape);
    const double cost = cost_of<G>(on, m, out.n, each, alone);
    if (cost >= least) return;
    least = cost;
    best = launch_gemm<T, G>;
  };
  if (is_lean(on))
    consider(GemmSquareLean{}, 2.7, 3.1);
  else
    consider(GemmSquare{}, 2.6, 3.0);
  consider(Gemm<64, 128, 1, 4, 1, 64, 4, 3>{}, 3.0, 4.9);
  consider(Gemm<64, 64, 1, 4, 1, 128, 4, 3>{}, 4.0, 5.9);
  return best(on, out, x, w, m, k);
}

}  // namespace halfbyte::cuda
