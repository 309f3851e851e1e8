// rms_norm and layer_norm over the last dimension of [rows, cols], with the residual addition in front of
// them. A row is read for its statistics and read again, from the first cache, to be scaled; rows are spread
// over the pool. Statistics are fp32 sums in several vectors; the variance is taken about the mean in a pass
// of its own.
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#ifndef HALFBYTE_NORM_OPERANDS
#define HALFBYTE_NORM_OPERANDS
namespace halfbyte::cpu {

struct NormOperands {
  View y, sum, x, residual, weight, bias;
  float eps;
  float weight_offset;
};

}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "norms.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

/// The sum of a row, or of its squared distances from the mean.
template <bool squares, typename T>
static inline float sum_row(const T* x, int64_t n, float mean) {
  const F m = set1(mean);
  F total[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int u = 0; u < 4; ++u) {
      const F v = sub(load(x + i + u * W), m);
      total[u] = squares ? fma(v, v, total[u]) : add(total[u], v);
    }
  }
  for (; i + W <= n; i += W) {
    const F v = sub(load(x + i), m);
    total[0] = squares ? fma(v, v, total[0]) : add(total[0], v);
  }
  float sum = reduce_add(add(add(total[0], total[1]), add(total[2], total[3])));
  if (i < n) {
    float rest[W];
    store(rest, sub(load_n(x + i, n - i), m));
    for (int64_t lane = 0; lane < n - i; ++lane) sum += squares ? rest[lane] * rest[lane] : rest[lane];
  }
  return sum;
}

/// sum = x + residual, rounded.
template <typename T>
static void add_row(T* sum, const T* x, const T* residual, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(sum + i, add(load(x + i), load(residual + i)));
  if (i < n) store_n(sum + i, add(load_n(x + i, n - i), load_n(residual + i, n - i)), n - i);
}

/// y = (x - mean) * scale * (weight + offset) + bias; weight and bias may be null.
template <typename T, typename P>
static void scale_row(T* y, const T* x, const P* weight, const P* bias, float mean, float scale, float offset,
                      int64_t n) {
  const F m = set1(mean), s = set1(scale), o = set1(offset);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t left = n - i;
    const bool whole = left >= W;
    F v = mul(sub(whole ? load(x + i) : load_n(x + i, left), m), s);
    if (weight) v = mul(v, add(whole ? load(weight + i) : load_n(weight + i, left), o));
    if (bias) v = add(v, whole ? load(bias + i) : load_n(bias + i, left));
    if (whole) {
      store(y + i, v);
    } else {
      store_n(y + i, v, left);
    }
  }
}

template <bool centred, typename T, typename P>
static void norm_rows(const NormOperands& o, int64_t begin, int64_t end) {
  const int64_t n = o.x.cols();
  const P* weight = o.weight ? o.weight.as<P>() : nullptr;
  const P* bias = o.bias ? o.bias.as<P>() : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = o.x.as<T>() + row * n;
    if (o.residual) {
      T* sum = o.sum.as<T>() + row * n;
      add_row(sum, x, o.residual.as<T>() + row * n, n);
      x = sum;
    }
    const float mean = centred ? sum_row<false>(x, n, 0.0f) / static_cast<float>(n) : 0.0f;
    const float squares = sum_row<true>(x, n, mean);
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + o.eps);
    scale_row(o.y.as<T>() + row * n, x, weight, bias, mean, scale, o.weight_offset, n);
  }
}

template <bool centred>
static void norm_run(const NormOperands& o, int64_t begin, int64_t end) {
  with_float_type(o.x.dtype, [&](auto* type) {
    with_float_type(o.weight ? o.weight.dtype
                    : o.bias ? o.bias.dtype
                             : o.x.dtype,
                    [&](auto* parameter) {
                      using T = std::remove_pointer_t<decltype(type)>;
                      using P = std::remove_pointer_t<decltype(parameter)>;
                      norm_rows<centred, T, P>(o, begin, end);
                    });
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

Status check_norm(const char* op, const NormOperands& o) {
  if (!is_float(o.x.dtype) || o.y.dtype != o.x.dtype)
    return refuse_dtype(op, "x and y must be of one float dtype");
  if (!o.x.is_contiguous() || !o.y.is_contiguous()) return refuse(op, "x and y must be contiguous");
  if (o.y.size() != o.x.size()) return refuse(op, "x and y differ in size");
  if (static_cast<bool>(o.residual) != static_cast<bool>(o.sum))
    return refuse(op, "residual and sum go together");
  for (const View* v : {&o.residual, &o.sum}) {
    if (!*v) continue;
    if (v->dtype != o.x.dtype) return refuse_dtype(op, "residual and sum must have x's dtype");
    if (v->size() != o.x.size() || !v->is_contiguous()) return refuse(op, "residual and sum must be like x");
  }
  for (const View* v : {&o.weight, &o.bias}) {
    if (!*v) continue;
    if (!is_float(v->dtype)) return refuse_dtype(op, "weight and bias must be float");
    if (v->size() != o.x.cols() || !v->is_contiguous()) {
      return refuse(op, "weight and bias must have " + std::to_string(o.x.cols()) + " contiguous entries");
    }
  }
  if (o.weight && o.bias && o.weight.dtype != o.bias.dtype) {
    return refuse_dtype(op, "weight and bias must be of one dtype");
  }
  return {};
}

void run_norm(void (*run)(const NormOperands&, int64_t, int64_t), const NormOperands& o) {
  const int64_t cols = o.x.cols();
  if (cols == 0) return;
  parallel_for(o.x.rows(), 1 + 8192 / cols, [&](int64_t begin, int64_t end) { run(o, begin, end); });
}

}  // namespace

Status CpuBackend::rms_norm(Queue, View y, View sum, View x, View residual, View weight, float eps,
                            float weight_offset) {
  const NormOperands o{y, sum, x, residual, weight, View{}, eps, weight_offset};
  if (Status status = check_norm("rms_norm", o); !status.ok()) return status;
  run_norm(HALFBYTE_PICK(norm_run<false>), o);
  return {};
}

Status CpuBackend::layer_norm(Queue, View y, View sum, View x, View residual, View weight, View bias,
                              float eps) {
  const NormOperands o{y, sum, x, residual, weight, bias, eps, 0.0f};
  if (Status status = check_norm("layer_norm", o); !status.ok()) return status;
  run_norm(HALFBYTE_PICK(norm_run<true>), o);
  return {};
}

}  // namespace halfbyte::cpu
#endif
