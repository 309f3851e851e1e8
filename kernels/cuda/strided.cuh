// Strided views as kernel parameters: where element i of each view lies.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

/// Quotients by one multiplication: of numbers below 2^63, and faster below 2^31.
struct Divisor {
  uint64_t factor;
  uint32_t narrow_factor, shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, narrow_factor) + n) >> shift;
  }
  __device__ __forceinline__ uint64_t quotient(uint64_t n) const {
    return (__umul64hi(n, factor) + n) >> shift;
  }
};

inline Divisor divisor_of(int64_t d) {
  if (d <= 1) return {1, 1, 0};
  const auto by = static_cast<uint64_t>(d);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < by) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - by;
  const uint64_t factor = static_cast<uint64_t>((static_cast<unsigned __int128>(excess) << 64) / by) + 1;
  return {factor, shift < 32 ? static_cast<uint32_t>((excess << 32) / by) + 1 : 1, shift};
}

struct Strides {
  int64_t s[kMaxDims];
};
template <int N>
struct StridesOf {
  Strides s[N];
};
/// The innermost dimension first: a loop over the dimensions that is unrolled and left early keeps parameters
/// where they are, out of local memory.
struct Extent {
  int ndim;
  int64_t size;
  int64_t shape[kMaxDims];
  Divisor by[kMaxDims];
  bool narrow;  // size is below 2^31

  /// After a change of shape.
  void settle() {
    size = 1;
    for (int d = 0; d < ndim; ++d) {
      size *= shape[d];
      by[d] = divisor_of(shape[d]);
    }
    narrow = size <= INT32_MAX;
  }
};

/// The shape and strides of the views, with neighbouring dimensions joined where all views allow it.
template <int N>
Extent join_dims(const View (&views)[N], Strides (&strides)[N]) {
  Extent e{};
  for (int d = views[0].ndim - 1; d >= 0; --d) {
    const int64_t length = views[0].shape[d];
    if (length == 1) continue;
    bool joins = e.ndim > 0;
    for (int i = 0; i < N && joins; ++i)
      joins = views[i].strides[d] == strides[i].s[e.ndim - 1] * e.shape[e.ndim - 1];
    if (joins) {
      e.shape[e.ndim - 1] *= length;
    } else {
      e.shape[e.ndim] = length;
      for (int i = 0; i < N; ++i) strides[i].s[e.ndim] = views[i].strides[d];
      ++e.ndim;
    }
  }
  if (e.ndim == 0) {
    e.ndim = 1;
    e.shape[0] = 1;
    for (int i = 0; i < N; ++i) strides[i].s[0] = 1;
  }
  e.settle();
  return e;
}

/// Takes `count` elements of the innermost dimension as one, where every view has them side by side and
/// aligned to their size in bytes, or one for all (stride 0). Offsets stay in elements.
template <int N>
bool group_elements(Extent* e, Strides (&strides)[N], const View (&views)[N], int count) {
  if (e->shape[0] % count != 0) return false;
  for (int i = 0; i < N; ++i) {
    if (strides[i].s[0] == 0) continue;
    if (strides[i].s[0] != 1 || !is_aligned(views[i].data, size_of(views[i].dtype) * count)) return false;
    for (int d = 1; d < e->ndim; ++d) {
      if (strides[i].s[d] % count != 0) return false;
    }
  }
  e->shape[0] /= count;
  for (int i = 0; i < N; ++i) strides[i].s[0] *= count;
  e->settle();
  return true;
}

/// Where element `index` of the extent lies in each view.
template <typename Index, int N>
__device__ __forceinline__ void take_apart(Index index, const Extent& e, const Strides (&strides)[N],
                                           int64_t (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d) {
    const bool outermost = d + 1 >= e.ndim;
    const Index next = outermost ? 0 : e.by[d].quotient(index);
    const int64_t at = index - next * static_cast<Index>(e.shape[d]);
    index = next;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] += at * strides[i].s[d];
    if (outermost) break;
  }
}
template <int N>
__device__ __forceinline__ void offsets(int64_t index, const Extent& e, const Strides (&strides)[N],
                                        int64_t (&out)[N]) {
  if (e.narrow)
    take_apart(static_cast<uint32_t>(index), e, strides, out);
  else
    take_apart(static_cast<uint64_t>(index), e, strides, out);
}

/// A thread of a strided kernel takes kInFlight elements (or groups of them), all loaded before one is
/// stored.
constexpr int kStridedThreads = 256, kInFlight = 4;
inline unsigned strided_blocks(const Extent& e) {
  return blocks_for(e.size, kStridedThreads * kInFlight, INT32_MAX);
}
/// Element number `i` of the kInFlight of this thread.
__device__ __forceinline__ int64_t strided_index(int i) {
  return blockIdx.x * static_cast<int64_t>(kStridedThreads * kInFlight) + i * kStridedThreads + threadIdx.x;
}

}  // namespace halfbyte::cuda
