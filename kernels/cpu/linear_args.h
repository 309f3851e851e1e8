// What the dense and the 4-bit linear op share outside the per-instruction-set code: the operands of one call
// as the kernels take them, the checks, and how much scratch the packed activations need.
#pragma once

#include <string>

#include "common.h"
#include "pool.h"

namespace halfbyte::cpu {

/// Rows of activations that are packed, multiplied and finished together by the blocked product.
constexpr int64_t kPanelRows = 256;
/// Weight rows per task of the blocked product: a multiple of every kernel's row count (6, 8, 12, 24).
constexpr int kTaskRows = 24;

struct LinearArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::f32;  // of x, y and the residual
  const void* bias = nullptr;
  DType bias_dtype = DType::f32;
  const void* residual = nullptr;
  float* packed = nullptr;  // the workspace
};

inline Status check_linear(const char* op, const View& y, const View& x, int64_t n, int64_t k,
                           const Epilogue& epilogue, const View& workspace, size_t workspace_needed,
                           LinearArgs* out) {
  if (!is_float(x.dtype) || y.dtype != x.dtype)
    return refuse_dtype(op, std::string("x is ") + name_of(x.dtype) + " and y " + name_of(y.dtype) +
                                ", both must be of one float dtype");
  if (!x.is_contiguous() || !y.is_contiguous()) return refuse(op, "x and y must be contiguous");
  const int64_t m = x.rows();
  if (x.cols() != k || y.cols() != n || y.rows() != m)
    return refuse(op, "x [" + std::to_string(m) + ", " + std::to_string(x.cols()) + "] and y [" +
                          std::to_string(y.rows()) + ", " + std::to_string(y.cols()) +
                          "] do not fit a weight [" + std::to_string(n) + ", " + std::to_string(k) + "]");
  const View& bias = epilogue.bias;
  if (bias && !is_float(bias.dtype)) return refuse_dtype(op, "the bias must be of a float dtype");
  if (bias && (bias.size() != n || !bias.is_contiguous()))
    return refuse(op, "the bias must be contiguous and hold " + std::to_string(n) + " elements");
  const View& residual = epilogue.residual;
  if (residual && residual.dtype != x.dtype) return refuse_dtype(op, "the residual must have y's dtype");
  if (residual && (residual.size() != m * n || !residual.is_contiguous()))
    return refuse(op, "the residual must be contiguous and of y's shape");
  if (m > 0 && n > 0 && workspace_needed > 0 &&
      (!workspace || static_cast<size_t>(workspace.size() * size_of(workspace.dtype)) < workspace_needed))
    return refuse(op, "the workspace is smaller than " + std::to_string(workspace_needed) + " bytes");
  out->m = m;
  out->n = n;
  out->k = k;
  out->x = x.data;
  out->y = y.data;
  out->dtype = x.dtype;
  out->bias = bias ? bias.data : nullptr;
  out->bias_dtype = bias.dtype;
  out->residual = residual ? residual.data : nullptr;
  // the kernels' scratch starts on a cache line; linear_scratch() left room for that
  out->packed = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace.data) + 63) & ~uintptr_t{63});
  return {};
}

/// Rows of x that are packed at a time: all of them up to about 32 MB, whole panels.
inline int64_t rows_per_pass(int64_t m, int64_t k) {
  const int64_t fitting = (int64_t{8} << 20) / (k > 0 ? k : 1) / kPanelRows * kPanelRows;
  const int64_t most = fitting > kPanelRows ? fitting : kPanelRows;
  const int64_t all = (m + 15) / 16 * 16;
  return all < most ? all : most;
}

/// Bytes for rows_per_pass() rows of x as float, each padded to whole groups of 128.
inline size_t linear_scratch(int64_t m, int64_t k) {
  const int64_t padded = (k + 127) / 128 * 128;
  return static_cast<size_t>(rows_per_pass(m, k) * padded) * sizeof(float) + 64;
}

/// Multiply-adds below which waking the pool costs more than it brings.
constexpr int64_t kSerialWork = 512 * 1024;

/// body(begin, end) over the rows of a weight, `work` in all: in ranges small enough that a thread which is
/// held up costs the others little.
template <typename Body>
void spread_rows(int64_t n, int64_t work, const Body& body) {
  if (work <= kSerialWork || pool_threads() == 1) return body(static_cast<int64_t>(0), n);
  int64_t ranges = work / (kSerialWork / 8);
  const int64_t most = int64_t{16} * pool_threads();
  if (ranges > most) ranges = most;
  int64_t size = ((n + ranges - 1) / ranges + 15) / 16 * 16;
  struct Context {
    const Body* body;
    int64_t n, size;
  } context{&body, n, size};
  pool_run((n + size - 1) / size,
           [](void* p, int64_t i) {
             const auto& c = *static_cast<Context*>(p);
             const int64_t begin = i * c.size, end = begin + c.size;
             (*c.body)(begin, end < c.n ? end : c.n);
           },
           &context);
}

/// Runs the blocked product: passes of packed rows, panels of each, tasks of kTaskRows weight rows.
///   pack(row, rows, packed)                     packs one panel of x, kp floats per padded row
///   task(row, rows, packed, n, count)           multiplies it by `count` weight rows
template <typename Pack, typename Task>
void blocked_product(const LinearArgs& a, int64_t kp, const Pack& pack, const Task& task) {
  const int64_t pass_rows = rows_per_pass(a.m, a.k);
  const int64_t tasks = (a.n + kTaskRows - 1) / kTaskRows;
  for (int64_t pass = 0; pass < a.m; pass += pass_rows) {
    const int64_t in_pass = a.m - pass < pass_rows ? a.m - pass : pass_rows;
    const int64_t panels = (in_pass + kPanelRows - 1) / kPanelRows;
    const auto rows_of = [&](int64_t panel) {
      const int64_t left = in_pass - panel * kPanelRows;
      return left < kPanelRows ? left : kPanelRows;
    };
    parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        pack(pass + p * kPanelRows, rows_of(p), a.packed + p * kPanelRows * kp);
    });
    auto run = [&](int64_t i) {
      const int64_t p = i / tasks, n = i % tasks * kTaskRows;
      task(pass + p * kPanelRows, rows_of(p), a.packed + p * kPanelRows * kp, n,
           a.n - n < kTaskRows ? a.n - n : int64_t{kTaskRows});
    };
    if (in_pass * a.n * a.k <= 4 * kSerialWork) {
      for (int64_t i = 0; i < panels * tasks; ++i) run(i);
    } else {
      using Run = decltype(run);
      pool_run(
          panels * tasks, [](void* p, int64_t i) { (*static_cast<Run*>(p))(i); }, &run);
    }
  }
}

}  // namespace halfbyte::cpu
