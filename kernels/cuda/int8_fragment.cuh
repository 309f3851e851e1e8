// Outlier columns of a row tile of the weight as int8_gemv.cu multiplies them: picked from the codes that a
// lane has in its registers, by mma m16n8k16.
#pragma once

#include "int8_outliers.cuh"
#include "mma.cuh"

namespace halfbyte::cuda {

/// Bytes of a fragment: which bytes a lane takes, and x of up to 16 columns.
__host__ __device__ constexpr int fragment_bytes(int m, int pieces) { return 32 + 32 * m * pieces; }

/// Up to 16 outlier columns of a unit as mma m16n8k16 multiplies them: lane (g, t) takes up to four of its 16
/// bytes of rows g and g + 8, and what the codes leave of rows g (and g + 8) of x there.
template <typename T, int kGroups>
struct Fragment {
  using Half = typename OutlierType<T>::type;
  static constexpr int kPieces = OutlierType<T>::kPieces;
  static constexpr uint32_t kMore = 1 << 16;  // in `select`: another one of this unit follows
  uint32_t select, upper;                     // bytes among the lower and the upper 8; those of the upper
  uint2 x[kPieces][kGroups];

  /// The four bytes.
  __device__ __forceinline__ uint32_t pick(const uint4& v) const {
    const uint32_t low = __byte_perm(v.x, v.y, select), high = __byte_perm(v.z, v.w, select);
    return (low & ~upper) | (high & upper);
  }
  /// Codes 2 i and 2 i + 1 of four, exact.
  static __device__ __forceinline__ uint32_t pair(uint32_t codes, int i) {
    const uint32_t at = i ? 0x4342 : 0x4140;
    if constexpr (std::is_same_v<Half, half_t>) {  // 1024 + 128 + code
      const uint32_t word = __byte_perm(codes ^ 0x80808080u, 0x64646464u, at), base = 0x64806480u;
      const __half2 pair =
          __hsub2(*reinterpret_cast<const __half2*>(&word), *reinterpret_cast<const __half2*>(&base));
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {  // 128 + its lower 7 bits, and 128, or 256 where it is negative
      const uint32_t word = __byte_perm(codes & 0x7f7f7f7fu, 0x43434343u, at),
                     base = __byte_perm(codes & 0x80808080u, 0x43434343u, at);
      const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&word),
                                          *reinterpret_cast<const __nv_bfloat162*>(&base));
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  __device__ __forceinline__ void add(float (&sums)[kGroups][4], const uint4& low, const uint4& high) const {
    const uint32_t first = pick(low), second = pick(high);
    const uint32_t a[4] = {pair(first, 0), pair(second, 0), pair(first, 1), pair(second, 1)};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float more[4];
        multiply_first(more, a, x[piece][group].x, x[piece][group].y, Half{});
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[group][e] += more[e];
      }
    }
  }
};

}  // namespace halfbyte::cuda
