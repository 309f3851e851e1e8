// How LLM.int8() quantises a row, and the kernel that does it to all rows of x. int8_rows.cu
#pragma once

#include "launch.cuh"

namespace halfbyte::cuda {

/// codes = rint(x * lift * scale). 127 / absmax overflows for the smallest numbers: there both sides are
/// scaled up, elsewhere by one. bitsandbytes' rounding: 127 times the approximate reciprocal.
struct RowScale {
  float lift, scale;
  uint32_t mask;  // 0 where all codes are: rows of zeros, and with an infinity

  __device__ __forceinline__ explicit RowScale(float absmax) {
    lift = absmax < 1e-35f ? 1.2676506e30f : 1.0f;
    scale = 127.0f * reciprocal(absmax * lift);
    mask = absmax > 0.0f && absmax < INFINITY ? 0xffffffffu : 0u;
  }
};

/// Two 16-bit numbers in a word.
template <typename T>
struct PairOf;
template <>
struct PairOf<half_t> {
  using type = __half2;
};
template <>
struct PairOf<bf16_t> {
  using type = __nv_bfloat162;
};

/// The threshold as elements are compared with it: x >= it is the same as x >= the next T from there up.
template <typename T>
struct Threshold {
  uint32_t word;

  __device__ __forceinline__ explicit Threshold(float x) {
    uint32_t low;
    if constexpr (sizeof(T) == 4)
      low = __float_as_uint(x);
    else if constexpr (std::is_same_v<T, half_t>)
      low = __half_as_ushort(__float2half_ru(x));
    else
      low = __bfloat16_as_ushort(__float2bfloat16_ru(x));
    word = sizeof(T) == 4 ? low : low | low << 16;
  }
};

/// N elements of a row as they are in memory. NaN counts neither for the most nor as an outlier.
template <typename T, int N>
struct Piece {
  static constexpr bool kPairs = sizeof(T) == 2 && N > 1;
  static constexpr int kWords = N * sizeof(T) < 4 ? 1 : N * sizeof(T) / 4;
  uint32_t words[kWords];

  static __device__ __forceinline__ Piece zero() { return filled(0); }
  static __device__ __forceinline__ Piece filled(uint32_t word) {
    Piece p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) p.words[i] = word;
    return p;
  }
  static __device__ __forceinline__ Piece load(const T* from) {
    Piece p;
    if constexpr (N == 1 && sizeof(T) == 2)
      p.words[0] = *reinterpret_cast<const uint16_t*>(from);
    else
      *reinterpret_cast<Vec<uint32_t, kWords>*>(p.words) =
          *reinterpret_cast<const Vec<uint32_t, kWords>*>(from);
    return p;
  }
  __device__ __forceinline__ float value(int j) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[j]);
    } else {
      const auto pair = as_pair(words[j / 2]);
      return j % 2 ? __high2float(pair) : __low2float(pair);
    }
  }
  /// The same numbers in float16.
  __device__ __forceinline__ Piece<half_t, N> halves() const {
    auto to = Piece<half_t, N>::zero();
#pragma unroll
    for (int j = 0; j < N; ++j)
      to.words[j / 2] |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(value(j)))) << (j % 2 * 16);
    return to;
  }
  /// The largest of |x|, or NaN, as bits: of both halves of a word where there are two numbers in it.
  __device__ __forceinline__ uint32_t top() const {
    uint32_t all = kPairs ? 0 : magnitude(0);
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) all = larger(all, words[i]);
    } else {
#pragma unroll
      for (int i = 1; i < N; ++i) all = larger(all, magnitude(i));
    }
    return all;
  }
  /// Of a top and words, or another top.
  static __device__ __forceinline__ uint32_t larger(uint32_t top, uint32_t other) {
    if constexpr (kPairs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
      const auto both = __hmax2_nan(as_pair(top), __habs2(as_pair(other)));
      return *reinterpret_cast<const uint32_t*>(&both);
#else
      return __vmaxu2(top, other & 0x7fff7fffu);  // numbers above zero are ordered as their bits, NaN last
#endif
    } else {
      return max(top, other);
    }
  }
  static __device__ __forceinline__ bool reaches(uint32_t top, Threshold<T> threshold) {
    if constexpr (kPairs)
      return __hge2_mask(as_pair(top), as_pair(threshold.word)) != 0;
    else
      return number(top) >= number(threshold.word & kNumber);
  }
  static __device__ __forceinline__ float value_of(uint32_t top) {
    return number(kPairs ? max(top & 0xffff, top >> 16) : top);
  }
  /// Elements of at least the threshold, where there is one, become 0, and so does NaN; returns one bit for
  /// each of the former.
  template <bool kThreshold>
  __device__ __forceinline__ unsigned clean(Threshold<T> threshold) {
    unsigned bits = 0;
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const auto pair = as_pair(words[i]), size = __habs2(pair), most = as_pair(threshold.word);
        if (kThreshold) {  // bits of a word to 2 i and 2 i + 1 beyond 16 times its half
          bits |= __hge2_mask(size, most) & (0x20001u << (2 * i));
          words[i] &= __hlt2_mask(size, most);
        } else {
          words[i] &= __heq2_mask(pair, pair);
        }
      }
      bits = (bits | bits >> 16) & 255;
    } else {
      const float least = number(threshold.word & kNumber);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float size = fabsf(value(j));
        if (kThreshold ? size < least : size == size) continue;
        if (kThreshold && size >= least) bits |= 1u << j;
        words[j] = 0;
      }
    }
    return bits;
  }
  /// Four codes a word, the first in the lowest byte; no element may be NaN or beyond absmax. A sum with 1.5
  /// * 2^23 has the rounded number in its lower bits, which takes less time than to convert it.
  __device__ __forceinline__ void encode(const RowScale& by, uint32_t (&codes)[(N + 3) / 4]) const {
    float v[N];
    uint32_t c[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = value(j);
    if (!std::is_same_v<T, half_t> && by.lift != 1.0f) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= by.lift;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) c[j] = __float_as_uint(__fadd_rn(__fmul_rn(v[j], by.scale), 12582912.0f));
    if constexpr (N == 1) {
      codes[0] = c[0] & by.mask;
    } else {
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        const uint32_t low = __byte_perm(c[j], c[j + 1], 0x0040),
                       high = __byte_perm(c[j + 2], c[j + 3], 0x0040);
        codes[j / 4] = __byte_perm(low, high, 0x5410) & by.mask;
      }
    }
  }
  /// What was computed from them is computed again behind this, which takes fewer registers than to keep it.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words[i]));
  }

 private:
  static constexpr uint32_t kNumber = sizeof(T) == 4 ? 0xffffffffu : 0xffffu;  // of one of a word's

  static __device__ __forceinline__ auto as_pair(uint32_t word) {
    return *reinterpret_cast<const typename PairOf<T>::type*>(&word);
  }
  static __device__ __forceinline__ float number(uint32_t bits) { return Piece<T, 1>{{bits}}.value(0); }
  __device__ __forceinline__ uint32_t magnitude(int j) const { return words[j] & (kNumber >> 1); }
};

__device__ __forceinline__ float most_of_warp(float x) {  // x >= 0
#if __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
  return warp_max(x);
#endif
}

/// The largest |x| below the threshold, where there is one, of `count` pieces, in which outliers and NaN
/// become 0: then `cleaned`. mark(i, bits) is told which elements of piece i are outliers.
template <bool kThreshold, typename T, int N, int kKept, typename Mark>
__device__ __forceinline__ float look_at(Piece<T, N> (&pieces)[kKept], int count, Threshold<T> threshold,
                                         bool* cleaned, const Mark& mark) {
  using Part = Piece<T, N>;
  uint32_t top = 0;
  unsigned unclean = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i >= count) continue;
    const uint32_t here = pieces[i].top();
    if (kThreshold && Part::reaches(here, threshold))
      unclean |= 1u << i;
    else
      top = Part::larger(top, here);
  }
  float most = Part::value_of(top);
  if (most != most) unclean = ~0u, top = 0;
  if (unclean == 0) return most;
  *cleaned = true;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i >= count || !(unclean >> i & 1)) continue;
    const unsigned outliers = pieces[i].template clean<kThreshold>(threshold);
    if (kThreshold && outliers) mark(i, outliers);
    top = Part::larger(top, pieces[i].top());
  }
  return Part::value_of(top);
}

/// Marks of outlier columns on their way from the launch that quantises to the one that reads them, of one
/// stream. There are two sets: while one is read the other one is cleared, so that nobody has to wait until
/// all have read.
struct alignas(16) ColumnMarks {
  static constexpr int64_t kMostColumns = int64_t{1} << 20;
  uint32_t bits[2][kMostColumns / 32];
  uint32_t next;      // set to be marked
  uint32_t marked;    // set that was marked last
  uint32_t words[2];  // of a set that may have marks: as many as the longest row so far had

  /// By `threads` threads of the launch that reads.
  __device__ __forceinline__ void clear_other(int thread, int threads) {
    const uint32_t other = marked ^ 1;
    for (uint32_t w = thread; w < words[other]; w += threads) bits[other][w] = 0;
    if (thread == 0) next = other;
  }
};

/// When rows are marked, but the launch that reads the marks has failed: else the next rows had them, too.
inline void forget_marks(const Launch& on, ColumnMarks* marks) {
  cudaMemsetAsync(marks, 0, sizeof(ColumnMarks), on.stream);
}

/// x float [rows, cols] to codes int8 [rows, cols] and absmax float32 [rows].
struct Int8Rows {
  const void* x;
  DType dtype;
  int64_t rows, cols;
  bool fp16_input;  // x is rounded to float16 first
  int8_t* codes;
  float* absmax;
  float threshold;     // with one: elements with |x| >= threshold do not count for absmax, their columns get
                       // code 0 in all rows,
  ColumnMarks* marks;  // of this stream; up to kMostColumns columns
  int32_t* list;       // [0] = number of such columns, [1 ...] = their indices, ascending; may be null
  uint8_t* mask;       // [cols], 1 for such columns; may be null
  uint32_t* zero;      // becomes 0, for who comes next; may be null
};

/// One launch; with a threshold a second one, which lists outlier columns and sets their codes to 0. Without
/// list and mask there is no second one: the marks stay, and what is no outlier in such a column keeps its
/// code.
cudaError_t int8_rows(const Launch& on, const Int8Rows& rows);

}  // namespace halfbyte::cuda
