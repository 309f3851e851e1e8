// The parts of LLM.int8() that int8_rows.cc, int8_matmul.cc and linear8.cc share.
#pragma once

#include <cstdint>

#include "../backend.h"

namespace halfbyte::cpu {

/// Row-wise quantisation of x float [rows, k] to codes [rows, k] (row stride `ld`) and row_absmax [rows].
/// With threshold > 0, elements of at least that magnitude do not count for absmax, mask[c] becomes 1 for
/// every column that holds one and 0 for the others, and such columns are 0 in codes. fp16_input rounds x to
/// float16 first.
void int8_quantize(const View& x, int64_t rows, int64_t k, float threshold, bool fp16_input, int8_t* codes,
                   int64_t ld, float* row_absmax, uint8_t* mask);

/// Rows of b that a block of sums covers at most, and rows of a.
constexpr int64_t kInt8PanelRows = 16;
constexpr int64_t kInt8BlockRows = 64;

/// sums[(i - m0) * kInt8PanelRows + (j - n0)] = a[i, :] . b[j, :] for i in m0 .. m1-1, j in n0 .. n1-1.
struct Int8Block {
  const int32_t* sums;
  int64_t m0, m1, n0, n1;
};

/// The exact product of a [m, k] (row stride lda) with b [n, k] transposed, handed out block by block on the
/// thread that made it, so that what follows works on data in the first-level cache.
struct Int8Product {
  const int8_t* a;
  int64_t m, lda;
  const int8_t* b;
  int64_t n, k;
  void (*sink)(const void* context, const Int8Block& block);
  const void* context;
};
void int8_product(const Int8Product& product);

}  // namespace halfbyte::cpu
