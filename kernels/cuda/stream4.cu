// y = x W^T + bias + residual with a 4-bit weight, a few rows of x, fp32 multiply-adds throughout: exact for
// every dtype, any K and blocksize, both layouts. Codes and absmax are read once for up to 8 rows of x.
//
//   stream_kernel   flat, where a lane's 8 codes lie in one block and a row on whole words (K % 32 = 0):
//                   a warp makes kRows outputs; a lane holds 8 consecutive k (4 bytes of codes a row), a
//                   warp 256, and kSteps such runs are loaded ahead
//   element_kernel  flat, every other K
//   tiled_kernel    tiled: a block makes 16 outputs, its warps take k tiles in turn
//
// The codebook sits in shared memory once per lane, so a look-up never meets another in a bank. Products of a
// run are summed before absmax scales them.
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 4;  // weight rows a warp works on at once, sharing the loads of x

template <typename T, int M>
__global__ void __launch_bounds__(kWarps * 32)
    stream_kernel(Output<T> out, const T* __restrict__ x, const uint8_t* __restrict__ codes, Absmax absmax,
                  QuantType type, int64_t k, int64_t rows_of_x, int log_blocksize) {
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t first_row = (blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32) * kRows;
  const int64_t first_x = blockIdx.y * static_cast<int64_t>(M);
  if (first_row >= out.n) return;
  constexpr int kSteps = 4;
  float acc[kRows][M] = {};
  for (int64_t start = lane * 8; start < k; start += 256 * kSteps) {
    uint32_t packed[kSteps][kRows];
    float scale[kSteps][kRows];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t at = start + s * 256;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t element = (first_row + r < out.n ? first_row + r : out.n - 1) * k + at;
        packed[s][r] = at < k ? *reinterpret_cast<const uint32_t*>(codes + element / 2) : 0;
        scale[s][r] = at < k ? absmax[element >> log_blocksize] : 0.0f;
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t at = start + s * 256;
      if (at >= k) break;
      float part[kRows][M] = {};
      Vec<T, 8> in[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int64_t row = first_x + m < rows_of_x ? first_x + m : rows_of_x - 1;
        in[m] = *reinterpret_cast<const Vec<T, 8>*>(x + row * k + at);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = table[(packed[s][r] >> ((i / 2) * 8 + (i % 2 ? 0 : 4))) & 15][lane];
#pragma unroll
          for (int m = 0; m < M; ++m) part[r][m] = fmaf(value, to_float(in[m].v[i]), part[r][m]);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) acc[r][m] = fmaf(part[r][m], scale[s][r], acc[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float total = warp_sum(acc[r][m]);
      if (lane == 0 && first_row + r < out.n && first_x + m < rows_of_x)
        out.store(first_x + m, first_row + r, total);
    }
  }
}

/// Any K: rows may start in the middle of a byte or a block. A warp makes one output element.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    element_kernel(Output<T> out, const T* __restrict__ x, const uint8_t* __restrict__ codes, Absmax absmax,
                   QuantType type, int64_t k, int log_blocksize) {
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32, m = blockIdx.y;
  if (row >= out.n) return;
  float acc = 0.0f;
  for (int64_t at = lane; at < k; at += 32) {
    const int64_t element = row * k + at;
    const uint32_t byte = codes[element / 2];
    const float value = table[element % 2 ? byte & 15 : byte >> 4][lane] * absmax[element >> log_blocksize];
    acc = fmaf(value, to_float(x[m * k + at]), acc);
  }
  const float total = warp_sum(acc);
  if (lane == 0) out.store(m, row, total);
}

/// Lane 4 g + t has rows g and g + 8 of the tile, k 16 j + 2 t + {0, 1, 8, 9} of each of its 4 steps.
template <typename T, int M>
__global__ void __launch_bounds__(kWarps * 32)
    tiled_kernel(Output<T> out, const T* __restrict__ x, Tiled4 w, int64_t rows_of_x) {
  __shared__ float table[16][32];
  __shared__ float sums[kWarps][kTileRows][M];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(w.type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = blockIdx.x * kTileRows, first_x = blockIdx.y * static_cast<int64_t>(M);
  const int64_t tiles = w.k / kTileK;
  float acc[2][M] = {};
#pragma unroll 2
  for (int64_t kt = warp; kt < tiles; kt += kWarps) {
    const auto bytes =
        *reinterpret_cast<const Vec<uint8_t, 16>*>(w.codes + (blockIdx.x * tiles + kt) * 512 + lane * 16);
    const float scale[2] = {w.scale(first_row + g, kt), w.scale(first_row + g + 8, kt)};
    float part[2][M] = {};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {  // two bytes, rows g and g + 8, of one pair of k
      const int64_t at = kt * kTileK + i / 4 * 16 + t * 2 + i % 4 / 2 * 8;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const T* in = x + (first_x + m < rows_of_x ? first_x + m : rows_of_x - 1) * w.k + at;
        const float even = to_float(in[0]), odd = to_float(in[1]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          part[h][m] = fmaf(table[bytes.v[i + h] >> 4][lane], even, part[h][m]);
          part[h][m] = fmaf(table[bytes.v[i + h] & 15][lane], odd, part[h][m]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int m = 0; m < M; ++m) acc[h][m] = fmaf(part[h][m], scale[h], acc[h][m]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = acc[h][m];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (t == 0) sums[warp][g + 8 * h][m] = total;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * M; i += blockDim.x) {
    const int row = i / M, m = i % M;
    float total = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) total += sums[from][row][m];
    if (first_x + m < rows_of_x) out.store(first_x + m, first_row + row, total);
  }
}

}  // namespace

cudaError_t stream4(cudaStream_t stream, const View& y, const View& x, const Weight4& w,
                    const Epilogue& epilogue) {
  const int64_t rows = x.rows();
  const int log_blocksize = log2_of(w.blocksize);
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const Output<T> out = output_of<T>(y, epilogue);
    const auto grid_of = [&](int64_t rows_of_w, int64_t m) {
      return dim3(blocks_for(w.n, rows_of_w, INT32_MAX), static_cast<unsigned>((rows + m - 1) / m));
    };
    const auto by_rows = [&](const auto& run) {  // run(kernel, its rows of x)
      if (rows == 1)
        run(std::integral_constant<int, 1>{});
      else if (rows == 2)
        run(std::integral_constant<int, 2>{});
      else if (rows <= 4)
        run(std::integral_constant<int, 4>{});
      else
        run(std::integral_constant<int, 8>{});
    };
    if (w.layout == Layout4::tiled) {
      by_rows([&](auto m) {
        tiled_kernel<T, m()>
            <<<grid_of(kTileRows, m()), kWarps * 32, 0, stream>>>(out, x.as<const T>(), tiled_of(w), rows);
      });
    } else if (w.k % 32 == 0 && w.k > 0 && is_aligned(w.codes.data, 4) && is_aligned(x.data, 32)) {
      by_rows([&](auto m) {
        stream_kernel<T, m()><<<grid_of(kWarps * kRows, m()), kWarps * 32, 0, stream>>>(
            out, x.as<const T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, w.k, rows,
            log_blocksize);
      });
    } else {
      element_kernel<T><<<grid_of(kWarps, 1), kWarps * 32, 0, stream>>>(
          out, x.as<const T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, w.k, log_blocksize);
    }
  });
  return cudaGetLastError();
}

}  // namespace halfbyte::cuda
