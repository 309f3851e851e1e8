// Mixtures of experts: the choice, products that are made for the chosen experts alone, and the sum of their
// results.
//
// ids are read when the op runs: pairs are counted by expert, and each expert that has any multiplies their
// rows with the kernels of linear.cc, linear4.cc or linear8.cc. One row is multiplied where it lies; more are
// brought together before and taken apart behind, at most as many at a time as there are tokens.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#define HALFBYTE_FILE "experts.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

/// Columns [begin, end) of one row: y = residual + the sum of weights[j] * x[j * stride ...].
static void weighted_row(DType dtype, void* out, const void* in, int64_t stride, const float* weights,
                         int64_t count, const void* residual, int64_t begin, int64_t end) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(in);
    const T* const first = static_cast<const T*>(residual);
    T* const y = static_cast<T*>(out);
    for (int64_t i = begin; i < end; i += W) {
      const int64_t n = end - i < W ? end - i : W;
      F sum = zero();
      for (int64_t j = 0; j < count; ++j) {
        const T* const from = x + j * stride + i;
        float weight;
        __builtin_memcpy(&weight, weights + j, sizeof weight);
        sum = add(sum, mul(n == W ? load(from) : load_n(from, n), set1(weight)));
      }
      if (first) sum = add(sum, n == W ? load(first + i) : load_n(first + i, n));
      if (n == W)
        store(y + i, sum);
      else
        store_n(y + i, sum, n);
    }
  });
}

/// to[i] = exp(from[i] - most); returns their sum.
static float exponentials(float* to, const float* from, float most, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = count - i < W ? count - i : W;
    alignas(64) float lanes[W];
    store(lanes, exp(sub(n == W ? load(from + i) : load_n(from + i, n), set1(most))));
    for (int64_t j = 0; j < n; ++j) sum += lanes[j];
    if (to) __builtin_memcpy(to + i, lanes, static_cast<size_t>(n) * sizeof(float));
  }
  return sum;
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

float read(const float* from, int64_t i) {
  float value;
  std::memcpy(&value, from + i, sizeof value);
  return value;
}
int32_t read(const int32_t* from, int64_t i) {
  int32_t value;
  std::memcpy(&value, from + i, sizeof value);
  return value;
}

/// Comes before in the order of choice: larger, or equal and earlier; NaN and -infinity are last.
bool precedes(float a, int64_t i, float b, int64_t j) {
  const float low = -bits_to_float(0x7f800000u);
  if (!(a >= low)) a = low;
  if (!(b >= low)) b = low;
  return a > b || (a == b && i < j);
}

/// The ids of the k first in that order, ascending.
void choose(const float* from, int64_t experts, int64_t k, int32_t* ids) {
  int64_t last = -1;
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (last >= 0 && !precedes(read(from, last), last, read(from, e), e)) continue;
      if (best < 0 || precedes(read(from, e), e, read(from, best), best)) best = e;
    }
    last = best;
  }
  // `last` is the worst of them
  for (int64_t e = 0, j = 0; e < experts && j < k; ++e) {
    if (e != last && !precedes(read(from, e), e, read(from, last), last)) continue;
    const int32_t id = static_cast<int32_t>(e);
    std::memcpy(ids + j++, &id, sizeof id);
  }
}

constexpr size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

View matrix(void* data, DType dtype, int64_t rows, int64_t cols) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = 2;
  v.shape[0] = rows;
  v.shape[1] = v.strides[0] = cols;
  v.strides[1] = 1;
  return v;
}

/// Where the parts of the workspace begin, for at most `most` rows of an expert at a time.
struct Parts {
  int64_t most;
  size_t starts, order, x, y, rest, end;
};

Parts parts_of(const CpuBackend& backend, const View& x, const View& ids, const Experts& w) {
  Parts p{};
  p.most = ids.rows();
  const size_t width = static_cast<size_t>(size_of(x.dtype)), most = static_cast<size_t>(p.most);
  p.order = round_up(static_cast<size_t>(w.count + 2) * sizeof(int64_t));
  p.x = p.order + round_up(static_cast<size_t>(ids.size()) * sizeof(int64_t));
  p.y = p.x + round_up(most * static_cast<size_t>(w.k) * width);
  p.rest = p.y + round_up(most * static_cast<size_t>(w.n) * width);
  const View rows = matrix(nullptr, x.dtype, p.most, w.k);
  size_t rest = 0;
  switch (w.form) {
    case Experts::Form::dense:
      rest = backend.linear_workspace(rows, View{});
      break;
    case Experts::Form::packed4:
      if (w.count > 0) rest = backend.linear_4bit_workspace(rows, w.packed(0));
      break;
    case Experts::Form::int8:
      rest = backend.linear_8bit_workspace(rows, View{}, w.threshold);
      break;
  }
  p.end = p.rest + rest;
  return p;
}

/// Sorts pairs by expert, stable; those with an id that is none come last. starts[e] .. starts[e + 1] of
/// order.
void sort_pairs(const View& ids, int64_t experts, int64_t* starts, int64_t* order) {
  const int64_t pairs = ids.size();
  const auto bin = [&](int64_t p) {
    const int64_t id = read(ids.as<const int32_t>(), p);
    return id >= 0 && id < experts ? id : experts;
  };
  for (int64_t e = 0; e < experts + 2; ++e) starts[e] = 0;
  for (int64_t p = 0; p < pairs; ++p) ++starts[bin(p) + 1];
  for (int64_t e = 0; e <= experts; ++e) starts[e + 1] += starts[e];
  for (int64_t p = 0; p < pairs; ++p) order[starts[bin(p)]++] = p;
  for (int64_t e = experts; e >= 0; --e) starts[e + 1] = starts[e];
  starts[0] = 0;
}

Status product(CpuBackend& backend, const View& y, const View& x, const Experts& w, int64_t e,
               const View& workspace) {
  const Epilogue epilogue{w.bias(e), View{}};
  switch (w.form) {
    case Experts::Form::dense:
      return backend.linear(Queue::compute, y, x, w.part(e, 0), epilogue, workspace);
    case Experts::Form::packed4:
      return backend.linear_4bit(Queue::compute, y, x, w.packed(e), epilogue, workspace);
    case Experts::Form::int8:
      return backend.linear_8bit(Queue::compute, y, x, w.part(e, 0), w.part(e, 1), epilogue, w.threshold,
                                 w.bnb_exact, workspace);
  }
  return {};
}

/// copy(i) for so many rows of so many bytes.
template <typename Copy>
void each_row(int64_t rows, int64_t bytes, const Copy& copy) {
  parallel_for(rows, 1 + 65536 / (bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy(i);
  });
}

void fill_nan(const View& y, int64_t row) {
  with_float_type(y.dtype, [&](auto* type) {
    std::remove_pointer_t<decltype(type)> nan;
    from_float(bits_to_float(0x7fc00000u), &nan);
    char* const to = y.as<char>() + row * y.cols() * static_cast<int64_t>(sizeof nan);
    for (int64_t c = 0; c < y.cols(); ++c) std::memcpy(to + c * sizeof nan, &nan, sizeof nan);
  });
}

}  // namespace

Status CpuBackend::route_tokens(Queue, View ids, View weights, View scores, View choice, bool softmax,
                                bool normalize, float tiny, float scale) {
  const char* const op = "route_tokens";
  const View& by = choice ? choice : scores;
  const int64_t tokens = scores.rows(), experts = scores.cols(), k = ids.cols();
  if (Status status = check_routes(op, ids, weights, scores, by); !status.ok()) return status;
  const auto exponentials = HALFBYTE_PICK(exponentials);
  parallel_for(tokens, 1 + 8192 / (experts * k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* const row = scores.as<const float>() + t * experts;
      int32_t* const id = ids.as<int32_t>() + t * k;
      float* const weight = weights.as<float>() + t * k;
      choose(by.as<const float>() + t * experts, experts, k, id);
      for (int64_t j = 0; j < k; ++j) std::memcpy(weight + j, row + read(id, j), sizeof(float));
      float whole = 1.0f;
      if (softmax) {
        float most = -bits_to_float(0x7f800000u);
        for (int64_t e = 0; e < experts; ++e) {
          const float score = read(row, e);
          if (score > most) most = score;
        }
        const float chosen = exponentials(weight, weight, most, k);
        whole = normalize ? chosen : exponentials(nullptr, row, most, experts);
      } else if (normalize) {
        whole = 0.0f;
        for (int64_t j = 0; j < k; ++j) whole += read(weight, j);
      }
      if (normalize) whole += tiny;
      for (int64_t j = 0; j < k; ++j) {
        const float share = read(weight, j) / whole * scale;
        std::memcpy(weight + j, &share, sizeof share);
      }
    }
  });
  return {};
}

size_t CpuBackend::linear_experts_workspace(const View& x, const View& ids, const Experts& w) const {
  return parts_of(*this, x, ids, w).end;
}

Status CpuBackend::linear_experts(Queue, View y, View x, View ids, const Experts& w, View workspace) {
  const char* const op = "linear_experts";
  const int64_t pairs = ids.size();
  if (Status status = check_linear_experts(op, y, x, ids, w); !status.ok()) return status;
  if (pairs == 0 || w.n == 0) return {};
  const Parts parts = parts_of(*this, x, ids, w);
  if (!workspace || static_cast<size_t>(workspace.size()) < parts.end)
    return refuse(op, "the workspace is too small");
  char* const base = workspace.as<char>();
  auto* const starts = reinterpret_cast<int64_t*>(base);
  auto* const order = reinterpret_cast<int64_t*>(base + parts.order);
  View rest = workspace;
  rest.data = base + parts.rest;
  rest.shape[0] = static_cast<int64_t>(parts.end - parts.rest);

  const int64_t width = size_of(x.dtype), in = w.k * width, out = w.n * width;
  const int64_t each = pairs / x.rows();  // pairs of a row of x
  sort_pairs(ids, w.count, starts, order);
  for (int64_t e = 0; e < w.count; ++e) {
    for (int64_t first = starts[e]; first < starts[e + 1]; first += parts.most) {
      const int64_t left = starts[e + 1] - first, rows = left < parts.most ? left : parts.most;
      const int64_t* const pair = order + first;
      const auto x_of = [&](int64_t i) { return x.as<char>() + pair[i] / each * in; };
      const auto y_of = [&](int64_t i) { return y.as<char>() + pair[i] * out; };
      if (rows == 1) {
        const Status status =
            product(*this, matrix(y_of(0), y.dtype, 1, w.n), matrix(x_of(0), x.dtype, 1, w.k), w, e, rest);
        if (!status.ok()) return status;
        continue;
      }
      char* const from = base + parts.x;
      char* const to = base + parts.y;
      each_row(rows, in, [&](int64_t i) { std::memcpy(from + i * in, x_of(i), static_cast<size_t>(in)); });
      const Status status =
          product(*this, matrix(to, y.dtype, rows, w.n), matrix(from, x.dtype, rows, w.k), w, e, rest);
      if (!status.ok()) return status;
      each_row(rows, out, [&](int64_t i) { std::memcpy(y_of(i), to + i * out, static_cast<size_t>(out)); });
    }
  }
  for (int64_t i = starts[w.count]; i < pairs; ++i) fill_nan(y, order[i]);
  return {};
}

Status CpuBackend::weighted_sum(Queue, View y, View x, View weights, View residual) {
  const char* const op = "weighted_sum";
  const int64_t tokens = weights.rows(), k = weights.cols(), n = x.cols();
  if (Status status = check_weighted_sum(op, y, x, weights, residual); !status.ok()) return status;
  if (y.size() == 0) return {};
  const auto run = HALFBYTE_PICK(weighted_row);
  const int64_t row = n * size_of(x.dtype);
  // a few tokens are divided by columns too
  constexpr int64_t kColumns = 2048;
  const int64_t pieces = (n + kColumns - 1) / kColumns;
  parallel_for(tokens * pieces, 1 + 32768 / ((k + 1) * (n < kColumns ? n : kColumns)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t t = i / pieces, first = i % pieces * kColumns;
                   const int64_t last = first + kColumns < n ? first + kColumns : n;
                   run(x.dtype, y.as<char>() + t * row, x.as<const char>() + t * k * row, n,
                       weights.as<const float>() + t * k, k,
                       residual ? residual.as<const char>() + t * row : nullptr, first, last);
                 }
               });
  return {};
}

}  // namespace halfbyte::cpu
#endif
