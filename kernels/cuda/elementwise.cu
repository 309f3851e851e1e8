// binary, activation, gated_activation.
//
// Operands of binary are reduced to as few dimensions as their strides allow. Where the last one has stride
// 1, or 0 for an operand that is repeated along it, 16 bytes are taken at a time; all else runs an element at
// a time. Activations run on rows in 16-byte vectors.
#include "activation.cuh"
#include "strided.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;

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

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_group(const T* x, bool repeated) {
  if (!repeated) return *reinterpret_cast<const Vec<T, N>*>(x);
  Vec<T, N> all;
#pragma unroll
  for (int j = 0; j < N; ++j) all.v[j] = *x;
  return all;
}

/// Groups of N elements; `repeated`: one element of the operand is for all of a group.
template <Binary op, typename T, int N>
__global__ void __launch_bounds__(kStridedThreads)
    binary_kernel(T* y, const T* a, const T* b, Extent e, StridesOf<3> strides, bool a_repeated,
                  bool b_repeated) {
  int64_t at[kInFlight][3];
  Vec<T, N> u[kInFlight], v[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    offsets(strided_index(i), e, strides.s, at[i]);
    u[i] = load_group<T, N>(a + at[i][1], a_repeated);
    v[i] = load_group<T, N>(b + at[i][2], b_repeated);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= e.size) break;
    Vec<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = apply_as<op>(u[i].v[j], v[i].v[j]);
    *reinterpret_cast<Vec<T, N>*>(y + at[i][0]) = out;
  }
}

/// y = act(x), or act(x) * up; rows of x and up may be strided. Groups of N elements, `each` of them a row.
struct Rows {
  int64_t count, each;
  Divisor by_each;
  int64_t x_stride, up_stride;
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(T* y, const T* x, const T* up, Rows rows, Activation act) {
  constexpr int kGroups = 2;  // in flight
  Vec<T, N> in[kGroups], factor[kGroups];
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads * kGroups) + threadIdx.x;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t i = first + g * kThreads;
    if (i >= rows.count) break;
    const int64_t row = rows.count == rows.each ? 0 : rows.by_each.quotient(static_cast<uint64_t>(i));
    const int64_t column = (i - row * rows.each) * N;
    in[g] = *reinterpret_cast<const Vec<T, N>*>(x + row * rows.x_stride + column);
    if (up) factor[g] = *reinterpret_cast<const Vec<T, N>*>(up + row * rows.up_stride + column);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t i = first + g * kThreads;
    if (i >= rows.count) break;
    Vec<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = activate<sizeof(T) == 2>(act, to_float(in[g].v[j]));
      if (up) value *= to_float(factor[g].v[j]);
      out.v[j] = from_float<T>(value);
    }
    *reinterpret_cast<Vec<T, N>*>(y + i * N) = out;
  }
}

template <typename T>
void launch_activation(cudaStream_t stream, View y, View x, View up, int64_t rows, int64_t cols,
                       int64_t x_stride, int64_t up_stride, Activation act) {
  constexpr int N = 16 / sizeof(T);
  const bool wide = cols % N == 0 && x_stride % N == 0 && up_stride % N == 0 && is_aligned(x.data, 16) &&
                    is_aligned(y.data, 16) && (!up || is_aligned(up.data, 16));
  const auto run = [&](auto kernel, int64_t each) {
    kernel<<<blocks_for(rows * each, kThreads * 2, INT32_MAX), kThreads, 0, stream>>>(
        y.as<T>(), x.as<const T>(), up ? up.as<const T>() : nullptr,
        Rows{rows * each, each, divisor_of(each), x_stride, up_stride}, act);
  };
  if (wide)
    run(activation_kernel<T, N>, cols / N);
  else
    run(activation_kernel<T, 1>, cols);
}

template <Binary op, typename T>
void launch_binary(cudaStream_t stream, View y, View a, View b) {
  constexpr int N = 16 / sizeof(T);
  const View views[3] = {y, a, b};
  StridesOf<3> strides{};
  Extent e = join_dims(views, strides.s);
  const auto run = [&](auto kernel) {
    kernel<<<strided_blocks(e), kStridedThreads, 0, stream>>>(y.as<T>(), a.as<const T>(), b.as<const T>(), e,
                                                              strides, strides.s[1].s[0] == 0,
                                                              strides.s[2].s[0] == 0);
  };
  if (strides.s[0].s[0] == 1 && group_elements(&e, strides.s, views, N))
    run(binary_kernel<op, T, N>);
  else
    run(binary_kernel<op, T, 1>);
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

}  // namespace

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
