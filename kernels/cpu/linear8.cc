// The whole LLM.int8() layer (arXiv 2208.07339): y = x W^T + bias + residual for a weight of int8 rows.
//
// x is quantised by rows (int8_rows.cc) and multiplied exactly (int8_matmul.cc); each block of at most 64 x
// 16 sums is scaled and finished here while it is in the first-level cache, so that neither the int32 matrix
// nor a second pass over y exists. Columns of x that hold an outlier are gathered once as float [M, count]; a
// block adds their product with the dequantised columns of its 16 weight rows, which the integer product has
// just read.
//
// Workspace, for x [M, K], in this order: codes int8 [M, K rounded up to 64], row absmax float32 [M], and
// with a threshold the count int64 [1], column numbers int32 [K], the mask uint8 [K] and the gathered columns
// float32 [M, K], of which M x count are used. How many outlier columns there are is never known to the
// caller.
//
// bnb_exact: x is rounded to float16 before quantising, the scaled product (and its float16 bias) to float16,
// any other bias is added in float16, and outliers are added in y's dtype, with weight columns rounded to it.
#include "int8.h"

#include <cstring>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#ifndef HALFBYTE_ISA  // once, before the parts per instruction set
namespace halfbyte::cpu {

/// What finishing a block of sums needs.
struct Layer8 {
  View y, residual, bias;
  const int8_t* weight;
  int64_t n, k;
  const float* scb;
  const float* row_absmax;
  const int32_t* columns;  // outlier columns, `count` of them
  int64_t count;
  const float* outliers;  // [M, count]
  bool exact;
};

}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "linear8.cc"
#include "per_isa.h"
#ifdef HALFBYTE_ISA
#include "simd.h"
#include "int8_simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

constexpr int kVectors = static_cast<int>(kInt8PanelRows) / W;

/// p[0 .. n-1] of any float dtype as float; the rest of out is 0.
static void load_floats(float* out, const View& v, int64_t at, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
    F f;
    switch (v.dtype) {
      case DType::f16:
        f = load_n(v.as<const F16>() + at + i, left);
        break;
      case DType::bf16:
        f = load_n(v.as<const BF16>() + at + i, left);
        break;
      default:
        f = load_n(v.as<const float>() + at + i, left);
    }
    store(out + i, f);
  }
}

/// R rows of sums[r][0 .. 15] += x[r, 0 .. n-1] times columns [n][16]; short sums, added up, round less than
/// one long one.
template <int R>
static void add_columns(float* sums, const float* x, int64_t ldx, const float* columns, int64_t n) {
  F s[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) s[r][v] = zero();
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      const F w = load(columns + j * kInt8PanelRows + v * W);
      for (int r = 0; r < R; ++r) s[r][v] = fma(set1(x[r * ldx + j]), w, s[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* const out = sums + r * kInt8PanelRows + v * W;
      store(out, add(load(out), s[r][v]));
    }
  }
}

/// out[i - m0][j - n0] = the outlier columns of x row i times those of weight row j.
template <typename T>
static void outlier_sums(float* out, const Layer8& l, const Int8Block& b, const float* scb) {
  constexpr int64_t kChunk = 64;
  constexpr int kRows = HALFBYTE_ISA_LEVEL == 512 ? 8 : HALFBYTE_ISA_LEVEL == 2 ? 4 : 2;
  alignas(64) float w[kChunk * kInt8PanelRows];
  __builtin_memset(out, 0, static_cast<size_t>((b.m1 - b.m0) * kInt8PanelRows) * sizeof(float));
  const int64_t rows = b.n1 - b.n0;
  for (int64_t j0 = 0; j0 < l.count; j0 += kChunk) {
    const int64_t n = l.count - j0 < kChunk ? l.count - j0 : kChunk;
    // bytes first, all of them: a vector load right behind its byte stores would wait for them
    int8_t codes[kChunk * kInt8PanelRows] = {};
    for (int64_t c = 0; c < rows; ++c) {
      const int8_t* const row = l.weight + (b.n0 + c) * l.k;
      for (int64_t j = 0; j < n; ++j) codes[j * kInt8PanelRows + c] = row[l.columns[j0 + j]];
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j * kInt8PanelRows + v * W;
        const F value = mul(mul(load_bytes(codes + at), load(scb + v * W)), set1(kInt8Scale));
        store(w + at, l.exact ? rounded<T>(value) : value);
      }
    }
    const float* x = l.outliers + b.m0 * l.count + j0;
    float* sums = out;
    int64_t left = b.m1 - b.m0;
    for (; left >= kRows; left -= kRows, x += kRows * l.count, sums += kRows * kInt8PanelRows) {
      add_columns<kRows>(sums, x, l.count, w, n);
    }
    for (; left > 0; --left, x += l.count, sums += kInt8PanelRows) add_columns<1>(sums, x, l.count, w, n);
  }
}

template <typename T>
static void finish(const Layer8& l, const Int8Block& b) {
  alignas(64) float scb[kInt8PanelRows] = {}, bias[kInt8PanelRows] = {};
  alignas(64) float extra[kInt8BlockRows * kInt8PanelRows];
  const int64_t cols = b.n1 - b.n0;
  __builtin_memcpy(scb, l.scb + b.n0, static_cast<size_t>(cols) * sizeof(float));
  if (l.bias) load_floats(bias, l.bias, b.n0, cols);
  if (l.count) outlier_sums<T>(extra, l, b, scb);
  const bool late = l.exact && l.bias && l.bias.dtype != DType::f16;
  for (int64_t i = b.m0; i < b.m1; ++i) {
    const F stat = set1(l.row_absmax[i]);
    for (int v = 0; v < kVectors && v * W < cols; ++v) {
      const int64_t at = i * l.n + b.n0 + v * W, left = cols - v * W < W ? cols - v * W : W;
      const int64_t in_block = (i - b.m0) * kInt8PanelRows + v * W;
      const F add_on = load(bias + v * W);
      const F product = mul(mul(load_ints(b.sums + in_block), stat), load(scb + v * W));
      F out = fma(product, set1(kInt8ProductScale), late ? zero() : add_on);
      if (l.exact) {
        out = rounded<F16>(out);
        if (late) out = rounded<F16>(add(out, add_on));
        out = rounded<T>(out);
      }
      if (l.count) out = add(out, load(extra + in_block));
      if (l.residual) {
        const T* const from = l.residual.as<const T>() + at;
        out = add(l.exact ? rounded<T>(out) : out, left == W ? load(from) : load_n(from, left));
      }
      T* const to = l.y.as<T>() + at;
      if (left == W) {
        store(to, out);
      } else {
        store_n(to, out, left);
      }
    }
  }
}

static void finish_block(const void* context, const Int8Block& block) {
  const Layer8& layer = *static_cast<const Layer8*>(context);
  switch (layer.y.dtype) {
    case DType::f16:
      return finish<F16>(layer, block);
    case DType::bf16:
      return finish<BF16>(layer, block);
    default:
      return finish<float>(layer, block);
  }
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
#else

namespace halfbyte::cpu {
namespace {

constexpr size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

/// Where the parts of the workspace begin.
struct Parts {
  size_t codes, row_absmax, count, columns, mask, outliers, end;
  int64_t ld;
};

Parts parts_of(int64_t m, int64_t k, float threshold) {
  const size_t rows = static_cast<size_t>(m), cols = static_cast<size_t>(k);
  Parts p{};
  p.ld = static_cast<int64_t>(round_up(cols));
  p.row_absmax = rows * static_cast<size_t>(p.ld);
  p.count = p.row_absmax + round_up(rows * sizeof(float));
  p.end = p.count;
  if (threshold > 0.0f) {
    p.columns = p.count + 64;
    p.mask = p.columns + round_up(cols * sizeof(int32_t));
    p.outliers = p.mask + round_up(cols);
    p.end = p.outliers + rows * cols * sizeof(float);
  }
  return p;
}

/// Numbers of the set bytes of the mask, ascending; returns how many.
int64_t compact(int32_t* columns, const uint8_t* mask, int64_t k) {
  int64_t count = 0;
  for (int64_t c = 0; c < k;) {
    uint64_t eight = 1;
    if (k - c >= 8) std::memcpy(&eight, mask + c, 8);
    if (eight == 0) {
      c += 8;
      continue;
    }
    const int64_t end = k - c >= 8 ? c + 8 : k;
    for (; c < end; ++c) {
      if (mask[c]) columns[count++] = static_cast<int32_t>(c);
    }
  }
  return count;
}

void gather_columns(float* out, const View& x, int64_t m, int64_t k, const int32_t* columns, int64_t count) {
  with_float_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(m, 1 + 20'000 / (count + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const char* const row = x.as<const char>() + static_cast<size_t>(i * k) * sizeof(T);
        for (int64_t j = 0; j < count; ++j) {
          T value;
          std::memcpy(&value, row + static_cast<size_t>(columns[j]) * sizeof(T), sizeof(T));
          out[i * count + j] = to_float(value);
        }
      }
    });
  });
}

}  // namespace

size_t CpuBackend::linear_8bit_workspace(const View& x, const View&, float threshold) const {
  return parts_of(x.rows(), x.cols(), threshold).end;
}

Status CpuBackend::linear_8bit(Queue, View y, View x, View weight, View scb, const Epilogue& epilogue,
                               float threshold, bool bnb_exact, View workspace) {
  const char* const op = "linear_8bit";
  const int64_t m = x.rows(), k = x.cols(), n = weight.rows();
  if (!is_float(x.dtype) || y.dtype != x.dtype || weight.dtype != DType::i8 || scb.dtype != DType::f32) {
    return refuse_dtype(op, "x and y must be of one float dtype, the weight int8, scb float32");
  }
  if (weight.ndim != 2 || weight.cols() != k || scb.size() != n) {
    return refuse(op, "the weight must be [N, K] and scb [N] for x [M, K]");
  }
  if (y.rows() != m || y.cols() != n) return refuse(op, "y is not [M, N]");
  if (k > INT32_MAX) return refuse(op, "more than 2^31 - 1 input features");
  if (epilogue.bias && (epilogue.bias.size() != n || !is_float(epilogue.bias.dtype))) {
    return refuse(op, "the bias must be float [N]");
  }
  if (epilogue.residual && (epilogue.residual.size() != y.size() || epilogue.residual.dtype != y.dtype)) {
    return refuse(op, "the residual must have y's shape and dtype");
  }
  const Parts parts = parts_of(m, k, threshold);
  const size_t given = workspace ? static_cast<size_t>(workspace.size() * size_of(workspace.dtype)) : 0;
  if (given < parts.end) return refuse(op, "the workspace is too small");
  if (m == 0 || n == 0) return {};

  char* const base = workspace.as<char>();
  int8_t* const codes = reinterpret_cast<int8_t*>(base + parts.codes);
  float* const row_absmax = reinterpret_cast<float*>(base + parts.row_absmax);
  int32_t* const columns = reinterpret_cast<int32_t*>(base + parts.columns);
  uint8_t* const mask = reinterpret_cast<uint8_t*>(base + parts.mask);
  float* const outliers = reinterpret_cast<float*>(base + parts.outliers);

  int8_quantize(x, m, k, threshold, bnb_exact, codes, parts.ld, row_absmax, mask);
  int64_t count = 0;
  if (threshold > 0.0f) {
    count = compact(columns, mask, k);
    if (count) gather_columns(outliers, x, m, k, columns, count);
  }
  const Layer8 layer{y,
                     epilogue.residual,
                     epilogue.bias,
                     weight.as<const int8_t>(),
                     n,
                     k,
                     scb.as<const float>(),
                     row_absmax,
                     columns,
                     count,
                     outliers,
                     bnb_exact};
  int8_product(Int8Product{codes, m, parts.ld, layer.weight, n, k, HALFBYTE_PICK(finish_block), &layer});
  return {};
}

}  // namespace halfbyte::cpu
#endif
