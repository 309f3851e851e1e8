// rope_tables, ragged_positions, rope. The angle is inv_freq * position rounded to fp32, as transformers
// makes it; its cosine and sine are exact to one rounding. A pair (a, b) becomes (a c - b s, b c + a s), each
// product rounded once in fp32. Fast for pairs half a head apart, where both halves are contiguous.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_backend.h"
#include "pool.h"
#include "ragged.h"

#define HALFBYTE_FILE "rope.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

/// One token: `heads` heads of `dim` elements, `half` pairs turned, the rest copied. y may be x.
static void rope_token(DType dtype, void* out, const void* in, const float* cos, const float* sin,
                       int64_t heads, int64_t dim, int64_t half, bool interleaved) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(out);
    const T* x = static_cast<const T*>(in);
    for (int64_t h = 0; h < heads; ++h, x += dim, y += dim) {
      if (interleaved) {
        for (int64_t i = 0; i < half; ++i) {
          T pair[2];
          __builtin_memcpy(pair, x + 2 * i, sizeof pair);
          const float a = to_float(pair[0]), b = to_float(pair[1]);
          from_float(a * cos[i] - b * sin[i], &pair[0]);
          from_float(b * cos[i] + a * sin[i], &pair[1]);
          __builtin_memcpy(y + 2 * i, pair, sizeof pair);
        }
      } else {
        int64_t i = 0;
        for (; i + W <= half; i += W) {
          const F a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
          store(y + i, sub(mul(a, c), mul(b, s)));
          store(y + half + i, add(mul(b, c), mul(a, s)));
        }
        if (i < half) {
          const int64_t n = half - i;
          const F a = load_n(x + i, n), b = load_n(x + half + i, n);
          const F c = load_n(cos + i, n), s = load_n(sin + i, n);
          store_n(y + i, sub(mul(a, c), mul(b, s)), n);
          store_n(y + half + i, add(mul(b, c), mul(a, s)), n);
        }
      }
      if (y != x) {
        __builtin_memcpy(y + 2 * half, x + 2 * half, static_cast<size_t>(dim - 2 * half) * sizeof(T));
      }
    }
  });
}

/// A position without a row in the tables: NaN where it would have been turned.
static void rope_unknown(DType dtype, void* out, const void* in, int64_t heads, int64_t dim, int64_t half) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T nan;
    from_float(__builtin_nanf(""), &nan);
    for (int64_t h = 0; h < heads; ++h) {
      T* y = static_cast<T*>(out) + h * dim;
      const T* x = static_cast<const T*>(in) + h * dim;
      for (int64_t i = 0; i < 2 * half; ++i) __builtin_memcpy(y + i, &nan, sizeof nan);
      if (y != x) {
        __builtin_memcpy(y + 2 * half, x + 2 * half, static_cast<size_t>(dim - 2 * half) * sizeof(T));
      }
    }
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {

Status CpuBackend::rope_tables(Queue, View cos, View sin, View inv_freq, float scale) {
  if (cos.dtype != DType::f32 || sin.dtype != DType::f32 || inv_freq.dtype != DType::f32) {
    return refuse_dtype("rope_tables", "tables and inv_freq must be float32");
  }
  const int64_t half = inv_freq.size();
  if (cos.ndim != 2 || cos.shape[1] != half || sin.size() != cos.size()) {
    return refuse("rope_tables", "tables must be [positions, inv_freq]");
  }
  if (!cos.is_contiguous() || !sin.is_contiguous() || !inv_freq.is_contiguous()) {
    return refuse("rope_tables", "operands must be contiguous");
  }
  if (half == 0) return {};
  parallel_for(cos.shape[0], 1 + 4096 / half, [&](int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; ++position) {
      for (int64_t i = 0; i < half; ++i) {
        // through double: correctly rounded but for a few cases in a billion, whatever the C library
        const float angle = static_cast<float>(position) * get(inv_freq.as<const float>() + i);
        const int64_t at = position * half + i;
        put(cos.as<float>() + at, static_cast<float>(std::cos(static_cast<double>(angle))) * scale);
        put(sin.as<float>() + at, static_cast<float>(std::sin(static_cast<double>(angle))) * scale);
      }
    }
  });
  return {};
}

Status CpuBackend::ragged_positions(Queue, View positions, const RaggedBatch& batch) {
  if (Status status = check_ragged("ragged_positions", batch); !status.ok()) return status;
  if (positions.dtype != DType::i32) return refuse_dtype("ragged_positions", "positions must be int32");
  if (!positions.is_contiguous()) return refuse("ragged_positions", "positions must be contiguous");
  const int64_t tokens = positions.size();
  int32_t* out = positions.as<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) put(out + t, int32_t{-1});  // tokens that belong to no sequence
  Ragged(batch).each(tokens, [&](int64_t, int64_t begin, int64_t end, int64_t position) {
    for (int64_t t = begin; t < end; ++t) put(out + t, static_cast<int32_t>(position + t - begin));
  });
  return {};
}

Status CpuBackend::rope(Queue, View y, View x, View cos, View sin, View positions, bool interleaved) {
  if (!is_token_rows(x) || !is_token_rows(y) || x.size() != y.size() || x.shape[0] != y.shape[0]) {
    return refuse("rope", "x and y must be [tokens, heads, head_dim] with contiguous heads");
  }
  if (y.dtype != x.dtype || !is_float(x.dtype) || cos.dtype != DType::f32 || sin.dtype != DType::f32 ||
      positions.dtype != DType::i32) {
    return refuse_dtype("rope", "x and y must be of one float dtype, tables float32, positions int32");
  }
  const int64_t tokens = x.shape[0], heads = x.shape[1], dim = x.shape[2];
  if (cos.ndim != 2 || cos.shape[1] * 2 > dim || sin.size() != cos.size() || positions.size() < tokens) {
    return refuse("rope", "tables or positions do not fit x");
  }
  if (!cos.is_contiguous() || !sin.is_contiguous() || !positions.is_contiguous()) {
    return refuse("rope", "tables and positions must be contiguous");
  }
  if (x.size() == 0) return {};
  const auto turn = HALFBYTE_PICK(rope_token);
  const auto unknown = HALFBYTE_PICK(rope_unknown);
  const int64_t half = cos.shape[1], bytes = size_of(x.dtype);
  parallel_for(tokens, 1 + 16384 / (heads * dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      void* out = y.as<char>() + t * y.strides[0] * bytes;
      const void* in = x.as<const char>() + t * x.strides[0] * bytes;
      const int64_t position = get(positions.as<const int32_t>() + t);
      if (position < 0 || position >= cos.shape[0]) {
        unknown(x.dtype, out, in, heads, dim, half);
      } else {
        turn(x.dtype, out, in, cos.as<const float>() + position * half,
             sin.as<const float>() + position * half, heads, dim, half, interleaved);
      }
    }
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
