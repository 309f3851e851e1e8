// Outlier columns of an LLM.int8() layer on their way from marks to the tensor cores of sm_90a: which they
// are, and what they hold of x.
#pragma once

#include "int8_rows.cuh"

namespace halfbyte::cuda {

/// The 16-bit type of an outlier column. An fp32 column is three of bf16 (high, middle, low), which together
/// have all of its bits, beside three copies of the weight's.
template <typename T>
struct OutlierType {
  using type = T;
  static constexpr int kPieces = 1;
};
template <>
struct OutlierType<int32_t> {
  using type = half_t;
  static constexpr int kPieces = 1;
};
template <>
struct OutlierType<float> {
  using type = bf16_t;
  static constexpr int kPieces = 3;
};
/// Piece `piece` of x: all of it, or a part of what the pieces before have left.
template <typename T>
__device__ __forceinline__ typename OutlierType<T>::type piece_of(T x, int piece) {
  if constexpr (std::is_same_v<T, float>) {
    bf16_t part = __float2bfloat16_rz(x);  // not to the nearest, which may be an infinity
    for (int i = 0; i < piece; ++i) {
      x = isinf(x) ? 0.0f : x - to_float(part);
      part = __float2bfloat16_rz(x);
    }
    return part;
  } else {
    return x;
  }
}

constexpr int kRoundSlots = 64;  // of 16 bits that are multiplied at a time, 128 bytes of a row
template <typename T>
constexpr int kRoundColumns = kRoundSlots / OutlierType<T>::kPieces;

/// Slots of a round that are multiplied, those beyond its columns with zeros.
__host__ __device__ constexpr int filled_slots(int slots) {
  return slots == 0 ? 0 : slots <= 16 ? 16 : kRoundSlots;
}

/// By one warp: of the marked columns from `begin` to `end`, multiples of 128, those behind the first `skip`,
/// up to `most` of them. Returns how many there are, whatever skip and most.
__device__ __forceinline__ int list_columns(const ColumnMarks* marks, int begin, int end, int skip, int most,
                                            int* columns) {
  constexpr int kTogether = 2, kEach = 128;  // loads of a set under way; columns of one
  const int lane = threadIdx.x % 32;
  uint32_t second = 0;  // known when both sets are there; of lane 0, or all would wait for it first
  if (lane == 0) second = marks->marked;
  int count = 0;
#pragma unroll 1
  for (int base = begin / kEach + lane; base - lane < end / kEach; base += kTogether * 32) {
    uint4 bits[2][kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = base + i * 32;
#pragma unroll
      for (int set = 0; set < 2; ++set)
        bits[set][i] =
            at < end / kEach ? reinterpret_cast<const uint4*>(marks->bits[set])[at] : make_uint4(0, 0, 0, 0);
    }
    second = __shfl_sync(0xffffffffu, second, 0);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const uint4 of = second ? bits[1][i] : bits[0][i];
      const uint32_t words[4] = {of.x, of.y, of.z, of.w};
      const int own = __popc(words[0]) + __popc(words[1]) + __popc(words[2]) + __popc(words[3]);
      if (!__any_sync(0xffffffffu, own != 0)) continue;
      int through = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += left;
      }
      int at = count - skip + through - own;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        for (uint32_t word = words[w]; word; word &= word - 1, ++at) {
          if (at >= 0 && at < most)
            columns[at] = (base + i * 32) * kEach + w * 32 + __ffs(static_cast<int>(word)) - 1;
        }
      }
      count += __shfl_sync(0xffffffffu, through, 31);
    }
  }
  __syncwarp();
  return count;
}

/// What the codes leave of an element of x in an outlier column, to be multiplied in 16 bits: all of it where
/// it is an outlier itself and has code 0.
template <typename T>
struct Rest {
  RowScale scale;
  float step, threshold;

  __device__ __forceinline__ Rest(float absmax, float threshold)
      : scale(absmax), step(absmax * kInt8Scale), threshold(threshold) {}
  __device__ __forceinline__ float of(T x) const {
    const float value = to_float(x);
    if (fabsf(value) >= threshold) return value;
    const float code = rintf(value * scale.lift * scale.scale);
    return fmaf(code == code ? -code : 0.0f, step, value);
  }
};

/// Eight slots of a row from the slot `first` of a round on, of the round's `here` columns (more than none).
template <typename T>
struct EightSlots {
  using Half = typename OutlierType<T>::type;
  static constexpr int kPieces = OutlierType<T>::kPieces;
  T in[8];

  __device__ __forceinline__ void fetch(const T* row, const int* columns, int here, int first) {
#pragma unroll
    for (int j = 0; j < 8; ++j) in[j] = row[columns[min((first + j) / kPieces, here - 1)]];
  }
  __device__ __forceinline__ Vec<Half, 8> rest(const Rest<T>& rest, int here, int first) const {
    Vec<Half, 8> out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = rest.of(in[j]);
      if constexpr (kPieces > 1)
        out.v[j] = piece_of(value, (first + j) % kPieces);
      else
        out.v[j] = from_float<Half>(value);
      if (first + j >= here * kPieces) out.v[j] = from_float<Half>(0.0f);
    }
    return out;
  }
};

}  // namespace halfbyte::cuda
