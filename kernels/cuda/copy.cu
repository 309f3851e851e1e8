// fill and copy: any strides, any dtype to any dtype.
//
// Views are reduced to as few dimensions as their strides allow. Elements of one size move as bits, as many
// of them at a time (up to 16 bytes) as lie side by side on both sides. Where the dimension that is
// contiguous in y is not the one that is contiguous in x, squares of 64 x 64 elements turn round in shared
// memory. Between float types 4 elements are converted at a time where they lie side by side; what is left
// goes an element at a time, with the types told apart as it runs.
#include "strided.cuh"

namespace halfbyte::cuda {
namespace {

// ---- any dtype to any dtype, by way of int64 or float
// ------------------------------------------------------------

/// A float truncates towards zero and saturates, NaN gives 0.
template <typename I, typename F>
__host__ __device__ __forceinline__ I to_integer(F x) {
  constexpr I low = static_cast<I>(std::is_signed_v<I> ? I{1} << (8 * sizeof(I) - 1) : I{0});
  constexpr I high = static_cast<I>(~low);
  if (x != x) return 0;
  if (x <= static_cast<F>(low)) return low;
  if (x >= static_cast<F>(high)) return high;
  return static_cast<I>(x);
}

uint64_t bits_of(DType dtype, double value) {
  switch (dtype) {
    case DType::f32:
      return float_to_bits(static_cast<float>(value));
    case DType::f16:
      return float_to_f16(static_cast<float>(value));
    case DType::bf16:
      return float_to_bf16(static_cast<float>(value));
    case DType::i8:
      return static_cast<uint8_t>(to_integer<int8_t>(value));
    case DType::u8:
      return to_integer<uint8_t>(value);
    case DType::i32:
      return static_cast<uint32_t>(to_integer<int32_t>(value));
    default:
      return static_cast<uint64_t>(to_integer<int64_t>(value));
  }
}

template <int N>
struct Numbers {
  bool integers;
  int64_t i[N];
  float f[N];
};

template <typename T, int N>
__device__ __forceinline__ void load_as(const void* p, int64_t at, Numbers<N>* out) {
  const auto some = *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(p) + at);
  out->integers = std::is_integral_v<T>;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (std::is_integral_v<T>)
      out->i[j] = some.v[j];
    else
      out->f[j] = to_float(some.v[j]);
  }
}
template <typename T, int N>
__device__ __forceinline__ void store_as(void* p, int64_t at, const Numbers<N>& numbers) {
  Vec<T, N> some;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (std::is_integral_v<T>)  // an integer keeps its low bits
      some.v[j] = numbers.integers ? static_cast<T>(numbers.i[j]) : to_integer<T>(numbers.f[j]);
    else
      some.v[j] = from_float<T>(numbers.integers ? static_cast<float>(numbers.i[j]) : numbers.f[j]);
  }
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(p) + at) = some;
}

/// Calls body with a null pointer of the device's type for any dtype.
template <typename Body>
__device__ __forceinline__ void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::f16:
      return body(static_cast<half_t*>(nullptr));
    case DType::bf16:
      return body(static_cast<bf16_t*>(nullptr));
    case DType::i8:
      return body(static_cast<int8_t*>(nullptr));
    case DType::u8:
      return body(static_cast<uint8_t*>(nullptr));
    case DType::i32:
      return body(static_cast<int32_t*>(nullptr));
    default:
      return body(static_cast<int64_t*>(nullptr));
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kStridedThreads)
    fill_kernel(T* y, T value, Extent e, StridesOf<1> strides) {
  Vec<T, N> all;
#pragma unroll
  for (int j = 0; j < N; ++j) all.v[j] = value;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) return;
    int64_t at[1];
    offsets(strided_index(i), e, strides.s, at);
    *reinterpret_cast<Vec<T, N>*>(y + at[0]) = all;
  }
}

template <int N>
__global__ void __launch_bounds__(kStridedThreads)
    convert_any_kernel(void* y, DType to, const void* x, DType from, Extent e, StridesOf<2> strides) {
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) return;
    int64_t at[2];
    offsets(strided_index(i), e, strides.s, at);
    Numbers<N> numbers;
    with_type(from, [&](auto* p) { load_as<std::remove_pointer_t<decltype(p)>>(x, at[1], &numbers); });
    with_type(to, [&](auto* p) { store_as<std::remove_pointer_t<decltype(p)>>(y, at[0], numbers); });
  }
}

template <typename To, typename From, int N>
__global__ void __launch_bounds__(kStridedThreads)
    convert_kernel(To* y, const From* x, Extent e, StridesOf<2> strides) {
  int64_t at[kInFlight][2];
  Vec<From, N> in[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    offsets(strided_index(i), e, strides.s, at[i]);
    in[i] = *reinterpret_cast<const Vec<From, N>*>(x + at[i][1]);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    Vec<To, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = from_float<To>(to_float(in[i].v[j]));
    *reinterpret_cast<Vec<To, N>*>(y + at[i][0]) = out;
  }
}

// ---- elements of one size
// ----------------------------------------------------------------------------------------

/// Unit: an element, or some that lie side by side.
template <typename Unit>
__global__ void __launch_bounds__(kStridedThreads)
    move_kernel(Unit* y, const Unit* x, Extent e, StridesOf<2> strides) {
  int64_t at[kInFlight][2];
  Unit unit[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    offsets(strided_index(i), e, strides.s, at[i]);
    unit[i] = x[at[i][1]];
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    y[at[i][0]] = unit[i];
  }
}

constexpr int kSquare = 64;

/// Dimension 0 of `square` is contiguous in y, dimension 1 in x; `rest` are the others.
struct Turn {
  int64_t shape[2];
  int64_t y_stride;  // of dimension 1
  int64_t x_stride;  // of dimension 0
  int64_t squares[2];
  Extent rest;
  StridesOf<2> rest_strides;
};

template <typename T>
__global__ void __launch_bounds__(kStridedThreads) turn_kernel(T* y, const T* x, Turn turn) {
  constexpr int kWarps = kStridedThreads / 32;
  // rows apart by an odd number of words, so that a column lies in all banks
  __shared__ T square[kSquare][kSquare + (sizeof(T) < 4 ? 4 / sizeof(T) : 1)];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t at[2];
  int64_t block = blockIdx.x;
  const int64_t first1 = block % turn.squares[1] * kSquare;
  block /= turn.squares[1];
  const int64_t first0 = block % turn.squares[0] * kSquare;
  offsets(block / turn.squares[0], turn.rest, turn.rest_strides.s, at);
  y += at[0];
  x += at[1];
  T in[kSquare / kWarps][2];
#pragma unroll
  for (int r = 0; r < kSquare / kWarps; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first0 + r * kWarps + warp, j = first1 + h * 32 + lane;
      if (i < turn.shape[0] && j < turn.shape[1]) in[r][h] = x[i * turn.x_stride + j];
    }
  }
#pragma unroll
  for (int r = 0; r < kSquare / kWarps; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) square[r * kWarps + warp][h * 32 + lane] = in[r][h];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kSquare / kWarps; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first0 + h * 32 + lane, j = first1 + r * kWarps + warp;
      if (i < turn.shape[0] && j < turn.shape[1])
        y[j * turn.y_stride + i] = square[h * 32 + lane][r * kWarps + warp];
    }
  }
}

/// Whether the views are such that squares pay, and how they are to be gone over.
bool make_turn(const Extent& e, const StridesOf<2>& strides, Turn* turn) {
  int dims[2] = {-1, -1};
  for (int d = 0; d < e.ndim; ++d) {
    for (int i = 0; i < 2; ++i) {
      if (strides.s[i].s[d] == 1 && e.shape[d] >= 16) dims[i] = d;
    }
  }
  if (dims[0] < 0 || dims[1] < 0 || dims[0] == dims[1]) return false;
  turn->y_stride = strides.s[0].s[dims[1]];
  turn->x_stride = strides.s[1].s[dims[0]];
  for (int i = 0; i < 2; ++i) {
    turn->shape[i] = e.shape[dims[i]];
    turn->squares[i] = (e.shape[dims[i]] + kSquare - 1) / kSquare;
  }
  Extent& rest = turn->rest;
  rest = {};
  for (int d = 0; d < e.ndim; ++d) {
    if (d == dims[0] || d == dims[1]) continue;
    rest.shape[rest.ndim] = e.shape[d];
    for (int i = 0; i < 2; ++i) turn->rest_strides.s[i].s[rest.ndim] = strides.s[i].s[d];
    ++rest.ndim;
  }
  if (rest.ndim == 0) {
    rest.ndim = 1;
    rest.shape[0] = 1;
  }
  rest.settle();
  return turn->squares[0] * turn->squares[1] * rest.size <= INT32_MAX;
}

/// Calls body with a null pointer of the unsigned type of a size.
template <typename Body>
void with_unit(int64_t size, const Body& body) {
  switch (size) {
    case 1:
      return body(static_cast<uint8_t*>(nullptr));
    case 2:
      return body(static_cast<uint16_t*>(nullptr));
    case 4:
      return body(static_cast<uint32_t*>(nullptr));
    case 8:
      return body(static_cast<uint64_t*>(nullptr));
    default:
      return body(static_cast<uint4*>(nullptr));
  }
}

void move(cudaStream_t stream, const View& y, const View& x, Extent e, StridesOf<2> strides) {
  const int64_t size = size_of(y.dtype);
  Turn turn{};
  if (make_turn(e, strides, &turn)) {
    with_unit(size, [&](auto* p) {
      using T = std::remove_pointer_t<decltype(p)>;
      if constexpr (sizeof(T) <= 8) {
        const auto blocks = static_cast<unsigned>(turn.squares[0] * turn.squares[1] * turn.rest.size);
        turn_kernel<T><<<blocks, kStridedThreads, 0, stream>>>(y.as<T>(), x.as<const T>(), turn);
      }
    });
    return;
  }
  const View views[2] = {y, x};
  int64_t count = 1;
  if (strides.s[0].s[0] == 1 && strides.s[1].s[0] == 1) {
    for (count = 16 / size; count > 1; count /= 2) {
      if (group_elements(&e, strides.s, views, static_cast<int>(count))) break;
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int d = 0; d < e.ndim; ++d) strides.s[i].s[d] /= count;  // in units
  }
  with_unit(size * count, [&](auto* p) {
    using Unit = std::remove_pointer_t<decltype(p)>;
    move_kernel<Unit>
        <<<strided_blocks(e), kStridedThreads, 0, stream>>>(y.as<Unit>(), x.as<const Unit>(), e, strides);
  });
}

}  // namespace

Status CudaBackend::fill(Queue queue, View y, double value) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.size() == 0) return {};
  if (y.is_contiguous() && (value == 0.0 && !std::signbit(value))) {
    return check(cudaMemsetAsync(y.data, 0, y.size() * size_of(y.dtype), stream(queue)), "fill");
  }
  const View views[1] = {y};
  StridesOf<1> strides{};
  Extent e = join_dims(views, strides.s);
  const uint64_t bits = bits_of(y.dtype, value);
  with_unit(size_of(y.dtype), [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    if constexpr (sizeof(T) <= 8) {
      constexpr int N = 16 / sizeof(T);
      const bool wide = strides.s[0].s[0] == 1 && group_elements(&e, strides.s, views, N);
      const auto kernel = wide ? fill_kernel<T, N> : fill_kernel<T, 1>;
      kernel<<<strided_blocks(e), kStridedThreads, 0, stream(queue)>>>(y.as<T>(), static_cast<T>(bits), e,
                                                                       strides);
    }
  });
  return check(cudaGetLastError(), "fill");
}

Status CudaBackend::copy(Queue queue, View y, View x) {
  if (Status status = enter(); !status.ok()) return status;
  if (!same_shape(y, x)) return refuse("copy", "the shapes differ");
  if (y.size() == 0) return {};
  const View views[2] = {y, x};
  StridesOf<2> strides{};
  Extent e = join_dims(views, strides.s);
  const bool side_by_side = strides.s[0].s[0] == 1 && strides.s[1].s[0] == 1;
  if (y.dtype == x.dtype) {
    if (side_by_side && e.ndim == 1) {
      return check(
          cudaMemcpyAsync(y.data, x.data, e.size * size_of(y.dtype), cudaMemcpyDeviceToDevice, stream(queue)),
          "copy");
    }
    move(stream(queue), y, x, e, strides);
  } else if (is_float(y.dtype) && is_float(x.dtype)) {
    const bool wide = side_by_side && group_elements(&e, strides.s, views, 4);
    with_float_type(y.dtype, [&](auto* to) {
      with_float_type(x.dtype, [&](auto* from) {
        using To = std::remove_pointer_t<decltype(to)>;
        using From = std::remove_pointer_t<decltype(from)>;
        if constexpr (!std::is_same_v<To, From>) {
          const auto kernel = wide ? convert_kernel<To, From, 4> : convert_kernel<To, From, 1>;
          kernel<<<strided_blocks(e), kStridedThreads, 0, stream(queue)>>>(y.as<To>(), x.as<const From>(), e,
                                                                           strides);
        }
      });
    });
  } else {
    const auto kernel = side_by_side && group_elements(&e, strides.s, views, 4) ? convert_any_kernel<4>
                                                                                : convert_any_kernel<1>;
    kernel<<<strided_blocks(e), kStridedThreads, 0, stream(queue)>>>(y.data, y.dtype, x.data, x.dtype, e,
                                                                     strides);
  }
  return check(cudaGetLastError(), "copy");
}

}  // namespace halfbyte::cuda
