// y [M, N] = x [M, K] W [N, K]^T + bias + residual, 16-bit, by wgmma of sm_90a. Bound by the tensor cores
// from some hundreds of rows on.
//
// A block makes 128 rows of x times kN rows of W: a producer thread, and two consumer warpgroups of 64 rows
// of x each. One step is 64 k:
//
//   producer  boxes of x [128][64 k] and W [kN][64 k], swizzled, by the copy engine into a ring
//   consumer  its part of x from the ring into registers (A), W from shared memory (B), fp32 sums in
//             registers; those of x for a step are loaded while the product of the step before runs
//   end       fp32 sums + bias + residual, rounded once, two columns a lane
//
// Blocks stay and take items in turn, in bands of rows of x, so that what runs at once shares x and W in L2.
#include "gemm_sm90.cuh"

#include <algorithm>

#include "launch.cuh"
#include "output_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kM = 128, kK = 64, kConsumers = 256, kThreads = kConsumers + 128;

template <int kN>
struct Space {
  static constexpr int kX = kM * kK * 2, kStage = kX + kN * kK * 2, kStages = kN == 256 ? 4 : 6;
  static constexpr int kBarriersAt = kStages * kStage, kBytes = kBarriersAt + kStages * 16;
  static_assert(kBytes <= 227 << 10);
};

struct Maps {
  CUtensorMap x, w;
};

template <typename T>
struct Gemm16 {
  Output<T> out;
  int m, steps, tiles_m, tiles_n, band;
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    gemm16_kernel(const __grid_constant__ Gemm16<T> p, const __grid_constant__ Maps maps) {
#if HALFBYTE_WGMMA
  using S = Space<kN>;
  constexpr int kStages = S::kStages;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t ring = shared_address(shared), full = ring + S::kBarriersAt, empty = full + kStages * 8;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, kConsumers / 32);
    }
    publish_barriers();
  }
  __syncthreads();

  const int items = p.tiles_m * p.tiles_n, per_band = p.band * p.tiles_n;
  const auto place_of = [&](int item) {
    const int band = item / per_band, in_band = item % per_band;
    const int width = min(p.band, p.tiles_m - band * p.band);
    return make_int2((band * p.band + in_band % width) * kM, in_band / width * kN);  // row of x, of W
  };
  int stage = 0;
  if (warp >= kConsumers / 32) {
    give_registers<40>();
    if (threadIdx.x == kConsumers) {
      uint32_t parity = 1;
      for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int2 place = place_of(item);
        for (int step = 0; step < p.steps; ++step) {
          const uint32_t at = ring + stage * S::kStage, barrier = full + stage * 8;
          wait_barrier(empty + stage * 8, parity);
          arrive_expecting(barrier, S::kStage);
          fetch_tile(at, maps.x, place.x, step * kK, barrier);
          fetch_tile(at + S::kX, maps.w, place.y, step * kK, barrier);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    take_registers<232>();
    const int row = warp * 16 + lane % 16;  // of x, that this lane addresses
    uint32_t parity = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      float acc[kN / 2];
      uint32_t a[2][4][4];
      int before = stage;  // the step whose product runs
      for (int step = 0; step < p.steps; step += 2) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          if (step + u < p.steps) {
            wait_barrier(full + stage * 8, parity);
            const uint32_t at = ring + stage * S::kStage;
#pragma unroll
            for (int j = 0; j < 4; ++j)
              load_matrices(a[u][j], at + row * 128 + (((j * 2 + lane / 16) ^ (row % 8)) * 16));
            const uint64_t w_tile = describe_b(at + S::kX, 0);
            begin_group();
#pragma unroll
            for (int j = 0; j < 4; ++j)
              multiply_group(acc, a[u][j], w_tile + ((j * 32) >> 4), step + u + j > 0, T{});
            commit_group();
            wait_group<1>();
            hold_registers(a[1 - u]);
            if (step + u > 0 && lane == 0) arrive(empty + before * 8);
            before = stage;
            if (++stage == kStages) stage = 0, parity ^= 1;
          }
        }
      }
      wait_group<0>();
      hold_registers(acc);
      if (lane == 0) arrive(empty + before * 8);

      const int2 place = place_of(item);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = place.x + warp * 16 + lane / 4 + half * 8;
        if (m >= p.m) continue;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
          const int64_t n = place.y + j * 8 + lane % 4 * 2;
          p.out.store2(m, n, acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
        }
      }
    }
  }
#endif
}

template <typename T, int kN>
cudaError_t launch(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m, int64_t k) {
  Gemm16<T> p = {};
  p.out = out;
  p.m = static_cast<int>(m);
  p.steps = static_cast<int>((k + kK - 1) / kK);
  p.tiles_m = static_cast<int>((m + kM - 1) / kM);
  p.tiles_n = static_cast<int>((out.n + kN - 1) / kN);
  p.band = std::min(p.tiles_m, 16);
  Maps maps;
  const DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  cudaError_t error = describe_tiles(&maps.x, dtype, x, m, k, kM);
  if (error == cudaSuccess) error = describe_tiles(&maps.w, dtype, w, out.n, k, kN);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(std::min<int64_t>(int64_t{p.tiles_m} * p.tiles_n, on.multiprocessors)));
  shape.block = dim3(kThreads);
  shape.shared = Space<kN>::kBytes;
  return launch_kernel(on, shape, gemm16_kernel<T, kN>, p, maps);
}

}  // namespace

template <typename T>
cudaError_t gemm_sm90(const Launch& on, const Output<T>& out, const T* x, const T* w, int64_t m, int64_t k) {
  // in steps of 256 rows of W
  const auto cost = [&](int n, double step, double end) {
    const int64_t items = (m + kM - 1) / kM * ((out.n + n - 1) / n);
    return static_cast<double>((items + on.multiprocessors - 1) / on.multiprocessors) *
           (static_cast<double>(k) / kK * step + end);
  };
  return cost(256, 1.0, 4.0) <= cost(128, 0.6, 2.0) ? launch<T, 256>(on, out, x, w, m, k)
                                                    : launch<T, 128>(on, out, x, w, m, k);
}

template cudaError_t gemm_sm90(const Launch&, const Output<half_t>&, const half_t*, const half_t*, int64_t,
                               int64_t);
template cudaError_t gemm_sm90(const Launch&, const Output<bf16_t>&, const bf16_t*, const bf16_t*, int64_t,
                               int64_t);

}  // namespace halfbyte::cuda
