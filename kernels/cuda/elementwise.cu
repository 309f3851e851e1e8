// fill, copy, binary, activation, gated_activation.
//
// Views are reduced to as few dimensions as their strides allow. One dimension of stride 1 on every side (the
// usual case) runs in 16-byte vectors when addresses and length allow; all else runs an element a thread,
// with the index taken apart by division.
#include "activation.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;

template <int N>
__device__ __forceinline__ void offsets(int64_t index, const Extent& e, const Strides (&strides)[N],
                                        int64_t (&out)[N]) {
  for (int i = 0; i < N; ++i) out[i] = 0;
  for (int d = e.ndim - 1; d >= 0; --d) {
    const int64_t at = d > 0 ? index % e.shape[d] : index;
    index /= e.shape[d];
    for (int i = 0; i < N; ++i) out[i] += at * strides[i].s[d];
  }
}

template <int N>
struct StridesOf {
  Strides s[N];
};

// ---- any dtype to any dtype, through the widest type that holds both exactly enough
// -----------------------------

struct Scalar {
  bool integer;
  int64_t i;
  double f;
};

__device__ __forceinline__ Scalar load_any(DType dtype, const void* p, int64_t at) {
  switch (dtype) {
    case DType::f32:
      return {false, 0, static_cast<const float*>(p)[at]};
    case DType::f16:
      return {false, 0, __half2float(static_cast<const half_t*>(p)[at])};
    case DType::bf16:
      return {false, 0, __bfloat162float(static_cast<const bf16_t*>(p)[at])};
    case DType::i8:
      return {true, static_cast<const int8_t*>(p)[at], 0};
    case DType::u8:
      return {true, static_cast<const uint8_t*>(p)[at], 0};
    case DType::i32:
      return {true, static_cast<const int32_t*>(p)[at], 0};
    default:
      return {true, static_cast<const int64_t*>(p)[at], 0};
  }
}

/// A float truncates towards zero and saturates, NaN gives 0; an integer keeps its low bits.
template <typename I>
__device__ __forceinline__ I to_integer(Scalar x, int64_t low, int64_t high) {
  if (x.integer) return static_cast<I>(x.i);
  if (isnan(x.f)) return 0;
  if (x.f <= static_cast<double>(low)) return static_cast<I>(low);
  if (x.f >= static_cast<double>(high)) return static_cast<I>(high);
  return static_cast<I>(static_cast<int64_t>(x.f));
}

__device__ __forceinline__ void store_any(DType dtype, void* p, int64_t at, Scalar x) {
  const float f = x.integer ? static_cast<float>(x.i) : static_cast<float>(x.f);
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(p)[at] = f;
      return;
    case DType::f16:
      static_cast<half_t*>(p)[at] = __float2half_rn(f);
      return;
    case DType::bf16:
      static_cast<bf16_t*>(p)[at] = __float2bfloat16_rn(f);
      return;
    case DType::i8:
      static_cast<int8_t*>(p)[at] = to_integer<int8_t>(x, -128, 127);
      return;
    case DType::u8:
      static_cast<uint8_t*>(p)[at] = to_integer<uint8_t>(x, 0, 255);
      return;
    case DType::i32:
      static_cast<int32_t*>(p)[at] = to_integer<int32_t>(x, INT32_MIN, INT32_MAX);
      return;
    default:
      static_cast<int64_t*>(p)[at] = to_integer<int64_t>(x, INT64_MIN, INT64_MAX);
  }
}

__global__ void fill_kernel(void* y, DType dtype, double value, Extent e, StridesOf<1> strides) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < e.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t at[1];
    offsets(i, e, strides.s, at);
    store_any(dtype, y, at[0], {false, 0, value});
  }
}

__global__ void convert_kernel(void* y, DType to, const void* x, DType from, Extent e, StridesOf<2> strides) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < e.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t at[2];
    offsets(i, e, strides.s, at);
    store_any(to, y, at[0], load_any(from, x, at[1]));
  }
}

/// Same-size elements moved as bits: T is an unsigned integer of the element's size.
template <typename T>
__global__ void move_kernel(T* y, const T* x, Extent e, StridesOf<2> strides) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < e.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t at[2];
    offsets(i, e, strides.s, at);
    y[at[0]] = x[at[1]];
  }
}

/// Float to float, contiguous, 4 elements a thread and step.
template <typename To, typename From>
__global__ void cast_kernel(To* __restrict__ y, const From* __restrict__ x, int64_t n) {
  for (int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 4; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x * 4) {
    if (i + 4 <= n) {
      const auto in = *reinterpret_cast<const Vec<From, 4>*>(x + i);
      Vec<To, 4> out;
#pragma unroll
      for (int j = 0; j < 4; ++j) out.v[j] = from_float<To>(to_float(in.v[j]));
      *reinterpret_cast<Vec<To, 4>*>(y + i) = out;
    } else {
      for (int64_t j = i; j < n; ++j) y[j] = from_float<To>(to_float(x[j]));
    }
  }
}

// ---- arithmetic
// -------------------------------------------------------------------------------------------------

template <Binary op, typename T>
__device__ __forceinline__ T apply(T a, T b) {
  if constexpr (op == Binary::add) return a + b;
  if constexpr (op == Binary::sub) return a - b;
  if constexpr (op == Binary::mul) return a * b;
  if constexpr (op == Binary::div) {
    if constexpr (std::is_same_v<T, int32_t>)
      return b == 0 ? 0 : (b == -1 ? static_cast<int32_t>(0u - static_cast<uint32_t>(a)) : a / b);
    else
      return a / b;
  }
  if constexpr (op == Binary::min) return a != a ? a : b != b ? b : (a < b ? a : b);
  return a != a ? a : b != b ? b : (a > b ? a : b);
}

template <Binary op, typename T>
__device__ __forceinline__ T apply_as(T a, T b) {
  if constexpr (std::is_same_v<T, int32_t>)
    return apply<op>(a, b);
  else
    return from_float<T>(apply<op>(to_float(a), to_float(b)));
}

template <Binary op, typename T>
__global__ void binary_vector_kernel(T* y, const T* a, const T* b, int64_t n) {
  constexpr int N = 16 / sizeof(T);
  for (int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x * N) {
    if (i + N <= n) {
      const auto u = *reinterpret_cast<const Vec<T, N>*>(a + i);
      const auto v = *reinterpret_cast<const Vec<T, N>*>(b + i);
      Vec<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.v[j] = apply_as<op>(u.v[j], v.v[j]);
      *reinterpret_cast<Vec<T, N>*>(y + i) = out;
    } else {
      for (int64_t j = i; j < n; ++j) y[j] = apply_as<op>(a[j], b[j]);
    }
  }
}

template <Binary op, typename T>
__global__ void binary_kernel(T* y, const T* a, const T* b, Extent e, StridesOf<3> strides) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < e.size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t at[3];
    offsets(i, e, strides.s, at);
    y[at[0]] = apply_as<op>(a[at[1]], b[at[2]]);
  }
}

/// y = act(x), or act(x) * up with `up`; rows of x and up may be strided. N elements a thread and step.
template <typename T, int N>
__global__ void activation_kernel(T* y, const T* x, const T* up, int64_t rows, int64_t cols, int64_t x_stride,
                                  int64_t up_stride, Activation act) {
  const int64_t steps = cols / N, total = rows * steps;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / steps, col = i % steps * N;
    const auto in = *reinterpret_cast<const Vec<T, N>*>(x + row * x_stride + col);
    Vec<T, N> factor{};
    if (up) factor = *reinterpret_cast<const Vec<T, N>*>(up + row * up_stride + col);
    Vec<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = activate<sizeof(T) == 2>(act, to_float(in.v[j]));
      if (up) value *= to_float(factor.v[j]);
      out.v[j] = from_float<T>(value);
    }
    *reinterpret_cast<Vec<T, N>*>(y + row * cols + col) = out;
  }
}

template <typename T>
void launch_activation(cudaStream_t stream, View y, View x, View up, int64_t rows, int64_t cols,
                       int64_t x_stride, int64_t up_stride, Activation act) {
  constexpr int N = 16 / sizeof(T);
  const bool wide = cols % N == 0 && x_stride % N == 0 && up_stride % N == 0 && is_aligned(x.data, 16) &&
                    is_aligned(y.data, 16) && (!up || is_aligned(up.data, 16));
  const T* factor = up ? up.as<const T>() : nullptr;
  if (wide) {
    activation_kernel<T, N><<<blocks_for(rows * cols, kThreads * N), kThreads, 0, stream>>>(
        y.as<T>(), x.as<const T>(), factor, rows, cols, x_stride, up_stride, act);
  } else {
    activation_kernel<T, 1><<<blocks_for(rows * cols, kThreads), kThreads, 0, stream>>>(
        y.as<T>(), x.as<const T>(), factor, rows, cols, x_stride, up_stride, act);
  }
}

template <Binary op, typename T>
void launch_binary(cudaStream_t stream, View y, View a, View b) {
  const View views[3] = {y, a, b};
  StridesOf<3> strides{};
  const Extent e = join_dims(views, strides.s);
  const bool flat = e.ndim == 1 && strides.s[0].s[0] == 1 && strides.s[1].s[0] == 1 && strides.s[2].s[0] == 1;
  if (flat && is_aligned(y.data, 16) && is_aligned(a.data, 16) && is_aligned(b.data, 16)) {
    binary_vector_kernel<op, T><<<blocks_for(e.size, kThreads * (16 / sizeof(T))), kThreads, 0, stream>>>(
        y.as<T>(), a.as<const T>(), b.as<const T>(), e.size);
  } else {
    binary_kernel<op, T><<<blocks_for(e.size, kThreads), kThreads, 0, stream>>>(y.as<T>(), a.as<const T>(),
                                                                                b.as<const T>(), e, strides);
  }
}

template <typename T>
void launch_binary(cudaStream_t stream, View y, View a, View b, Binary op) {
  switch (op) {
    case Binary::add:
      return launch_binary<Binary::add, T>(stream, y, a, b);
    case Binary::sub:
      return launch_binary<Binary::sub, T>(stream, y, a, b);
    case Binary::mul:
      return launch_binary<Binary::mul, T>(stream, y, a, b);
    case Binary::div:
      return launch_binary<Binary::div, T>(stream, y, a, b);
    case Binary::min:
      return launch_binary<Binary::min, T>(stream, y, a, b);
    case Binary::max:
      return launch_binary<Binary::max, T>(stream, y, a, b);
  }
}

bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
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
  const Extent e = join_dims(views, strides.s);
  fill_kernel<<<blocks_for(e.size, kThreads), kThreads, 0, stream(queue)>>>(y.data, y.dtype, value, e,
                                                                            strides);
  return check(cudaGetLastError(), "fill");
}

Status CudaBackend::copy(Queue queue, View y, View x) {
  if (Status status = enter(); !status.ok()) return status;
  if (!same_shape(y, x)) return refuse("copy", "the shapes differ");
  if (y.size() == 0) return {};
  const View views[2] = {y, x};
  StridesOf<2> strides{};
  const Extent e = join_dims(views, strides.s);
  const unsigned blocks = blocks_for(e.size, kThreads);
  const bool flat = e.ndim == 1 && strides.s[0].s[0] == 1 && strides.s[1].s[0] == 1;
  if (y.dtype == x.dtype) {
    if (flat) {
      return check(
          cudaMemcpyAsync(y.data, x.data, e.size * size_of(y.dtype), cudaMemcpyDeviceToDevice, stream(queue)),
          "copy");
    }
    switch (size_of(y.dtype)) {
      case 1:
        move_kernel<<<blocks, kThreads, 0, stream(queue)>>>(y.as<uint8_t>(), x.as<const uint8_t>(), e,
                                                            strides);
        break;
      case 2:
        move_kernel<<<blocks, kThreads, 0, stream(queue)>>>(y.as<uint16_t>(), x.as<const uint16_t>(), e,
                                                            strides);
        break;
      case 4:
        move_kernel<<<blocks, kThreads, 0, stream(queue)>>>(y.as<uint32_t>(), x.as<const uint32_t>(), e,
                                                            strides);
        break;
      default:
        move_kernel<<<blocks, kThreads, 0, stream(queue)>>>(y.as<uint64_t>(), x.as<const uint64_t>(), e,
                                                            strides);
    }
  } else if (flat && is_float(y.dtype) && is_float(x.dtype) && is_aligned(y.data, 16) &&
             is_aligned(x.data, 16)) {
    with_float_type(y.dtype, [&](auto* to) {
      with_float_type(x.dtype, [&](auto* from) {
        using To = std::remove_pointer_t<decltype(to)>;
        using From = std::remove_pointer_t<decltype(from)>;
        if constexpr (!std::is_same_v<To, From>) {
          cast_kernel<<<blocks_for(e.size, kThreads * 4), kThreads, 0, stream(queue)>>>(
              y.as<To>(), x.as<const From>(), e.size);
        }
      });
    });
  } else {
    convert_kernel<<<blocks, kThreads, 0, stream(queue)>>>(y.data, y.dtype, x.data, x.dtype, e, strides);
  }
  return check(cudaGetLastError(), "copy");
}

Status CudaBackend::binary(Queue queue, View y, View a, View b, Binary op) {
  if (Status status = enter(); !status.ok()) return status;
  if (!same_shape(y, a) || !same_shape(y, b)) return refuse("binary", "the shapes differ");
  if (y.dtype != a.dtype || y.dtype != b.dtype || !(is_float(y.dtype) || y.dtype == DType::i32)) {
    return refuse_dtype("binary", "operands must be of one dtype, float or int32");
  }
  if (y.size() == 0) return {};
  if (y.dtype == DType::i32) {
    launch_binary<int32_t>(stream(queue), y, a, b, op);
  } else {
    with_float_type(y.dtype, [&](auto* p) {
      launch_binary<std::remove_pointer_t<decltype(p)>>(stream(queue), y, a, b, op);
    });
  }
  return check(cudaGetLastError(), "binary");
}

Status CudaBackend::activation(Queue queue, View y, View x, Activation act) {
  if (Status status = enter(); !status.ok()) return status;
  if (!same_shape(y, x) || !y.is_contiguous() || !x.is_contiguous()) {
    return refuse("activation", "x and y must be contiguous and of one shape");
  }
  if (y.dtype != x.dtype || !is_float(y.dtype))
    return refuse_dtype("activation", "x and y must be of one float dtype");
  const int64_t n = y.size();
  if (n == 0) return {};
  // one long row
  with_float_type(y.dtype, [&](auto* p) {
    launch_activation<std::remove_pointer_t<decltype(p)>>(stream(queue), y, x, View{}, 1, n, 0, 0, act);
  });
  return check(cudaGetLastError(), "activation");
}

Status CudaBackend::gated_activation(Queue queue, View y, View gate, View up, Activation act) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.ndim != 2 || !same_shape(y, gate) || !same_shape(y, up) || !y.is_contiguous()) {
    return refuse("gated_activation", "gate, up and y must be [M, N]");
  }
  if (y.dtype != gate.dtype || y.dtype != up.dtype || !is_float(y.dtype)) {
    return refuse_dtype("gated_activation", "gate, up and y must be of one float dtype");
  }
  const int64_t rows = y.shape[0], cols = y.shape[1];
  if (rows * cols == 0) return {};
  if (cols > 1 && (gate.strides[1] != 1 || up.strides[1] != 1)) {
    return refuse("gated_activation", "the rows of gate and up must be contiguous");
  }
  with_float_type(y.dtype, [&](auto* p) {
    launch_activation<std::remove_pointer_t<decltype(p)>>(stream(queue), y, gate, up, rows, cols,
                                                          gate.strides[0], up.strides[0], act);
  });
  return check(cudaGetLastError(), "gated_activation");
}

}  // namespace halfbyte::cuda
