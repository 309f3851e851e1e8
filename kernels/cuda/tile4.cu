// Between the flat and the tiled layout of a 4-bit weight (formats.h), and the values of a tiled one.
//
// A warp takes a tile of 16 rows x 64 k through shared memory: rows are read and written in whole 32-byte
// sectors (codes) or 128-byte lines (16-bit values), the tile as 16 bytes a lane.
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;

/// Row r, lane's 16 bytes: byte 4 j + 2 half + h of lane 4 g + t is byte 8 j + 4 half + t of row g + 8 h.
__device__ __forceinline__ int row_of(int lane, int i) { return lane / 4 + i % 2 * 8; }
__device__ __forceinline__ int byte_of(int lane, int i) { return i / 4 * 8 + i % 4 / 2 * 4 + lane % 4; }

template <bool to_tiled>
__global__ void __launch_bounds__(kWarps * 32)
    codes_kernel(uint8_t* __restrict__ to, const uint8_t* __restrict__ from, int64_t tiles, int64_t k) {
  __shared__ __align__(16) uint8_t shared[kWarps][kTileRows][kTileK / 2];
  auto& rows = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t tile = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (tile >= tiles) return;
  const int64_t across = k / kTileK;
  const int64_t flat =
      (tile / across * kTileRows + lane / 2) * (k / 2) + tile % across * (kTileK / 2) + lane % 2 * 16;
  using Piece = Vec<uint8_t, 16>;
  Piece& in_row = *reinterpret_cast<Piece*>(&rows[lane / 2][lane % 2 * 16]);
  const int64_t tiled = tile * 512 + lane * 16;
  Piece piece;
  if (to_tiled) {
    in_row = *reinterpret_cast<const Piece*>(from + flat);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) piece.v[i] = rows[row_of(lane, i)][byte_of(lane, i)];
    *reinterpret_cast<Piece*>(to + tiled) = piece;
  } else {
    piece = *reinterpret_cast<const Piece*>(from + tiled);
#pragma unroll
    for (int i = 0; i < 16; ++i) rows[row_of(lane, i)][byte_of(lane, i)] = piece.v[i];
    __syncwarp();
    *reinterpret_cast<Piece*>(to + flat) = in_row;
  }
}

template <typename S>
__global__ void absmax_kernel(S* __restrict__ to, const S* __restrict__ from, int64_t n, int64_t k,
                              bool to_tiled) {
  const int64_t across = k / kTileK;
  for (int64_t flat = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; flat < n * across;
       flat += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t tiled = tiled_block(flat / across, flat % across, k);
    to[to_tiled ? tiled : flat] = from[to_tiled ? flat : tiled];
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
  const auto kernel = to_tiled ? codes_kernel<true> : codes_kernel<false>;
  kernel<<<blocks_for(tiles, kWarps, INT32_MAX), kWarps * 32, 0, stream(queue)>>>(
      codes.as<uint8_t>(), from_codes.as<const uint8_t>(), tiles, k);
  const unsigned blocks = blocks_for(tiles * 16, 256);
  if (absmax.dtype == DType::f32) {
    absmax_kernel<<<blocks, 256, 0, stream(queue)>>>(absmax.as<float>(), from_absmax.as<const float>(), n, k,
                                                     to_tiled);
  } else {
    absmax_kernel<<<blocks, 256, 0, stream(queue)>>>(absmax.as<uint8_t>(), from_absmax.as<const uint8_t>(), n,
                                                     k, to_tiled);
  }
  return check(cudaGetLastError(), "tile_4bit");
}

}  // namespace halfbyte::cuda
