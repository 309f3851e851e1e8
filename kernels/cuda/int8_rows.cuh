// How LLM.int8() quantises a row, and the kernel that does it to all rows of x. int8_rows.cu
#pragma once

#include "launch.cuh"

namespace halfbyte::cuda {

/// codes = rint(x * lift * scale). 127 / absmax overflows for the smallest numbers: there both sides are
/// scaled up, elsewhere by one. bitsandbytes' rounding: 127 times the approximate reciprocal.
struct RowScale {
  float lift, scale;

  __device__ __forceinline__ explicit RowScale(float absmax) {
    lift = absmax < 1e-35f ? 1.2676506e30f : 1.0f;
    scale = 127.0f * reciprocal(absmax * lift);
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

  static __device__ __forceinline__ Piece zero() {
    Piece p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) p.words[i] = 0;
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
  __device__ __forceinline__ float most() const {
    if constexpr (kPairs) {
      auto all = __habs2(as_pair(words[0]));
#pragma unroll
      for (int i = 1; i < kWords; ++i) all = __hmax2(all, __habs2(as_pair(words[i])));
      return fmaxf(fmaxf(__low2float(all), __high2float(all)), 0.0f);
    } else {
      float all = 0.0f;
#pragma unroll
      for (int j = 0; j < N; ++j) all = fmaxf(all, fabsf(value(j)));
      return all;
    }
  }
  /// Elements of at least the threshold become 0; returns one bit for each of them.
  __device__ __forceinline__ unsigned take_outliers(Threshold<T> threshold) {
    unsigned bits = 0;
    if constexpr (kPairs) {
      uint32_t mask[kWords], any = 0;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        mask[i] = __hge2_mask(__habs2(as_pair(words[i])), as_pair(threshold.word));
        words[i] &= ~mask[i];
        any |= mask[i];
      }
      if (any) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) bits |= ((mask[i] & 1) | (mask[i] >> 30 & 2)) << (2 * i);
      }
    } else {
      const float least = Piece<T, N>{{threshold.word}}.value(0);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (fabsf(value(j)) < least || !(fabsf(value(j)) >= least)) continue;
        words[j] = 0;
        bits |= 1u << j;
      }
    }
    return bits;
  }
  /// Elements whose bit is set become 0.
  __device__ __forceinline__ void clear(unsigned bits) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!(bits >> j & 1)) continue;
      if constexpr (sizeof(T) == 4)
        words[j] = 0;
      else
        words[j / 2] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
  /// Four codes a word, the first in the lowest byte. A NaN (an element, or 0 * inf in a row of zeros or with
  /// an infinity) becomes 0; no number goes beyond 127.
  __device__ __forceinline__ void encode(const RowScale& by, uint32_t (&codes)[(N + 3) / 4]) const {
    float v[N];
    int c[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = value(j);
    if (!std::is_same_v<T, half_t> && by.lift != 1.0f) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= by.lift;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) c[j] = __float2int_rn(v[j] * by.scale);
    if constexpr (N == 1) {
      codes[0] = static_cast<uint32_t>(c[0]);
    } else {
#pragma unroll
      for (int j = 0; j < N; j += 4) codes[j / 4] = pack(c[j], c[j + 1], c[j + 2], c[j + 3]);
    }
  }
  /// What was computed from them is computed again behind this, which takes fewer registers than to keep it.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words[i]));
  }

 private:
  static __device__ __forceinline__ auto as_pair(uint32_t word) {
    return *reinterpret_cast<const typename PairOf<T>::type*>(&word);
  }
  static __device__ __forceinline__ uint32_t pack(int a, int b, int c, int d) {
    uint32_t high, word;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(d), "r"(c), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(b), "r"(a), "r"(high));
    return word;
  }
};

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
