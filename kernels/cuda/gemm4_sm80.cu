// y = x w^T + bias + residual with a tiled 4-bit weight and many rows of x, by mma.sync (sm_80 and up): the
// weight is the A operand, decoded on the way from memory into registers.
//
// A warp makes 32 rows of the weight times 128 tokens, a block of 4 warps 128 rows, of 8 warps 256 where two
// of the former do not fit a multiprocessor. A step is 64 k:
//
//   x       [128 tokens][64 k] by asynchronous copies into a ring; the eight 16-byte pieces of token r are
//           exchanged by r % 8, so that neither the copies nor ldmatrix meet in a bank
//   codes   16 bytes a lane and row tile, a step ahead
//   decode  a byte permute makes an address, a look-up two weights (table4.cuh), scaled by absmax rounded to
//           their type
//   end     fp32 sums through shared memory, so that y is written in lines
#include <algorithm>

#include "gemm_sm80.cuh"
#include "launch.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kTokens = 128, kWarpTiles = 2;  // row tiles of a warp
constexpr int kStage = kTokens * kTileK * 2;
constexpr int kEndTokens = 64;  // whose sums are in shared memory at a time

template <typename T>
struct Gemm4 {
  Tiled4 w;
  Output<T> out;
  const T* x;
  Book4 book;
  int m, tiles, band;
};

/// What a lane holds of a tile: its codes, the absmax of rows g and g + 8.
struct Tile {
  uint4 codes;
  float2 scale;

  __device__ __forceinline__ void fetch(const Tiled4& w, int64_t row_tile, int kt, int lane) {
    const int64_t tile = row_tile * (w.k / kTileK) + kt;
    codes = __ldg(reinterpret_cast<const uint4*>(w.codes + tile * 512 + lane * 16));
    if (w.absmax.plain) {
      scale = *reinterpret_cast<const float2*>(w.absmax.plain + tile * 16 + lane / 4 * 2);
    } else {
      const int64_t row = row_tile * kTileRows + lane / 4;
      scale = make_float2(w.scale(row, kt), w.scale(row + 8, kt));
    }
  }
};

template <typename T, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 8 / kWarps) gemm4_kernel(const Gemm4<T> p) {
  constexpr int kRows = kWarps * kWarpTiles * kTileRows, kThreads = kWarps * 32, kSumStride = kRows + 4;
  extern __shared__ __align__(1024) char table[];
  const uint32_t ring = shared_address(table) + kTable4Bytes;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const uint32_t lane4 = lane * 4;
  let_next_start();

  // bands of token tiles, so that blocks in flight share x and weights in L2
  const int row_blocks = static_cast<int>((p.w.n + kRows - 1) / kRows);
  const int token_tiles = (p.m + kTokens - 1) / kTokens;
  const int band = blockIdx.x / (p.band * row_blocks), in_band = blockIdx.x % (p.band * row_blocks);
  const int width = min(p.band, token_tiles - band * p.band);
  const int64_t first_row = static_cast<int64_t>(in_band / width) * kRows;
  const int64_t first_token = (static_cast<int64_t>(band) * p.band + in_band % width) * kTokens;

  int64_t row_tile[kWarpTiles];
  Tile next[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    row_tile[i] = min(first_row / kTileRows + warp * kWarpTiles + i,
                      p.w.n / kTileRows - 1);  // what is beyond is not kept
    next[i].fetch(p.w, row_tile[i], 0, lane);
  }
  fill_table4(table, p.book, nullptr);
  wait_for_results();

  const auto copy_x = [&](int step) {
    const uint32_t stage = ring + step % kStages * kStage;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / kThreads; ++i) {
      const int token = threadIdx.x / 8 + i * (kThreads / 8), piece = threadIdx.x % 8;
      const int64_t row = first_token + token;
      const bool there = row < p.m && step < p.tiles;
      const T* from = there ? p.x + row * p.w.k + static_cast<int64_t>(step) * kTileK + piece * 8 : p.x;
      copy_async(stage + token * 128 + ((piece ^ (token & 7)) * 16), from, there ? 16 : 0);
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy_x(s);

  // of the matrices this lane addresses: a token, half of 16 k
  const int token = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
  float acc[kWarpTiles][kTokens / 8][4] = {};
  for (int step = 0; step < p.tiles; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    copy_x(step + kStages - 1);
    Tile tiles[kWarpTiles];
    uint32_t low[kWarpTiles], high[kWarpTiles];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      tiles[i] = next[i];
      low[i] = pair_of<T>(tiles[i].scale.x, tiles[i].scale.x);
      high[i] = pair_of<T>(tiles[i].scale.y, tiles[i].scale.y);
      next[i].fetch(p.w, row_tile[i], min(step + 1, p.tiles - 1), lane);
    }
    const uint32_t stage = ring + step % kStages * kStage + token * 128;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kWarpTiles][4];
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const uint4 c = tiles[i].codes;
        look_up(a[i], table, j == 0 ? c.x : j == 1 ? c.y : j == 2 ? c.z : c.w, lane4);
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = scale_pair(a[i][r], r % 2 ? high[i] : low[i], T{});
      }
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, stage + n * 16 * 128 + (((j * 2 + half) ^ (token & 7)) * 16));
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          multiply(acc[i][n * 2], a[i], b[0], b[1], T{});
          multiply(acc[i][n * 2 + 1], a[i], b[2], b[3], T{});
        }
      }
    }
  }

  wait_copies<0>();
  float* const sums = reinterpret_cast<float*>(table);  // [kEndTokens][kSumStride], over table and ring
  const int row = threadIdx.x % (kRows / 4) * 4;
  const TileOutput<T> y(p.out, p.m, static_cast<int>(first_token), static_cast<int>(first_row) + row, nullptr,
                        1.0f);
#pragma unroll
  for (int part = 0; part < kTokens / kEndTokens; ++part) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kEndTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[(n * 8 + t * 2 + e % 2) * kSumStride + (warp * kWarpTiles + i) * kTileRows + g + e / 2 * 8] =
              acc[i][part * (kEndTokens / 8) + n][e];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x / (kRows / 4); i < kEndTokens; i += kThreads / (kRows / 4))
      y.put(part * kEndTokens + i, *reinterpret_cast<const Vec<float, 4>*>(sums + i * kSumStride + row));
  }
}

template <typename T, int kWarps, int kStages>
cudaError_t launch(const Launch& on, const Product4<T>& product) {
  constexpr int kRows = kWarps * kWarpTiles * kTileRows;
  static_assert(kEndTokens * (kRows + 4) * 4 <= kTable4Bytes + kStages * kStage);
  Gemm4<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.x = product.x;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  const int64_t token_tiles = (product.m + kTokens - 1) / kTokens;
  p.band = static_cast<int>(std::min<int64_t>(token_tiles, 8));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((product.w.n + kRows - 1) / kRows * token_tiles));
  shape.block = dim3(kWarps * 32);
  shape.shared = kTable4Bytes + kStages * kStage;
  return launch_kernel(on, shape, gemm4_kernel<T, kWarps, kStages>, p);
}

}  // namespace

template <typename T>
cudaError_t gemm4_sm80(const Launch& on, const Product4<T>& product) {
  // blocks of 4 warps where two fit a multiprocessor, or where there are few of 8
  const int64_t blocks = (product.w.n + 255) / 256 * ((product.m + kTokens - 1) / kTokens);
  if (on.shared >= 2 * (kTable4Bytes + 2 * kStage + 1024)) return launch<T, 4, 2>(on, product);
  const bool roomy = on.block_shared >= kTable4Bytes + 3 * kStage;
  if (blocks < on.multiprocessors) return roomy ? launch<T, 4, 3>(on, product) : launch<T, 4, 2>(on, product);
  return roomy ? launch<T, 8, 3>(on, product) : launch<T, 8, 2>(on, product);
}

template cudaError_t gemm4_sm80(const Launch&, const Product4<half_t>&);
template cudaError_t gemm4_sm80(const Launch&, const Product4<bf16_t>&);

}  // namespace halfbyte::cuda
