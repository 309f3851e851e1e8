// fill and copy: every dtype, any strides. Contiguous runs of one dtype are memcpy, runs of float to float
// are converted by vectors, transposed matrices go through tiles so that both sides stay in cache; the rest
// is one element at a time.
#include <cstring>
#include <limits>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

#define HALFBYTE_FILE "copy.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

template <typename Y, typename X>
static void convert_floats(void* out, const void* in, int64_t n) {
  Y* y = static_cast<Y*>(out);
  const X* x = static_cast<const X*>(in);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(x + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i), n - i);
}

/// y[0 .. n) = x[0 .. n), both contiguous, both float dtypes.
static void convert_run(DType to, DType from, void* y, const void* x, int64_t n) {
  with_float_type(to, [&](auto* py) {
    with_float_type(from, [&](auto* px) {
      using Y = std::remove_pointer_t<decltype(py)>;
      using X = std::remove_pointer_t<decltype(px)>;
      convert_floats<Y, X>(y, x, n);
    });
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

constexpr int64_t kPiece = 16384;
constexpr int64_t kTile = 32;

template <typename Body>
auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::i8:
      return body(static_cast<int8_t*>(nullptr));
    case DType::u8:
      return body(static_cast<uint8_t*>(nullptr));
    case DType::i32:
      return body(static_cast<int32_t*>(nullptr));
    case DType::i64:
      return body(static_cast<int64_t*>(nullptr));
    default:
      return with_float_type(dtype, body);
  }
}

/// Towards zero, to the nearest end where it does not fit; NaN becomes 0.
template <typename Y, typename X>
Y truncate(X x) {
  using Limits = std::numeric_limits<Y>;
  if (!(x == x)) return 0;
  if (x <= static_cast<X>(Limits::min())) return Limits::min();
  if (x >= static_cast<X>(Limits::max())) return Limits::max();
  return static_cast<Y>(x);
}

template <typename Y, typename X>
Y convert(X x) {
  if constexpr (std::is_same_v<Y, X>) {
    return x;
  } else if constexpr (std::is_integral_v<Y> && std::is_integral_v<X>) {
    return static_cast<Y>(x);
  } else if constexpr (std::is_integral_v<Y>) {
    return truncate<Y>(to_float(x));
  } else {
    Y y;
    if constexpr (std::is_integral_v<X>) {
      from_float(static_cast<float>(x), &y);
    } else {
      from_float(to_float(x), &y);
    }
    return y;
  }
}

using Run = void (*)(void* y, int64_t step_y, const void* x, int64_t step_x, int64_t n);

template <typename Y, typename X>
void strided_run(void* out, int64_t step_y, const void* in, int64_t step_x, int64_t n) {
  Y* y = static_cast<Y*>(out);
  const X* x = static_cast<const X*>(in);
  if (step_y == 1 && step_x == 1) {
    for (int64_t i = 0; i < n; ++i) put(y + i, convert<Y>(get(x + i)));
  } else if (step_x == 0) {
    const Y value = convert<Y>(get(x));
    for (int64_t i = 0; i < n; ++i) put(y + i * step_y, value);
  } else {
    for (int64_t i = 0; i < n; ++i) put(y + i * step_y, convert<Y>(get(x + i * step_x)));
  }
}

Run pick_run(DType to, DType from) {
  return with_type(to, [&](auto* y) {
    return with_type(from, [&](auto* x) -> Run {
      return &strided_run<std::remove_pointer_t<decltype(y)>, std::remove_pointer_t<decltype(x)> >;
    });
  });
}

/// Runs of x that step through memory while the dimension outside them is x's contiguous one: a transpose.
bool is_transposed(const StridedLoop<2>& loop) {
  return loop.ndim > 0 && loop.step[1] > 1 && loop.strides[1][loop.ndim - 1] == 1;
}

void copy_transposed(const StridedLoop<2>& loop, Run to_tile, Run from_tile, char* y, int64_t y_bytes,
                     const char* x, int64_t x_bytes) {
  const int last = loop.ndim - 1;
  const int64_t height = loop.shape[last];
  const int64_t bands = (height + kTile - 1) / kTile;
  parallel_for(loop.rows / height * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t rest = unit / bands, at_y = 0, at_x = 0;
      for (int d = last - 1; d >= 0; --d) {
        at_y += rest % loop.shape[d] * loop.strides[0][d];
        at_x += rest % loop.shape[d] * loop.strides[1][d];
        rest /= loop.shape[d];
      }
      const int64_t top = unit % bands * kTile;
      const int64_t bottom = top + kTile < height ? top + kTile : height;
      for (int64_t left = 0; left < loop.run; left += kTile) {
        const int64_t width = left + kTile < loop.run ? kTile : loop.run - left;
        // through a tile of y's dtype, so that each cache line of either matrix is touched once
        alignas(64) char tile[kTile * kTile * 8];
        for (int64_t col = 0; col < width; ++col) {
          to_tile(tile + col * y_bytes, kTile, x + (at_x + top + (left + col) * loop.step[1]) * x_bytes, 1,
                  bottom - top);
        }
        for (int64_t row = top; row < bottom; ++row) {
          from_tile(y + (at_y + row * loop.strides[0][last] + left * loop.step[0]) * y_bytes, loop.step[0],
                    tile + (row - top) * kTile * y_bytes, 1, width);
        }
      }
    }
  });
}

}  // namespace

Status CpuBackend::fill(Queue, View y, double value) {
  const StridedLoop<1> loop({&y});
  with_type(y.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T element;
    if constexpr (std::is_integral_v<T>) {
      element = truncate<T>(value);
    } else {
      from_float(static_cast<float>(value), &element);
    }
    const int64_t step = loop.step[0];
    loop.each(kPiece, [&](const int64_t* at, int64_t n) {
      T* p = y.as<T>() + at[0];
      if (step == 1) {
        for (int64_t i = 0; i < n; ++i) put(p + i, element);
      } else {
        for (int64_t i = 0; i < n; ++i) put(p + i * step, element);
      }
    });
  });
  return {};
}

Status CpuBackend::copy(Queue, View y, View x) {
  if (!same_shape(y, x)) return refuse("copy", "the two shapes differ");
  const StridedLoop<2> loop({&y, &x});
  const int64_t y_bytes = size_of(y.dtype), x_bytes = size_of(x.dtype);
  char* out = y.as<char>();
  const char* in = x.as<const char>();
  const bool contiguous = loop.contiguous_runs();
  if (contiguous && y.dtype == x.dtype) {
    loop.each(kPiece * 4 / y_bytes, [&](const int64_t* at, int64_t n) {
      std::memmove(out + at[0] * y_bytes, in + at[1] * x_bytes, static_cast<size_t>(n * y_bytes));
    });
  } else if (contiguous && is_float(y.dtype) && is_float(x.dtype)) {
    const auto convert = HALFBYTE_PICK(convert_run);
    loop.each(kPiece, [&](const int64_t* at, int64_t n) {
      convert(y.dtype, x.dtype, out + at[0] * y_bytes, in + at[1] * x_bytes, n);
    });
  } else if (loop.rows > 0 && loop.run > 0) {
    const Run run = pick_run(y.dtype, x.dtype);
    if (is_transposed(loop)) {
      copy_transposed(loop, run, pick_run(y.dtype, y.dtype), out, y_bytes, in, x_bytes);
    } else {
      loop.each(kPiece, [&](const int64_t* at, int64_t n) {
        run(out + at[0] * y_bytes, loop.step[0], in + at[1] * x_bytes, loop.step[1], n);
      });
    }
  }
  return {};
}

}  // namespace halfbyte::cpu
#endif
