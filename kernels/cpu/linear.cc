// Dense linear: y [M, N] = x [M, K] w [N, K]^T + bias + residual, w of any float dtype, sums in fp32.
//
// Up to four rows of x: one pass over the weight at the speed of memory, vectors along K, the sums of all
// rows in registers. More rows: the blocked product of gemm_tile.h.
#include <cstddef>
#include <cstdint>

#include "cpu_backend.h"
#include "linear_args.h"
#include "pool.h"

#ifndef HALFBYTE_DENSE_WEIGHT
#define HALFBYTE_DENSE_WEIGHT
namespace halfbyte::cpu {
struct DenseWeight {
  const void* data;
  DType dtype;
};
}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "linear.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "gemm_tile.h"

namespace halfbyte::cpu::HALFBYTE_ISA {
namespace {

struct DenseRows {
  const char* data;
  DType dtype;
  int64_t k, bytes;  // of an element

  void decode(int64_t n, int64_t from, int64_t count, float* out) const {
    read_floats(data, dtype, n * k + from, count, out);
  }
  void ahead(int64_t n, int64_t from, int64_t count, Ahead* list) const {
    list->add(data + (n * k + from) * bytes, count * bytes);
  }
};

template <typename T, int MB>
void few_rows_of(const LinearArgs& a, const T* w, const float* x, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    F acc[MB];
    for (int m = 0; m < MB; ++m) acc[m] = zero();
    dot_rows<T, MB>(w + n * a.k, x, a.k, a.k, acc);
    for (int m = 0; m < MB; ++m) finish_one(a, m, n, reduce_add(acc[m]));
  }
}

template <typename T>
void few_rows_as(const LinearArgs& a, const T* w, const float* x, int64_t begin, int64_t end) {
  switch (a.m) {
    case 1:
      return few_rows_of<T, 1>(a, w, x, begin, end);
    case 2:
      return few_rows_of<T, 2>(a, w, x, begin, end);
    case 3:
      return few_rows_of<T, 3>(a, w, x, begin, end);
    default:
      return few_rows_of<T, 4>(a, w, x, begin, end);
  }
}

}  // namespace

void dense_floats(const LinearArgs& a, float* out) { read_floats(a.x, a.dtype, 0, a.m * a.k, out); }

void dense_few_rows(const LinearArgs& a, const DenseWeight& w, const float* x, int64_t begin, int64_t end) {
  switch (w.dtype) {
    case DType::f16:
      return few_rows_as(a, static_cast<const F16*>(w.data), x, begin, end);
    case DType::bf16:
      return few_rows_as(a, static_cast<const BF16*>(w.data), x, begin, end);
    default:
      return few_rows_as(a, static_cast<const float*>(w.data), x, begin, end);
  }
}

void dense_pack(const LinearArgs& a, int64_t row, int64_t rows, float* packed) {
  pack_rows(a, row, rows, a.k, nullptr, 128, packed);
}

void dense_task(const LinearArgs& a, const DenseWeight& w, int64_t row, int64_t rows, const float* packed,
                int64_t n, int64_t count) {
  const DenseRows weight{static_cast<const char*>(w.data), w.dtype, a.k, size_of(w.dtype)};
  panel_task(a, weight, row, rows, packed, a.k, n, count);
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else
namespace halfbyte::cpu {

size_t CpuBackend::linear_workspace(const View& x, const View&) const {
  return linear_scratch(x.rows(), x.cols());
}

Status CpuBackend::linear(Queue, View y, View x, View weight, const Epilogue& epilogue, View workspace) {
  if (!is_float(weight.dtype) || weight.ndim != 2 || !weight.is_contiguous())
    return refuse("linear", "the weight must be a contiguous [N, K] of a float dtype");
  LinearArgs a;
  const int64_t n = weight.shape[0], k = weight.shape[1];
  if (Status s = check_linear("linear", y, x, n, k, epilogue, workspace, linear_scratch(x.rows(), k), &a);
      !s.ok())
    return s;
  if (a.m == 0 || a.n == 0) return {};
  const DenseWeight w{weight.data, weight.dtype};

  if (a.m <= 4) {
    const float* rows = static_cast<const float*>(a.x);
    if (a.dtype != DType::f32) {
      HALFBYTE_PICK(dense_floats)(a, a.packed);
      rows = a.packed;
    }
    const auto few = HALFBYTE_PICK(dense_few_rows);
    // bound by memory: a weight counts by its bytes
    spread_rows(a.n, a.n * a.k * size_of(w.dtype),
                [&](int64_t begin, int64_t end) { few(a, w, rows, begin, end); });
    return {};
  }
  const auto pack = HALFBYTE_PICK(dense_pack);
  const auto task = HALFBYTE_PICK(dense_task);
  blocked_product(
      a, a.k, [&](int64_t row, int64_t count, float* packed) { pack(a, row, count, packed); },
      [&](int64_t row, int64_t rows, const float* packed, int64_t first, int64_t count) {
        task(a, w, row, rows, packed, first, count);
      });
  return {};
}

}  // namespace halfbyte::cpu
#endif
