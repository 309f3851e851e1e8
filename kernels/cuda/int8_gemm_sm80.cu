// y = (a b^T * row scale + outlier columns) * column scale + bias + residual with int8 a [M, K] and b [N, K],
// by mma.sync (sm_80 and up), for 9 rows of a and more.
//
// A block makes kM tokens x 128 rows of b with 8 warps (2 x 4), each kM / 2 x 32. Both operands go the same
// way: 16-byte asynchronous copies into a ring of kStages tiles of 64 bytes a row, whose four 16-byte pieces
// are exchanged by (row / 2) % 4 so that neither the copies nor ldmatrix meet in a bank; then mma m16n8k32
// into int32 sums.
//
// Outlier columns follow, 32 slots at a time in 16 bits: gathered from x and b into the first tile of the
// ring, then mma m16n8k16 into the same sums, by then fp32 and times the token's scale. Codes are exact in 16
// bits, an fp32 x goes in three pieces (int8_product.cuh).
//
// Needs K % 16 = 0 and operands on 16 bytes; any M and N (what is beyond is zero).
#include "int8_product.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kN = 128, kRow = 64, kStages = 4, kThreads = 256;  // kRow: bytes of a row in a tile

template <typename T, int kM>
__global__ void __launch_bounds__(kThreads, 2) int8_gemm_kernel(const Product8<T> p) {
#if __CUDA_ARCH__ >= 800
  constexpr int kTile = (kM + kN) * kRow, kWarpM = kM / 2, kTilesM = kWarpM / 16, kTilesN = 4;
  constexpr int kSlots = kRow / 2;  // outlier columns at a time
  // piece p of a row in a tile
  const auto place_of = [](int row, int p) { return row * kRow + ((p ^ (row / 2 % 4)) * 16); };
  extern __shared__ __align__(128) char space[];
  const uint32_t base = shared_address(space);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp / 4 * kWarpM, warp_n = warp % 4 * (kTilesN * 8);
  const int64_t n = p.out.n;
  let_next_start();
  wait_for_results();

  // blocks run down M in groups of 8 rows of blocks, so that those in flight share rows of b in L2
  const int64_t blocks_m = (p.m + kM - 1) / kM, blocks_n = (n + kN - 1) / kN;
  const int64_t group = blockIdx.x / (8 * blocks_n), rows_in_group = min(int64_t{8}, blocks_m - group * 8);
  const int64_t in_group = blockIdx.x % (8 * blocks_n);
  const int64_t first_m = (group * 8 + in_group % rows_in_group) * kM,
                first_n = in_group / rows_in_group * kN;

  const int steps = static_cast<int>((p.k + kRow - 1) / kRow);
  const auto fetch = [&](int step) {
    const uint32_t stage = base + step % kStages * kTile;
#pragma unroll
    for (int i = 0; i < (kM + kN) * 4 / kThreads; ++i) {
      const int piece = threadIdx.x + i * kThreads, row = piece / 4;
      const bool token = row < kM;  // uniform per iteration: kM * 4 is a multiple of the threads
      const int64_t source_row = token ? first_m + row : first_n + row - kM;
      const int64_t at = static_cast<int64_t>(step) * kRow + piece % 4 * 16;
      const bool inside = source_row < (token ? p.m : n) && at < p.k;
      const int8_t* source = inside ? (token ? p.a : p.b) + source_row * p.k + at : p.a;
      copy_async(stage + place_of(row, piece % 4), source, inside ? 16 : 0);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s);
    commit_copies();
  }
  // half of a tile: 32 k, or 16 slots
  const auto load = [&](uint32_t stage, int half, uint32_t(&a)[kTilesM][4], uint32_t(&b)[kTilesN / 2][4]) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
      load_matrices(a[i], stage + place_of(warp_m + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j)
      load_matrices(
          b[j], stage + place_of(kM + warp_n + j * 16 + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
  };

  int32_t sums[kTilesM][kTilesN][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit_copies();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
      load(base + step % kStages * kTile, half, a, b);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
          multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  const auto each_sum = [&](const auto& body) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t token = first_m + warp_m + i * 16 + g + e / 2 * 8;
          const int64_t row = first_n + warp_n + j * 8 + t * 2 + e % 2;
          if (token < p.m && row < n) body(token, row, i, j, e);
        }
      }
    }
  };
  if constexpr (std::is_same_v<T, int32_t>) {
    each_sum(
        [&](int64_t token, int64_t row, int i, int j, int e) { p.out.y[token * n + row] = sums[i][j][e]; });
  } else {
    using Half = typename OutlierType<T>::type;
    constexpr int kPieces = OutlierType<T>::kPieces;
    float acc[kTilesM][kTilesN][4];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = min(first_m + warp_m + i * 16 + g + h * 8, p.m - 1);
        const float scale = p.row_absmax[token] * kInt8Scale;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
          for (int e = h * 2; e < h * 2 + 2; ++e) acc[i][j][e] = static_cast<float>(sums[i][j][e]) * scale;
        }
      }
    }
    const int slots = p.outliers.list ? p.outliers.list[0] * kPieces : 0;
    for (int from = 0; from < slots; from += kSlots) {
      __syncthreads();
      for (int i = threadIdx.x; i < (kM + kN) * kSlots; i += kThreads) {
        const int row = i / kSlots, slot = i % kSlots;
        const int64_t source_row = row < kM ? first_m + row : first_n + row - kM;
        Half value = from_float<Half>(0.0f);
        if (from + slot < slots && source_row < (row < kM ? p.m : n)) {
          const int64_t at = source_row * p.k + p.outliers.list[1 + (from + slot) / kPieces];
          value = row < kM ? piece_of(p.x[at], (from + slot) % kPieces) : from_float<Half>(p.b[at]);
        }
        *reinterpret_cast<Half*>(space + place_of(row, slot / 8) + slot % 8 * 2) = value;
      }
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[kTilesM][4], b[kTilesN / 2][4];
        load(base, half, a, b);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < kTilesN; ++j)
            multiply(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], Half{});
        }
      }
    }
    each_sum([&](int64_t token, int64_t row, int i, int j, int e) {
      p.out.store(token, row, acc[i][j][e] * (p.scb[row] * kInt8Scale));
    });
  }
#endif
}

template <typename T, int kM>
cudaError_t launch(const Launch& on, const Product8<T>& product) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((product.m + kM - 1) / kM * ((product.out.n + kN - 1) / kN)));
  shape.block = dim3(kThreads);
  shape.shared = kStages * (kM + kN) * kRow;
  return launch_kernel(on, shape, int8_gemm_kernel<T, kM>, product);
}

}  // namespace

template <typename T>
cudaError_t int8_gemm_sm80(const Launch& on, const Product8<T>& product) {
  return product.m <= 64 ? launch<T, 64>(on, product) : launch<T, 128>(on, product);
}

template cudaError_t int8_gemm_sm80(const Launch&, const Product8<half_t>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<bf16_t>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<float>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<int32_t>&);

}  // namespace halfbyte::cuda
