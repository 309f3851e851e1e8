// Row-wise int8: x float [M, K] to codes int8 [M, K] and max |x| per row, and back.
//
// A row is read twice, once for its absmax and once to write the codes; at any model's K the second read
// comes from the first-level cache. Rows are spread over the pool. Outlier columns (threshold > 0) are known
// only when every row was seen, so their codes are cleared in a second, much cheaper pass over the codes.
#include "int8.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "common.h"
#include "cpu_backend.h"
#include "int8_reciprocal.h"
#include "pool.h"

#define HALFBYTE_FILE "int8_rows.cc"
#include "per_isa.h"
#ifdef HALFBYTE_ISA
#include "simd.h"
#include "int8_simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

template <typename T>
static inline F load_as(const T* p, int64_t n, bool fp16) {
  const F v = n >= W ? load(p) : load_n(p, n);
  return fp16 ? rounded<F16>(v) : v;
}

/// Returns whether the row holds an outlier. Several threads may set one byte of the mask.
template <typename T>
static bool quantize_row(int8_t* codes, float* absmax, uint8_t* mask, const T* x, int64_t k, float threshold,
                         bool fp16) {
  const F limit = set1(threshold > 0.0f ? threshold : __builtin_inff());
  F most = zero();
  for (int64_t i = 0; i < k; i += W) {
    const F v = load_as(x + i, k - i, fp16);
    most = max(abs(threshold > 0.0f ? keep_below(v, limit) : v), most);  // a NaN leaves `most` as it is
  }
  const float row_max = reduce_max(most);
  *absmax = row_max;
  // 127 / absmax overflows for the smallest numbers: there both sides are scaled up, elsewhere by one
  const float up = row_max < 1e-35f ? 1.2676506e30f : 1.0f;
  const F lift = set1(up), scale = set1(row_max > 0.0f ? int8_factor(row_max * up) : 0.0f);
  bool found = false;
  for (int64_t i = 0; i < k; i += W) {
    const int64_t n = k - i < W ? k - i : W;
    const F v = load_as(x + i, n, fp16);
    const F q = mul(mul(keep_below(v, limit), lift), scale);
    if (n == W) {
      store_bytes(codes + i, q);
    } else {
      int8_t last[W];
      store_bytes(last, q);
      __builtin_memcpy(codes + i, last, static_cast<size_t>(n));
    }
    if (!mask) continue;
    for (uint32_t bits = bits_from(v, limit); bits; bits &= bits - 1) {
      __atomic_store_n(mask + i + __builtin_ctz(bits), uint8_t{1}, __ATOMIC_RELAXED);
      found = true;
    }
  }
  return found;
}

/// Rows begin .. end-1 of x; returns whether any holds an outlier.
static bool quantize_rows(const View& x, int64_t begin, int64_t end, int64_t k, float threshold, bool fp16,
                          int8_t* codes, int64_t ld, float* absmax, uint8_t* mask) {
  bool found = false;
  for (int64_t r = begin; r < end; ++r) {
    int8_t* const out = codes + r * ld;
    switch (x.dtype) {
      case DType::f16:
        found |= quantize_row(out, absmax + r, mask, x.as<const F16>() + r * k, k, threshold, false);
        break;
      case DType::bf16:
        found |= quantize_row(out, absmax + r, mask, x.as<const BF16>() + r * k, k, threshold, fp16);
        break;
      default:
        found |= quantize_row(out, absmax + r, mask, x.as<const float>() + r * k, k, threshold, fp16);
    }
  }
  return found;
}

template <typename T>
static void dequantize_row(T* y, const int8_t* codes, float absmax, int64_t k) {
  const F stat = set1(absmax), scale = set1(kInt8Scale);
  int64_t i = 0;
  for (; i + W <= k; i += W) store(y + i, mul(mul(load_bytes(codes + i), stat), scale));
  if (i < k) {
    int8_t last[W] = {};
    __builtin_memcpy(last, codes + i, static_cast<size_t>(k - i));
    store_n(y + i, mul(mul(load_bytes(last), stat), scale), k - i);
  }
}

static void dequantize_rows(const View& y, int64_t begin, int64_t end, int64_t k, const int8_t* codes,
                            const float* absmax) {
  for (int64_t r = begin; r < end; ++r) {
    switch (y.dtype) {
      case DType::f16:
        dequantize_row(y.as<F16>() + r * k, codes + r * k, absmax[r], k);
        break;
      case DType::bf16:
        dequantize_row(y.as<BF16>() + r * k, codes + r * k, absmax[r], k);
        break;
      default:
        dequantize_row(y.as<float>() + r * k, codes + r * k, absmax[r], k);
    }
  }
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
#else

namespace halfbyte::cpu {
namespace {

/// Rows that make a piece of work worth a second thread, some 20 us.
int64_t row_grain(int64_t k) { return 1 + 100'000 / (k + 1); }

}  // namespace

void int8_quantize(const View& x, int64_t rows, int64_t k, float threshold, bool fp16_input, int8_t* codes,
                   int64_t ld, float* row_absmax, uint8_t* mask) {
  if (mask) std::memset(mask, 0, static_cast<size_t>(k));
  if (!(threshold > 0.0f)) mask = nullptr;
  const auto quantize = HALFBYTE_PICK(quantize_rows);
  bool outliers = false;
  parallel_for(rows, row_grain(k), [&](int64_t begin, int64_t end) {
    if (quantize(x, begin, end, k, threshold, fp16_input, codes, ld, row_absmax, mask)) {
      __atomic_store_n(&outliers, true, __ATOMIC_RELAXED);
    }
  });
  if (!outliers || rows == 1) return;  // the outliers of a single row are 0 already
  // outlier columns are few as a rule, and then listed; a mask over whole rows is for the other cases
  constexpr int64_t kFew = 128;
  int64_t few[kFew], count = 0;
  for (int64_t c = 0; c < k && count <= kFew; ++c) {
    if (!mask[c]) continue;
    if (count < kFew) few[count] = c;
    ++count;
  }
  parallel_for(rows, 8 * row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int8_t* const row = codes + r * ld;
      if (count <= kFew) {
        for (int64_t i = 0; i < count; ++i) row[few[i]] = 0;
      } else {
        for (int64_t c = 0; c < k; ++c) row[c] = static_cast<int8_t>(row[c] & (mask[c] - 1));
      }
    }
  });
}

Status CpuBackend::int8_quantize_rows(Queue, View codes, View row_absmax, View outlier_mask, View x,
                                      float threshold, bool fp16_input) {
  const char* const op = "int8_quantize_rows";
  const int64_t k = x.cols(), rows = x.rows();
  if (!is_float(x.dtype)) return refuse_dtype(op, "x must be float");
  if (codes.dtype != DType::i8 || row_absmax.dtype != DType::f32 ||
      (outlier_mask && outlier_mask.dtype != DType::u8)) {
    return refuse_dtype(op, "codes must be int8, row_absmax float32 and outlier_mask uint8");
  }
  if (codes.size() != x.size() || row_absmax.size() != rows) {
    return refuse(op, "codes and row_absmax do not fit x");
  }
  if (threshold > 0.0f && (!outlier_mask || outlier_mask.size() != k)) {
    return refuse(op, "a threshold needs an outlier_mask of " + std::to_string(k) + " columns");
  }
  int8_quantize(x, rows, k, threshold, fp16_input, codes.as<int8_t>(), k, row_absmax.as<float>(),
                outlier_mask ? outlier_mask.as<uint8_t>() : nullptr);
  return {};
}

Status CpuBackend::int8_dequantize_rows(Queue, View y, View codes, View scb) {
  const char* const op = "int8_dequantize_rows";
  const int64_t k = codes.cols(), rows = codes.rows();
  if (!is_float(y.dtype) || codes.dtype != DType::i8 || scb.dtype != DType::f32) {
    return refuse_dtype(op, "y must be float, codes int8 and scb float32");
  }
  if (y.size() != codes.size() || scb.size() != rows) return refuse(op, "y, codes and scb do not fit");
  const auto dequantize = HALFBYTE_PICK(dequantize_rows);
  parallel_for(rows, row_grain(k), [&](int64_t begin, int64_t end) {
    dequantize(y, begin, end, k, codes.as<const int8_t>(), scb.as<const float>());
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
