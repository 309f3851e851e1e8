// binary, activation, gated_activation. Sixteen-bit floats are widened, computed in fp32 and rounded once.
// Fast for contiguous runs and for an operand that is constant along a run (a row vector times a column, a
// scalar).
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

#define HALFBYTE_FILE "elementwise.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "activations.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

template <Binary op>
static inline F combine(F a, F b) {
  if constexpr (op == Binary::add) return add(a, b);
  if constexpr (op == Binary::sub) return sub(a, b);
  if constexpr (op == Binary::mul) return mul(a, b);
  if constexpr (op == Binary::div) return div(a, b);
  if constexpr (op == Binary::min) return nan_of(a, min(a, b));
  return nan_of(a, max(a, b));
}

/// A run of an operand: contiguous, or one value throughout.
template <typename T>
struct Source {
  const T* p;
  bool constant;
  F value;
  Source(const T* from, bool is_constant) : p(from), constant(is_constant), value(zero()) {
    if (!constant) return;
    T lanes[W];
    for (int i = 0; i < W; ++i) __builtin_memcpy(lanes + i, p, sizeof(T));
    value = load(lanes);
  }
  F at(int64_t i) const { return constant ? value : load(p + i); }
  F tail(int64_t i, int64_t n) const { return constant ? value : load_n(p + i, n); }
};

template <typename T, Binary op>
static void binary_loop(T* y, const Source<T>& a, const Source<T>& b, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, combine<op>(a.at(i), b.at(i)));
  if (i < n) store_n(y + i, combine<op>(a.tail(i, n - i), b.tail(i, n - i)), n - i);
}

/// y contiguous; the steps of a and b are 0 or 1.
static void binary_run(DType dtype, Binary op, void* out, const void* left, int64_t step_a, const void* right,
                       int64_t step_b, int64_t n) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(out);
    const Source<T> a(static_cast<const T*>(left), step_a == 0);
    const Source<T> b(static_cast<const T*>(right), step_b == 0);
    switch (op) {
      case Binary::add:
        return binary_loop<T, Binary::add>(y, a, b, n);
      case Binary::sub:
        return binary_loop<T, Binary::sub>(y, a, b, n);
      case Binary::mul:
        return binary_loop<T, Binary::mul>(y, a, b, n);
      case Binary::div:
        return binary_loop<T, Binary::div>(y, a, b, n);
      case Binary::min:
        return binary_loop<T, Binary::min>(y, a, b, n);
      case Binary::max:
        return binary_loop<T, Binary::max>(y, a, b, n);
    }
  });
}

static void activation_run(DType dtype, Activation act, void* out, const void* in, int64_t n) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(out);
    const T* x = static_cast<const T*>(in);
    with_activation(act, [&](auto tag) {
      constexpr Activation f = decltype(tag)::value;
      int64_t i = 0;
      for (; i + W <= n; i += W) store(y + i, activate<f>(load(x + i)));
      if (i < n) store_n(y + i, activate<f>(load_n(x + i, n - i)), n - i);
    });
  });
}

static void gated_run(DType dtype, Activation act, void* out, const void* gate, const void* up, int64_t n) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(out);
    const T* g = static_cast<const T*>(gate);
    const T* u = static_cast<const T*>(up);
    with_activation(act, [&](auto tag) {
      constexpr Activation f = decltype(tag)::value;
      int64_t i = 0;
      for (; i + W <= n; i += W) store(y + i, mul(activate<f>(load(g + i)), load(u + i)));
      if (i < n) store_n(y + i, mul(activate<f>(load_n(g + i, n - i)), load_n(u + i, n - i)), n - i);
    });
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

constexpr int64_t kPiece = 8192;

/// Wraps like the machine; a division by zero gives 0 (a process must not stop for it).
int32_t combine_int(Binary op, int32_t a, int32_t b) {
  const uint32_t ua = static_cast<uint32_t>(a), ub = static_cast<uint32_t>(b);
  switch (op) {
    case Binary::add:
      return static_cast<int32_t>(ua + ub);
    case Binary::sub:
      return static_cast<int32_t>(ua - ub);
    case Binary::mul:
      return static_cast<int32_t>(ua * ub);
    case Binary::div:
      return b == 0 ? 0 : b == -1 ? static_cast<int32_t>(0u - ua) : a / b;
    case Binary::min:
      return a < b ? a : b;
    case Binary::max:
      return a > b ? a : b;
  }
  return 0;
}

}  // namespace

Status CpuBackend::binary(Queue, View y, View a, View b, Binary op) {
  if (!same_shape(y, a) || !same_shape(y, b)) return refuse("binary", "the three shapes differ");
  if (y.dtype != a.dtype || y.dtype != b.dtype || (!is_float(y.dtype) && y.dtype != DType::i32)) {
    return refuse_dtype("binary", "the operands must be of one dtype, float or int32");
  }
  const StridedLoop<3> loop({&y, &a, &b});
  const int64_t bytes = size_of(y.dtype);
  const int64_t* step = loop.step;
  if (y.dtype == DType::i32) {
    loop.each(kPiece, [&](const int64_t* at, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const int32_t left = get(a.as<int32_t>() + at[1] + i * step[1]);
        const int32_t right = get(b.as<int32_t>() + at[2] + i * step[2]);
        put(y.as<int32_t>() + at[0] + i * step[0], combine_int(op, left, right));
      }
    });
    return {};
  }
  const auto run = HALFBYTE_PICK(binary_run);
  const bool by_runs = step[0] == 1 && (step[1] | 1) == 1 && (step[2] | 1) == 1;
  loop.each(kPiece, [&](const int64_t* at, int64_t n) {
    char* out = y.as<char>() + at[0] * bytes;
    const char* left = a.as<const char>() + at[1] * bytes;
    const char* right = b.as<const char>() + at[2] * bytes;
    if (by_runs) {
      run(y.dtype, op, out, left, step[1], right, step[2], n);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        run(y.dtype, op, out + i * step[0] * bytes, left + i * step[1] * bytes, 1,
            right + i * step[2] * bytes, 1, 1);
      }
    }
  });
  return {};
}

Status CpuBackend::activation(Queue, View y, View x, Activation act) {
  if (y.size() != x.size()) return refuse("activation", "the sizes differ");
  if (y.dtype != x.dtype || !is_float(x.dtype))
    return refuse_dtype("activation", "one float dtype is needed");
  if (!y.is_contiguous() || !x.is_contiguous()) return refuse("activation", "operands must be contiguous");
  const auto run = HALFBYTE_PICK(activation_run);
  const int64_t bytes = size_of(x.dtype);
  parallel_for(x.size(), kPiece, [&](int64_t begin, int64_t end) {
    run(x.dtype, act, y.as<char>() + begin * bytes, x.as<const char>() + begin * bytes, end - begin);
  });
  return {};
}

Status CpuBackend::gated_activation(Queue, View y, View gate, View up, Activation act) {
  if (!same_shape(y, gate) || !same_shape(y, up))
    return refuse("gated_activation", "the three shapes differ");
  if (y.dtype != gate.dtype || y.dtype != up.dtype || !is_float(y.dtype)) {
    return refuse_dtype("gated_activation", "one float dtype is needed");
  }
  const StridedLoop<3> loop({&y, &gate, &up});
  if (!loop.contiguous_runs() && loop.run > 1) return refuse("gated_activation", "rows must be contiguous");
  const auto run = HALFBYTE_PICK(gated_run);
  const int64_t bytes = size_of(y.dtype);
  loop.each(kPiece, [&](const int64_t* at, int64_t n) {
    run(y.dtype, act, y.as<char>() + at[0] * bytes, gate.as<const char>() + at[1] * bytes,
        up.as<const char>() + at[2] * bytes, n);
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
