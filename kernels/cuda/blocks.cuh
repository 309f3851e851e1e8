// The beginning of every blockwise quantisation: a warp's share of x in registers, and the absmax of its
// blocks.
//
// A lane holds kPieces pieces of 16 bytes, all loaded before the first is used; piece p of lane l begins at
// element (p * 32 + l) * kEach of the warp's share, so that every load of a warp is one run of 512 bytes (a
// row). A block (blocksize a power of two) is a part of a row, some rows, or the shares of some warps of the
// thread block: its absmax goes over lanes, over pieces, over shared memory. 16-bit maxima travel in pairs.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

constexpr int kQuantizeThreads = 256;
constexpr int kPieces = 4;

/// The smallest normal float: below it an absmax has no reciprocal and its block is all zeros.
constexpr float kLeastAbsmax = 1.17549435e-38f;

__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b, half_t) {
  const __half2 most = __hmax2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&most);
}
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b, bf16_t) {
  const __nv_bfloat162 most =
      __hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&most);
}
__device__ __forceinline__ float low_of(uint32_t pair, half_t) {
  return __low2float(*reinterpret_cast<__half2*>(&pair));
}
__device__ __forceinline__ float high_of(uint32_t pair, half_t) {
  return __high2float(*reinterpret_cast<__half2*>(&pair));
}
__device__ __forceinline__ float low_of(uint32_t pair, bf16_t) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair, bf16_t) {
  return __uint_as_float(pair & 0xffff0000u);
}

template <typename T>
struct Share {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kLogRow = sizeof(T) == 2 ? 8 : 7;
  static constexpr int kLogShare = kLogRow + 2;
  static constexpr int64_t kBlock = int64_t{kQuantizeThreads / 32} << kLogShare;  // elements a thread block
  static_assert(kPieces == 4 && kBlock >= 4096, "the largest block lies within a thread block");

  union {
    uint4 pieces[kPieces];
    uint32_t words[kPieces][4];
  };
  float absmax[kPieces];

  /// The element at which piece p of this lane begins, of thread block `block`.
  static __device__ __forceinline__ int64_t begin(int64_t block, int p) {
    return block * kBlock + ((static_cast<int64_t>(threadIdx.x) / 32) << kLogShare) + (p << kLogRow) +
           threadIdx.x % 32 * kEach;
  }

  /// Elements behind the end are zeros. `wide`: x is 16-byte aligned.
  __device__ __forceinline__ void load(const T* x, int64_t n, int64_t block, bool wide) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t at = begin(block, p);
      if (wide && at + kEach <= n) {
        pieces[p] = *reinterpret_cast<const uint4*>(x + at);
        continue;
      }
      Vec<T, kEach> some;
#pragma unroll
      for (int j = 0; j < kEach; ++j) some.v[j] = at + j < n ? x[at + j] : T(0.0f);
      pieces[p] = *reinterpret_cast<const uint4*>(&some);
    }
  }

  __device__ __forceinline__ float value(int p, int j) const {
    if constexpr (sizeof(T) == 2)
      return j % 2 ? high_of(words[p][j / 2], T{}) : low_of(words[p][j / 2], T{});
    else
      return __uint_as_float(words[p][j]);
  }

  /// absmax[p] of the block that piece p lies in; NaN does not count. Every thread of the block calls it,
  /// once.
  __device__ __forceinline__ void find_absmax(int log_blocksize) {
    const int lanes = log_blocksize >= kLogRow ? 32 : (1 << log_blocksize) / kEach;
    const int rows = log_blocksize > kLogRow ? 1 << (log_blocksize - kLogRow) : 1;
    if constexpr (sizeof(T) == 2) {
      uint32_t pairs[kPieces / 2];  // the maxima of two pieces
#pragma unroll
      for (int i = 0; i < kPieces / 2; ++i) {
        uint32_t halves[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t(&w)[4] = words[2 * i + h];
          constexpr uint32_t kAbs = 0x7fff7fffu;
          halves[h] =
              max_pair(max_pair(w[0] & kAbs, w[1] & kAbs, T{}), max_pair(w[2] & kAbs, w[3] & kAbs, T{}), T{});
        }
        pairs[i] = max_pair(__byte_perm(halves[0], halves[1], 0x5410),
                            __byte_perm(halves[0], halves[1], 0x7632), T{});
        if (rows >= 2) pairs[i] = max_pair(pairs[i], __byte_perm(pairs[i], 0, 0x1032), T{});
      }
      if (rows >= 4) pairs[0] = pairs[1] = max_pair(pairs[0], pairs[1], T{});
      for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (uint32_t& pair : pairs) pair = max_pair(pair, __shfl_xor_sync(0xffffffffu, pair, step), T{});
      }
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        absmax[p] = fmaxf(0.0f, p % 2 ? high_of(pairs[p / 2], T{}) : low_of(pairs[p / 2], T{}));
    } else {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        absmax[p] = fmaxf(fmaxf(fabsf(value(p, 0)), fabsf(value(p, 1))),
                          fmaxf(fabsf(value(p, 2)), fabsf(value(p, 3))));
        absmax[p] = fmaxf(0.0f, absmax[p]);
      }
      if (rows >= 2) {
        absmax[0] = absmax[1] = fmaxf(absmax[0], absmax[1]);
        absmax[2] = absmax[3] = fmaxf(absmax[2], absmax[3]);
      }
      if (rows >= 4) absmax[0] = absmax[1] = absmax[2] = absmax[3] = fmaxf(absmax[0], absmax[2]);
      for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (float& most : absmax) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
      }
    }
    if (rows > kPieces) {
      __shared__ float shares[kQuantizeThreads / 32];
      const int warps = rows / kPieces, first = threadIdx.x / 32 & ~(warps - 1);
      __syncthreads();  // the values of a call before have been read
      if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = absmax[0];
      __syncthreads();
      float most = 0.0f;
      for (int w = 0; w < warps; ++w) most = fmaxf(most, shares[first + w]);
#pragma unroll
      for (float& own : absmax) own = most;
    }
  }

  /// What the values of piece p are multiplied with; 0 where its block is all zeros or too small to be
  /// scaled.
  __device__ __forceinline__ float scale(int p) const {
    return absmax[p] >= kLeastAbsmax ? reciprocal(absmax[p]) : 0.0f;
  }

  /// Writes the absmax of the blocks that begin in this lane's pieces.
  __device__ __forceinline__ void store_absmax(float* to, int64_t n, int64_t block, int log_blocksize) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t at = begin(block, p);
      if (at < n && (at & ((int64_t{1} << log_blocksize) - 1)) == 0) to[at >> log_blocksize] = absmax[p];
    }
  }
};

}  // namespace halfbyte::cuda
