// Outlier columns of an LLM.int8() layer on their way to the tensor cores: which they are, of what is marked,
// and what the codes leave of x in them.
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

constexpr int kMarkedTogether = 128;  // columns whose marks a lane has

/// Marks of 32 times 128 columns, 128 a lane: from group `from` of them on, before group `end`.
__device__ __forceinline__ uint4 fetch_marks(const uint32_t* set, int from, int end) {
  const int at = from + threadIdx.x % 32;
  return at < end ? reinterpret_cast<const uint4*>(set)[at] : make_uint4(0, 0, 0, 0);
}
/// The first ones, on their way from memory: of both sets, as which of them was marked comes from there, too.
struct FirstMarks {
  uint4 sets[2];
  uint32_t second;

  __device__ __forceinline__ void fetch(const ColumnMarks* marks, int from, int end) {
#pragma unroll
    for (int set = 0; set < 2; ++set) sets[set] = fetch_marks(marks->bits[set], from, end);
    second = marks->marked;
  }
  __device__ __forceinline__ uint4 bits() const { return second ? sets[1] : sets[0]; }
};

/// What a warp knows of 32 groups of 128 columns, one a lane.
struct MarkedColumns {
  int own, before;  // columns of the group, and in front of it
  int all;          // in front of what is behind the 32 groups
  uint32_t groups;  // which have columns

  /// `bits`: of the groups from `group` on, with `in_front` columns before. Lists those behind the first
  /// `skip` columns, up to `most` of them.
  __device__ __forceinline__ void take(const uint4& bits, int in_front, int group, int skip, int most,
                                       int* columns) {
    const int lane = threadIdx.x % 32;
    uint64_t low = bits.x | static_cast<uint64_t>(bits.y) << 32;
    uint64_t high = bits.z | static_cast<uint64_t>(bits.w) << 32;
    own = __popcll(low) + __popcll(high);
    groups = __ballot_sync(0xffffffffu, own != 0);
    before = all = in_front;
    if (groups == 0) return;
    int through = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, through, step);
      if (lane >= step) through += left;
    }
    before += through - own;
    all += __shfl_sync(0xffffffffu, through, 31);
    int column = (group + lane) * kMarkedTogether;
#pragma unroll 1
    for (int at = before - skip; (low | high) != 0; ++at) {
      if (low == 0) low = high, high = 0, column += 64;
      if (at >= 0 && at < most) columns[at] = column + __ffsll(static_cast<long long>(low)) - 1;
      low &= low - 1;
    }
    __syncwarp();
  }
};

/// By one warp: of the marked columns from `begin` to `end`, multiples of 128, those behind the first `skip`,
/// up to `most` of them. `bits`: the first marks of `set`. Returns how many there are, whatever skip and most
/// are.
__device__ __forceinline__ int list_columns(const uint32_t* set, uint4 bits, int begin, int end, int skip,
                                            int most, int* columns) {
  MarkedColumns marked;
  marked.all = 0;
#pragma unroll 1
  for (int from = begin / kMarkedTogether; from < end / kMarkedTogether; from += 32) {
    const uint4 now = bits;
    if (from + 32 < end / kMarkedTogether) bits = fetch_marks(set, from + 32, end / kMarkedTogether);
    marked.take(now, marked.all, from, skip, most, columns);
  }
  __syncwarp();
  return marked.all;
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
