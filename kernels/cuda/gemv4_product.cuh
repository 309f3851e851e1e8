// What the products of a few rows of x with a tiled 4-bit weight share: where row tiles are, x as B
// fragments, and the way of the sums of warps, and of the blocks of a cluster, into y.
#pragma once

#include <utility>

#include "activation.cuh"
#include "cluster.cuh"
#include "gemv4.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {

constexpr int kMaxWarps = 16;

template <typename T>
struct Gemv {
  Tiled4 w[kMaxGroup];
  Output<T> out[kMaxGroup];
  int before[kMaxGroup + 1];  // row tiles of the weights before
  int each, rest;             // row tiles (pairs, when gated) of a cluster; the first `rest` have one more
  Book4 book;
  int count;
  bool gated;  // two weights whose row tiles alternate
  Activation act;
  const T* x;
  int m, tiles;  // rows of x; k tiles
  int units;     // of a block's share of K
  int chunk;     // row tiles between two reductions
};

template <typename T>
__device__ __forceinline__ RowTile locate(const Gemv<T>& p, int row_tile, bool nested) {
  int part = 0, local = row_tile;
  if (p.gated) {
    part = row_tile % 2;
    local = row_tile / 2;
  } else {
    while (part + 1 < p.count && row_tile >= p.before[part + 1]) ++part;
    local -= p.before[part];
  }
  const Absmax& absmax = p.w[part].absmax;
  const void* const scales = nested ? static_cast<const void*>(absmax.codes) : absmax.plain;
  return row_tile_of(p.w[part].codes, scales, absmax.nested, nested, int64_t{local} * p.tiles, part);
}

/// Words of 32 k, of each half of a tile, that lanes of a quad hold four each, in order, to those that each
/// needs: lane t gets t, 4 + t, ...
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[8], int t) {
  const bool odd = t & 1, high = t & 2;
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    uint32_t* const r = x + half;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
      (odd ? r[i] : r[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? r[i] : r[i + 2], 2);
      (high ? r[i] : r[i + 2]) = other;
    }
  }
}

/// Where in x begins what lane 4 g + t loads of the 64 k of a tile and a row of x; -1: nothing is there.
template <typename T>
__device__ __forceinline__ int place_of_x(const Gemv<T>& p, int token, int tile, bool there, int t) {
  return there ? (token * p.tiles + tile) * static_cast<int>(kTileK) + t * 8 : -1;
}
/// That, or zeros; then transpose_quad() is due.
template <typename T>
__device__ __forceinline__ void load_x(uint32_t (&x)[8], const Gemv<T>& p, int place) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (place >= 0) piece = *reinterpret_cast<const uint4*>(p.x + place + half * 32);
    x[half * 4] = piece.x;
    x[half * 4 + 1] = piece.y;
    x[half * 4 + 2] = piece.z;
    x[half * 4 + 3] = piece.w;
  }
}

/// body(0), body(1), ... with compile-time numbers: loops whose registers the compiler would else put into
/// memory.
template <typename Body, int... i>
__device__ __forceinline__ void for_each(std::integer_sequence<int, i...>, const Body& body) {
  (body(std::integral_constant<int, i>{}), ...);
}

/// One and two rows of x on sm_90, which is faster there, and three and four where the weight is small.
/// gemv4_sm90.cu
template <typename T>
bool gemv4_sm90_takes(const Launch& on, const Gemv<T>& gemv);
template <typename T>
cudaError_t gemv4_sm90(const Launch& on, const Gemv<T>& gemv);

/// Where a sum of a row tile is: tokens of a row turn, so that rows of one token are in different banks.
template <int kTokens>
__device__ __forceinline__ int sum_place(int row, int token) {
  return row * kTokens + (token + row / (32 / kTokens) * 2) % kTokens;
}

/// Sums of a warp: rows g and g + 8 of a row tile, tokens 2 t % kTokens and the next, of each column's tile;
/// `partial` is [warps][16][kTokens].
template <int kTokens>
__device__ __forceinline__ void put_sums(float (&acc)[4], float* partial, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int e = 0; e < 4; e += kTokens == 1 ? 2 : 1) {
#pragma unroll
    for (int between = 2; between >= (kTokens + 1) / 2; between /= 2)
      acc[e] += __shfl_xor_sync(0xffffffffu, acc[e], between);
  }
  float* const to = partial + warp * kTileRows * kTokens;
  if constexpr (kTokens == 1) {
    if (t == 0) {
      to[g] = acc[0];
      to[g + 8] = acc[2];
    }
  } else if (t < kTokens / 2) {
    *reinterpret_cast<float2*>(to + sum_place<kTokens>(g, 2 * t)) = make_float2(acc[0], acc[1]);
    *reinterpret_cast<float2*>(to + sum_place<kTokens>(g + 8, 2 * t)) = make_float2(acc[2], acc[3]);
  }
}

/// `count` row tiles from `first` on, whose sums are in `partial`, into y; by all threads of the blocks of a
/// cluster, which may write new sums afterwards.
template <int kTokens, typename T>
__device__ __forceinline__ void finish_row_tiles(const Gemv<T>& p, float* partial, int first, int count) {
  const int warps = blockDim.x / 32, splits = cluster_size(), rank = cluster_rank();
  const int step = p.gated ? 2 : 1;
  __syncthreads();
  constexpr int kSums = kTileRows * kTokens;  // of a row tile
  const auto sum_of = [&](int slot, int at) {
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += partial[(slot * warps + w) * kSums + at];
    return sum;
  };
  if (splits > 1) {  // each block's sums in the place of its first warp's, then all blocks together
    for (int i = threadIdx.x; i < count * kSums; i += blockDim.x)
      partial[i / kSums * warps * kSums + i % kSums] = sum_of(i / kSums, i % kSums);
    cluster_barrier();
  }
  const auto total_of = [&](int slot, int at) {
    if (splits == 1) return sum_of(slot, at);
    float sum = 0.0f;
    for (int r = 0; r < splits; ++r) sum += cluster_value(partial + slot * warps * kSums + at, r);
    return sum;
  };
  const int results = count / step * kSums;
  for (int i = threadIdx.x + rank * blockDim.x; i < results; i += splits * blockDim.x) {
    const int at = i / kSums * step, row = i % kTileRows, token = i % kSums / kTileRows;
    if (token >= p.m) continue;
    const float total = total_of(at, sum_place<kTokens>(row, token));
    if (p.gated) {
      const int64_t column = int64_t{(first + at) / 2} * kTileRows + row;
      float gate = total, up = total_of(at + 1, sum_place<kTokens>(row, token));
      if (p.out[0].bias) gate += p.out[0].bias_at(column);
      if (p.out[1].bias) up += p.out[1].bias_at(column);
      p.out[0].y[token * p.out[0].n + column] = from_float<T>(activate<true>(p.act, gate) * up);
    } else {
      int part = 0;
      while (part + 1 < p.count && first + at >= p.before[part + 1]) ++part;
      p.out[part].store(token, int64_t{first + at - p.before[part]} * kTileRows + row, total);
    }
  }
  if (splits > 1)
    cluster_barrier();
  else
    __syncthreads();
}

}  // namespace halfbyte::cuda
