// A packed ragged batch as kernel parameters: which sequence a token belongs to, and its position. Layout:
// backend.h.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

struct Ragged {
  const int32_t* query_starts;
  const int32_t* lengths;
  const int32_t* block_table;
  int sequences;
  int max_blocks;

  struct Place {
    int sequence;
    int position;
  };

  /// Sequence and position of a query token; sequence -1 for a token behind the last start.
  __device__ __forceinline__ Place locate(int64_t token) const {
    int low = 0, high = sequences;  // the last sequence whose start is <= token
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (query_starts[middle] <= token)
        low = middle;
      else
        high = middle;
    }
    if (sequences == 0 || token >= query_starts[sequences]) return {-1, -1};
    return {low, lengths[low] - (query_starts[low + 1] - static_cast<int>(token))};
  }

  /// Row of the caches (block * block_len + offset) that holds a position, or -1.
  __device__ __forceinline__ int64_t slot(int sequence, int position, int block_len, int64_t blocks) const {
    const int at = position / block_len;
    if (position < 0 || at >= max_blocks) return -1;
    const int64_t block = block_table[static_cast<int64_t>(sequence) * max_blocks + at];
    return block < 0 || block >= blocks ? -1 : block * block_len + position % block_len;
  }
};

inline Ragged ragged_of(const RaggedBatch& b) {
  return {b.query_starts.as<const int32_t>(), b.lengths.as<const int32_t>(),
          b.block_table.as<const int32_t>(), static_cast<int>(b.lengths.size()),
          static_cast<int>(b.block_table.cols())};
}

}  // namespace halfbyte::cuda
