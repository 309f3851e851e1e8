// A packed ragged batch as the CPU kernels read it (layout: backend.h). Lengths, starts and block numbers are
// data: whatever they hold, nothing here leads outside an operand. Starts that step back count as the highest
// so far, starts beyond T as T; a position without a valid block has no slot.
#pragma once

#include "common.h"
#include "strided.h"

namespace halfbyte::cpu {

struct Ragged {
  const int32_t* query_starts;
  const int32_t* lengths;
  const int32_t* block_table;
  int64_t sequences;
  int64_t max_blocks;

  explicit Ragged(const RaggedBatch& b)
      : query_starts(b.query_starts.as<const int32_t>()),
        lengths(b.lengths.as<const int32_t>()),
        block_table(b.block_table.as<const int32_t>()),
        sequences(b.lengths.size()),
        max_blocks(b.block_table.cols()) {}

  /// body(sequence, first token, last token + 1, position of the first token) for each sequence in order.
  template <typename Body>
  void each(int64_t tokens, const Body& body) const {
    int64_t begin = clamp(get(query_starts), 0, tokens);
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t stated_end = get(query_starts + s + 1);
      const int64_t end = clamp(stated_end, begin, tokens);
      body(s, begin, end, get(lengths + s) - (stated_end - begin));
      begin = end;
    }
  }

  /// Row of the caches (block * block_len + offset) that holds a position, or -1.
  int64_t slot(int64_t sequence, int64_t position, int64_t block_len, int64_t blocks) const {
    if (position < 0 || position >= max_blocks * block_len) return -1;
    const int64_t block = get(block_table + sequence * max_blocks + position / block_len);
    return block < 0 || block >= blocks ? -1 : block * block_len + position % block_len;
  }

  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
};

/// [tokens, heads, dim] whose tokens may lie further apart than their size.
inline bool is_token_rows(const View& v) {
  if (v.ndim != 3) return false;
  if (v.size() == 0) return true;
  return (v.shape[2] == 1 || v.strides[2] == 1) && (v.shape[1] == 1 || v.strides[1] == v.shape[2]);
}

}  // namespace halfbyte::cpu
