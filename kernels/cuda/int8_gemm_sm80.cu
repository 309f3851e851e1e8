// y = (a b^T * row scale + outlier columns) * column scale + bias + residual with int8 a [M, K] and b [N, K],
// by mma.sync (sm_80 and up; the int32 sums alone on sm_75 too), for 5 rows of a and more.
//
// A block makes kM tokens x kN rows of b, of the whole of K (gemm_sm80.cuh); a few rows of a are multiplied
// by warps that divide each step of K and add their sums up in shared memory, so that enough bytes are under
// way.
//
// Outlier columns follow in 16 bits: the 4 bytes round each element of up to 16 columns are copied into the
// stage of the ring behind the last, while that is multiplied, and taken apart on the way into mma m16n8k16,
// which adds to the same sums, by then fp32 and times the token's scale. Codes are exact in 16 bits, an fp32
// x goes in three pieces (int8_product.cuh).
//
// Needs K % 16 = 0 and operands on 16 bytes; M and N below 2^31 (what is beyond is not kept).
#include <limits>

#include "gemm_sm80.cuh"
#include "int8_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kColumns = 16;  // outlier columns at a time

/// A pair of outlier elements as the tensor cores want it: a part of two words that were copied.
template <typename T>
__device__ __forceinline__ uint32_t pair_of_x(uint2 words, int low, int high, int piece) {
  using Half = typename OutlierType<T>::type;
  Vec<Half, 2> pair;
  if constexpr (std::is_same_v<T, float>) {
    pair.v[0] = piece_of(__uint_as_float(words.x), piece);
    pair.v[1] = piece_of(__uint_as_float(words.y), piece);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    return __byte_perm(words.x >> low % 2 * 16, words.y >> high % 2 * 16, 0x5410);
  }
}
template <typename Half>
__device__ __forceinline__ uint32_t pair_of_codes(uint2 words, int low, int high) {
  const auto code = [](uint32_t word, int column) {
    return static_cast<float>(static_cast<int8_t>(word >> column % 4 * 8));
  };
  return pair_of<Half>(code(words.x, low), code(words.y, high));
}

template <typename T, typename G>
__device__ __forceinline__ void multiply_block(const Product8<T>& p) {
  extern __shared__ __align__(128) char space[];
  const uint32_t base = shared_address(space);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int m = static_cast<int>(p.m), n = static_cast<int>(p.out.n);
  const Corner first = corner_of<G>(blockIdx.x, m, n);
  let_next_start();
  wait_for_results();

  const int32_t* const columns = p.list + 1;
  const int count = p.list ? p.list[0] : 0;
  // 16-bit x may begin within a word
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(p.x) % 4 / sizeof(T));
  // outlier columns from `from` on, of all the block's rows: a word each
  const auto copy_columns = [&](uint32_t stage, int from) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<T, int32_t>) {
      const int mine = threadIdx.x % kColumns;
      const bool there = from + mine < count;
      const int64_t column = there ? columns[from + mine] : 0;
      const char* const x = reinterpret_cast<const char*>(p.x - odd) + (column + odd) * sizeof(T) / 4 * 4;
      const int8_t* const b = p.b + column / 4 * 4;
#pragma unroll 2
      for (int row = threadIdx.x / kColumns; row < G::kM + G::kN; row += G::kThreads / kColumns) {
        const void* source =
            row < G::kM ? static_cast<const void*>(x + min(first.m + row, m - 1) * p.k * int64_t{sizeof(T)})
                        : b + min(first.n + row - G::kM, n - 1) * p.k;
        copy_word_async(stage + G::place(row, mine / 4) + mine % 4 * 4, source, there ? 4 : 0);
      }
    }
  };

  int32_t sums[G::kTilesM][G::kTilesN][4] = {};
  const Operands operands{reinterpret_cast<const char*>(p.a), reinterpret_cast<const char*>(p.b), m, n, p.k};
  const uint32_t last = multiply_tiles<G, int8_t>(
      sums, base, operands, first, [&](uint32_t stage) __attribute__((always_inline)) {
        if (count > 0) copy_columns(stage, 0);
      });

  const int warp = threadIdx.x % G::kGroup / 32, group = threadIdx.x / G::kGroup;
  if constexpr (G::kWarpsK > 1) {  // the sums of the other groups, around the stage that has outliers
    static_assert((G::kWarpsK - 1) * G::kM * G::kN * 4 <= G::kSharedBytes - G::kTileBytes);
    const auto place_of = [&](int from, int i, int j) {
      const int at = last - base + G::kTileBytes +
                     (((from - 1) * G::kTilesM + i) * G::kTilesN + j) * G::kGroup * 16 +
                     threadIdx.x % G::kGroup * 16;
      return reinterpret_cast<int4*>(space + (at < G::kSharedBytes ? at : at - G::kSharedBytes));
    };
    if (group > 0) {
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j)
          *place_of(group, i, j) = make_int4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
      }
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j) {
#pragma unroll
          for (int from = 1; from < G::kWarpsK; ++from) {
            const int4 more = *place_of(from, i, j);
            sums[i][j][0] += more.x;
            sums[i][j][1] += more.y;
            sums[i][j][2] += more.z;
            sums[i][j][3] += more.w;
          }
        }
      }
    }
  }

  const int warp_m = warp / G::kWarpsN * (G::kM / G::kWarpsM),
            warp_n = warp % G::kWarpsN * (G::kN / G::kWarpsN);
  if constexpr (std::is_same_v<T, int32_t>) {
    put_tile<G>(sums, space, [&](int row, int column, const Vec<int32_t, 4>& four) {
      const int64_t at = (first.m + row) * p.out.n + first.n + column;
      for (int e = 0; e < 4; ++e) {
        if (first.m + row < m && first.n + column + e < n) p.out.y[at + e] = four.v[e];
      }
    });
  } else {
    using Half = typename OutlierType<T>::type;
    float acc[G::kTilesM][G::kTilesN][4];
#pragma unroll
    for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = p.row_absmax[min(first.m + warp_m + i * 16 + g + h * 8, m - 1)] * kInt8Scale;
#pragma unroll
        for (int j = 0; j < G::kTilesN; ++j) {
#pragma unroll
          for (int e = h * 2; e < h * 2 + 2; ++e) acc[i][j][e] = static_cast<float>(sums[i][j][e]) * scale;
        }
      }
    }
    for (int from = 0; from < count; from += kColumns) {
      if (from > 0) {
        __syncthreads();
        copy_columns(last, from);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
      }
      if (group > 0) continue;
      // of the columns this lane puts together: 2 t, 2 t + 1, and 8 further
      int own[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) own[c] = columns[min(from + t * 2 + c % 2 + c / 2 * 8, count - 1)];
      const char* const stage = space + (last - base);
      const auto words_of = [&](int row, int half) {
        return *reinterpret_cast<const uint2*>(stage + G::place(row, half * 2 + t / 2) + t % 2 * 8);
      };
      uint32_t b[G::kTilesN][2];
#pragma unroll
      for (int j = 0; j < G::kTilesN; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          b[j][h] = pair_of_codes<Half>(words_of(G::kM + warp_n + j * 8 + g, h), own[h * 2], own[h * 2 + 1]);
      }
#pragma unroll
      for (int i = 0; i < G::kTilesM; ++i) {
#pragma unroll
        for (int piece = 0; piece < OutlierType<T>::kPieces; ++piece) {
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r)
            a[r] = pair_of_x<T>(words_of(warp_m + i * 16 + g + r % 2 * 8, r / 2), own[r / 2 * 2] + odd,
                                own[r / 2 * 2 + 1] + odd, piece);
#pragma unroll
          for (int j = 0; j < G::kTilesN; ++j) multiply(acc[i][j], a, b[j][0], b[j][1], Half{});
        }
      }
    }
    wait_copies<0>();
    const TileOutput<T> y(p.out, m, first.m, first.n + threadIdx.x % (G::kN / 4) * 4, p.scb, kInt8Scale);
    put_tile<G>(acc, space, [&](int row, int, const Vec<float, 4>& four) { y.put(row, four); });
  }
}

/// sm_75 has it for sums alone.
template <typename T, typename G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks) int8_gemm_kernel(const Product8<T> p) {
  if constexpr (!HALFBYTE_SM75 || std::is_same_v<T, int32_t>) multiply_block<T, G>(p);
}

template <typename T, typename G>
cudaError_t launch(const Launch& on, const Product8<T>& product) {
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>((product.m + G::kM - 1) / G::kM * ((product.out.n + G::kN - 1) / G::kN)));
  shape.block = dim3(G::kThreads);
  shape.shared = G::kSharedBytes;
  return launch_kernel(on, shape, int8_gemm_kernel<T, G>, product);
}

//                   M    N  warps    row  stages, blocks; all fit an sm_86, the first an sm_75
using Rows16 = Gemm<16, 32, 1, 2, 4, 256, 5, 2>;
using Rows32 = Gemm<32, 64, 1, 2, 4, 256, 4, 2>;
using Rows64 = Gemm<64, 64, 2, 2, 2, 128, 5, 2>;
using Tall = Gemm<128, 64, 2, 2, 2, 128, 4, 1>;
using Large = Gemm<128, 256, 2, 4, 1, 64, 4, 1>;

}  // namespace

template <typename T>
cudaError_t int8_gemm_sm80(const Launch& on, const Product8<T>& product) {
  cudaError_t (*best)(const Launch&, const Product8<T>&) = nullptr;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](auto shape, double each, double alone) {
    using G = decltype(shape);
    const double cost = cost_of<G>(on, product.m, product.out.n, each, alone);
    if (cost >= least) return;
    least = cost;
    best = launch<T, G>;
  };
  consider(Large{}, 1.48, 1.48);
  if (is_lean(on))
    consider(GemmSquareLean{}, 1.55, 2.2);
  else
    consider(GemmSquare{}, 1.5, 2.1);
  consider(Tall{}, 2.1, 2.1);
  consider(Rows64{}, 2.7, 2.7);
  consider(Rows32{}, 5.2, 5.2);
  consider(Rows16{}, 9.0, 9.0);
  return best(on, product);
}

template cudaError_t int8_gemm_sm80(const Launch&, const Product8<half_t>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<bf16_t>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<float>&);
template cudaError_t int8_gemm_sm80(const Launch&, const Product8<int32_t>&);

}  // namespace halfbyte::cuda
