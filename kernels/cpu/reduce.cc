// mean and count_nonfinite over all elements. The order of the mean's sum does not depend on the number of
// threads: it is taken by pieces of fixed size, in double.
#include <cstring>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

namespace halfbyte::cpu {
namespace {

constexpr int64_t kPiece = 65536;

/// Sums body(begin, end) over pieces of n elements, in rounds of at most 256 pieces, in order.
template <typename Sum, typename Body>
Sum sum_pieces(int64_t n, const Body& body) {
  constexpr int64_t kRound = 256;
  Sum partial[kRound];
  Sum total = 0;
  for (int64_t start = 0; start < n; start += kRound * kPiece) {
    const int64_t left = n - start;
    const int64_t pieces = left < kRound * kPiece ? (left + kPiece - 1) / kPiece : kRound;
    parallel_for(pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t begin = start + piece * kPiece;
        partial[piece] = body(begin, begin + kPiece < n ? begin + kPiece : n);
      }
    });
    for (int64_t piece = 0; piece < pieces; ++piece) total += partial[piece];
  }
  return total;
}

}  // namespace

Status CpuBackend::mean(Queue, View y, View x, View) {
  if (x.dtype != DType::f32 || y.dtype != DType::f32) return refuse_dtype("mean", "operands must be float32");
  if (y.size() != 1 || !x.is_contiguous()) return refuse("mean", "y must have one element, x be contiguous");
  const float* p = x.as<float>();
  const double sum = sum_pieces<double>(x.size(), [&](int64_t begin, int64_t end) {
    double part[4] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      for (int lane = 0; lane < 4; ++lane) part[lane] += get(p + i + lane);
    }
    for (; i < end; ++i) part[0] += get(p + i);
    return (part[0] + part[1]) + (part[2] + part[3]);
  });
  put(y.as<float>(), static_cast<float>(sum / static_cast<double>(x.size())));
  return {};
}

Status CpuBackend::count_nonfinite(Queue, View y, View x) {
  if (!is_float(x.dtype) || y.dtype != DType::i32) {
    return refuse_dtype("count_nonfinite", "x must be of a float dtype and y int32");
  }
  if (y.size() != 1 || !x.is_contiguous())
    return refuse("count_nonfinite", "y must have one element, x be contiguous");
  const int64_t count = with_float_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const Bits exponent = sizeof(T) == 4           ? static_cast<Bits>(0x7f800000u)
                          : std::is_same_v<T, F16> ? static_cast<Bits>(0x7c00u)
                                                   : static_cast<Bits>(0x7f80u);
    const char* p = x.as<const char>();
    return sum_pieces<int64_t>(x.size(), [&](int64_t begin, int64_t end) {
      int32_t found = 0;
      for (int64_t i = begin; i < end; ++i) {
        Bits bits;
        std::memcpy(&bits, p + i * static_cast<int64_t>(sizeof bits), sizeof bits);
        found += static_cast<Bits>(bits & exponent) == exponent;
      }
      return static_cast<int64_t>(found);
    });
  });
  put(y.as<int32_t>(), count > INT32_MAX ? INT32_MAX : static_cast<int32_t>(count));
  return {};
}

}  // namespace halfbyte::cpu
