// Between the flat and the tiled layout of a 4-bit weight (formats.h), and the values of a tiled one.
//
// A tile is 16 rows x 64 k. Into the tiled layout a lane reads the two rows that its 16 bytes come from,
// whole (the lanes of a group of four read the same), and picks its byte of every word. Back, and for values,
// a warp takes a tile through shared memory. Rows are read and written in whole 32-byte sectors (codes) or
// 128-byte lines (16-bit values), tiles as 16 bytes a lane; absmax go 16 rows x 64 tiles at a time.
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;

/// Row r, lane's 16 bytes: byte 4 j + 2 half + h of lane 4 g + t is byte 8 j + 4 half + t of row g + 8 h.
__device__ __forceinline__ int row_of(int lane, int i) { return lane / 4 + i % 2 * 8; }
__device__ __forceinline__ int byte_of(int lane, int i) { return i / 4 * 8 + i % 4 / 2 * 4 + lane % 4; }

/// Where the flat codes of row `row` of a tile begin.
__device__ __forceinline__ int64_t flat_row(int64_t tile, int row, int64_t k) {
  const int64_t across = k / kTileK;
  return (tile / across * kTileRows + row) * (k / 2) + tile % across * (kTileK / 2);
}

constexpr int kTiles = 2;  // of a warp

__global__ void __launch_bounds__(kWarps * 32)
    to_tiled_kernel(uint8_t* __restrict__ to, const uint8_t* __restrict__ from, int64_t tiles, int64_t k) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32) * kTiles;
  uint32_t rows[kTiles][2][8];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (first + tile >= tiles) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto* row = reinterpret_cast<const uint4*>(from + flat_row(first + tile, lane / 4 + 8 * h, k));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 four = row[i];
        rows[tile][h][4 * i] = four.x;
        rows[tile][h][4 * i + 1] = four.y;
        rows[tile][h][4 * i + 2] = four.z;
        rows[tile][h][4 * i + 3] = four.w;
      }
    }
  }
  const uint32_t pick = (lane % 4) | (lane % 4 + 4) << 4;  // this lane's byte of two words
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (first + tile >= tiles) break;
    uint32_t piece[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = __byte_perm(rows[tile][0][2 * j], rows[tile][1][2 * j], pick);
      const uint32_t high = __byte_perm(rows[tile][0][2 * j + 1], rows[tile][1][2 * j + 1], pick);
      piece[j] = __byte_perm(low, high, 0x5410);
    }
    *reinterpret_cast<uint4*>(to + (first + tile) * 512 + lane * 16) =
        make_uint4(piece[0], piece[1], piece[2], piece[3]);
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    to_flat_kernel(uint8_t* __restrict__ to, const uint8_t* __restrict__ from, int64_t tiles, int64_t k) {
  __shared__ __align__(16) uint8_t shared[kWarps][kTileRows][kTileK / 2];
  auto& rows = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t tile = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (tile >= tiles) return;
  using Piece = Vec<uint8_t, 16>;
  const Piece piece = *reinterpret_cast<const Piece*>(from + tile * 512 + lane * 16);
#pragma unroll
  for (int i = 0; i < 16; ++i) rows[row_of(lane, i)][byte_of(lane, i)] = piece.v[i];
  __syncwarp();
  *reinterpret_cast<Piece*>(to + flat_row(tile, lane / 2, k) + lane % 2 * 16) =
      *reinterpret_cast<const Piece*>(&rows[lane / 2][lane % 2 * 16]);
}

constexpr int kRun = 64;  // tiles across of which a block takes the absmax

template <typename S>
__global__ void __launch_bounds__(256) absmax_kernel(S* __restrict__ to, const S* __restrict__ from,
                                                     int64_t across, int64_t runs, bool to_tiled) {
  __shared__ S some[kTileRows][kRun + 4 / sizeof(S)];
  const int64_t rows = blockIdx.x / runs, begin = blockIdx.x % runs * kRun;
  const int length = static_cast<int>(min(int64_t{kRun}, across - begin));
  const int64_t flat = rows * kTileRows * across + begin, tiled = (rows * across + begin) * kTileRows;
  for (int i = threadIdx.x; i < kTileRows * kRun; i += blockDim.x) {
    if (to_tiled) {
      const int row = i / kRun, tile = i % kRun;
      if (tile < length) some[row][tile] = from[flat + row * across + tile];
    } else if (i < length * kTileRows) {
      some[i % kTileRows / 2 + i % 2 * 8][i / kTileRows] = from[tiled + i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kRun; i += blockDim.x) {
    if (!to_tiled) {
      const int row = i / kRun, tile = i % kRun;
      if (tile < length) to[flat + row * across + tile] = some[row][tile];
    } else if (i < length * kTileRows) {
      to[tiled + i] = some[i % kTileRows / 2 + i % 2 * 8][i / kTileRows];
    }
  }
}

template <typename T, int kPiece>
__global__ void __launch_bounds__(kWarps * 32) values_kernel(T* __restrict__ y, Tiled4 w, int64_t tiles) {
  constexpr int kStride = kTileK + 16 / sizeof(T);  // rows apart by some banks
  __shared__ __align__(16) T shared[kWarps][kTileRows][kStride];
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(w.type)][i / 32];
  __syncthreads();
  auto& rows = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t across = w.k / kTileK;
  for (int64_t tile = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32; tile < tiles;
       tile += gridDim.x * static_cast<int64_t>(kWarps)) {
    const int64_t first_row = tile / across * kTileRows, kt = tile % across;
    const auto piece = *reinterpret_cast<const Vec<uint8_t, 16>*>(w.codes + tile * 512 + lane * 16);
    const float scale[2] = {w.scale(first_row + lane / 4, kt), w.scale(first_row + lane / 4 + 8, kt)};
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      Vec<T, 2> pair;
      pair.v[0] = from_float<T>(table[piece.v[i] >> 4][lane] * scale[i % 2]);
      pair.v[1] = from_float<T>(table[piece.v[i] & 15][lane] * scale[i % 2]);
      *reinterpret_cast<Vec<T, 2>*>(&rows[row_of(lane, i)][2 * byte_of(lane, i)]) = pair;
    }
    __syncwarp();
    constexpr int kPerRow = kTileK / kPiece;
#pragma unroll
    for (int i = lane; i < kTileRows * kPerRow; i += 32) {
      const int row = i / kPerRow, at = i % kPerRow * kPiece;
      *reinterpret_cast<Vec<T, kPiece>*>(y + (first_row + row) * w.k + kt * kTileK + at) =
          *reinterpret_cast<const Vec<T, kPiece>*>(&rows[row][at]);
    }
  }
}

}  // namespace

cudaError_t dequantize_tiled(cudaStream_t stream, const View& y, const Tiled4& w) {
  const int64_t tiles = w.n / kTileRows * (w.k / kTileK);
  if (tiles == 0) return cudaSuccess;
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const auto kernel = is_aligned(y.data, 16) ? values_kernel<T, 16 / sizeof(T)> : values_kernel<T, 1>;
    kernel<<<blocks_for(tiles, kWarps, INT32_MAX), kWarps * 32, 0, stream>>>(y.as<T>(), w, tiles);
  });
  return cudaGetLastError();
}

Status CudaBackend::tile_4bit(Queue queue, View codes, View absmax, View from_codes, View from_absmax,
                              int64_t n, int64_t k, Layout4 to) {
  if (Status status = enter(); !status.ok()) return status;
  if (!can_tile(n, k, kTileK)) return refuse("tile_4bit", "these sizes cannot be tiled");
  const int64_t tiles = n / kTileRows * (k / kTileK);
  if (tiles == 0) return {};
  if (!is_aligned(codes.data, 16) || !is_aligned(from_codes.data, 16))
    return refuse("tile_4bit", "the codes are not 16-byte aligned");
  const bool to_tiled = to == Layout4::tiled;
  if (to_tiled)
    to_tiled_kernel<<<blocks_for(tiles, kWarps * kTiles, INT32_MAX), kWarps * 32, 0, stream(queue)>>>(
        codes.as<uint8_t>(), from_codes.as<const uint8_t>(), tiles, k);
  else
    to_flat_kernel<<<blocks_for(tiles, kWarps, INT32_MAX), kWarps * 32, 0, stream(queue)>>>(
        codes.as<uint8_t>(), from_codes.as<const uint8_t>(), tiles, k);
  const int64_t across = k / kTileK, runs = (across + kRun - 1) / kRun;
  const auto move_absmax = [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    absmax_kernel<S><<<static_cast<unsigned>(n / kTileRows * runs), 256, 0, stream(queue)>>>(
        absmax.as<S>(), from_absmax.as<const S>(), across, runs, to_tiled);
  };
  if (absmax.dtype == DType::f32)
    move_absmax(static_cast<float*>(nullptr));
  else
    move_absmax(static_cast<uint8_t*>(nullptr));
  return check(cudaGetLastError(), "tile_4bit");
}

}  // namespace halfbyte::cuda
