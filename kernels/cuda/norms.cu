// rms_norm and layer_norm over the last dimension, with the residual added first.
//
// A block a row. A thread keeps kKept vectors of 16 bytes of it in registers between the passes, 32768
// elements of 16 bits in all; what is beyond, in a longer row, is read again. Blocks are as small as that
// allows, so that some rows load while others sum. Rows whose length or addresses forbid vectors go an
// element at a time.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

struct Row {
  int64_t cols;
  float eps;
  float weight_offset;
};

/// Weight or bias of any float dtype; the same for every thread, so that the branch costs nothing.
struct Parameter {
  const void* data;  // null: there is none
  DType dtype;

  template <typename W, int N>
  __device__ __forceinline__ void load_as(int64_t at, float (&out)[N]) const {
    constexpr int kStep = N * sizeof(W) > 16 ? 16 / sizeof(W) : N;
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
      const auto some = *reinterpret_cast<const Vec<W, kStep>*>(static_cast<const W*>(data) + at + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) out[i + j] = to_float(some.v[j]);
    }
  }
  template <int N>
  __device__ __forceinline__ void load(int64_t at, float (&out)[N]) const {
    switch (dtype) {
      case DType::f16:
        return load_as<half_t>(at, out);
      case DType::bf16:
        return load_as<bf16_t>(at, out);
      default:
        return load_as<float>(at, out);
    }
  }
};

/// Sum over the block, in every thread; `partial` [32] of shared memory is not used again.
__device__ __forceinline__ float row_sum(float x, float* partial) {
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  const int lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x) / 32;
  if (lane == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

template <bool layer, typename T, int N, int kKept, int kThreads>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(T* y, T* sum, const T* x, const T* residual, Parameter weight, Parameter bias, Row row) {
  using V = Vec<T, N>;
  __shared__ float partial[2][32];
  const int64_t base = blockIdx.x * row.cols;
  x += base;
  y += base;
  if (residual) {
    residual += base;
    sum += base;
  }
  const int step = blockDim.x * N;
  const int64_t own = threadIdx.x * N;
  V kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (own + i * step < row.cols) kept[i] = *reinterpret_cast<const V*>(x + own + i * step);
  }
  /// x + residual, rounded to T, also into sum
  const auto add_residual = [&](int64_t at, V value) {
    const V other = *reinterpret_cast<const V*>(residual + at);
#pragma unroll
    for (int j = 0; j < N; ++j) value.v[j] = from_float<T>(to_float(value.v[j]) + to_float(other.v[j]));
    store_vector(sum + at, value);
    return value;
  };
  if (residual) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (own + i * step < row.cols) kept[i] = add_residual(own + i * step, kept[i]);
    }
  }
  const int64_t beyond = own + static_cast<int64_t>(kKept) * step;
  const T* stream = residual ? sum : x;  // what the later reads of long rows see: this thread wrote it
  float total = 0.0f;                    // of the squares, or of the values for a layer norm
  const auto count = [&](const V& value) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float v = to_float(value.v[j]);
      total += layer ? v : v * v;
    }
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (own + i * step < row.cols) count(kept[i]);
  }
  for (int64_t at = beyond; at < row.cols; at += step) {
    const V value = *reinterpret_cast<const V*>(x + at);
    count(residual ? add_residual(at, value) : value);
  }
  total = row_sum(total, partial[0]) / row.cols;
  const float mean = layer ? total : 0.0f;
  float variance = total;
  if constexpr (layer) {
    // the squares of the differences, not the difference of the squares: no cancellation
    float spread = 0.0f;
    const auto spread_of = [&](const V& value) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = to_float(value.v[j]) - mean;
        spread += d * d;
      }
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (own + i * step < row.cols) spread_of(kept[i]);
    }
    for (int64_t at = beyond; at < row.cols; at += step) spread_of(*reinterpret_cast<const V*>(stream + at));
    variance = row_sum(spread, partial[1]) / row.cols;
  }
  const float scale = rsqrtf(variance + row.eps);
  const auto finish = [&](int64_t at, const V& value) {
    V out;
    float w[N], b[N];
    if (weight.data) weight.load(at, w);
    if (layer && bias.data) bias.load(at, b);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float v = (to_float(value.v[j]) - mean) * scale;
      if (weight.data) v *= w[j] + row.weight_offset;
      if (layer && bias.data) v += b[j];
      out.v[j] = from_float<T>(v);
    }
    store_vector(y + at, out);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (own + i * step < row.cols) finish(own + i * step, kept[i]);
  }
  for (int64_t at = beyond; at < row.cols; at += step) finish(at, *reinterpret_cast<const V*>(stream + at));
}

template <bool layer, typename T>
void launch(cudaStream_t stream, View y, View sum, View x, View residual, View weight, View bias,
            const Row& row) {
  constexpr int N = 16 / sizeof(T);
  bool wide = row.cols % N == 0 && is_aligned(x.data, 16) && is_aligned(y.data, 16) &&
              (!residual || (is_aligned(residual.data, 16) && is_aligned(sum.data, 16)));
  for (const View& p : {weight, bias}) wide = wide && (!p || is_aligned(p.data, 16));
  const auto parameter = [](const View& p) {
    return p ? Parameter{p.data, p.dtype} : Parameter{nullptr, DType::f32};
  };
  const auto run = [&](auto kernel, int64_t vectors) {
    const int64_t threads = (vectors + 31) / 32 * 32;
    kernel<<<static_cast<unsigned>(y.rows()), static_cast<unsigned>(threads < 1024 ? threads : 1024), 0,
             stream>>>(y.as<T>(), residual ? sum.as<T>() : nullptr, x.as<const T>(),
                       residual ? residual.as<const T>() : nullptr, parameter(weight), parameter(bias), row);
  };
  const int64_t vectors = row.cols / N;
  if (!wide)
    run(norm_kernel<layer, T, 1, 8, 1024>, (row.cols + 7) / 8);
  else if (vectors <= 512)
    run(norm_kernel<layer, T, N, 2, 256>, (vectors + 1) / 2);
  else if (vectors <= 2048)
    run(norm_kernel<layer, T, N, 4, 512>, (vectors + 3) / 4);
  else
    run(norm_kernel<layer, T, N, 4, 1024>, (vectors + 3) / 4);
}

Status check_norm(const char* op, View y, View sum, View x, View residual, View weight, View bias) {
  if (y.size() != x.size() || y.cols() != x.cols() || !y.is_contiguous() || !x.is_contiguous()) {
    return refuse(op, "x and y must be contiguous and of one shape");
  }
  if (y.dtype != x.dtype || !is_float(x.dtype)) return refuse_dtype(op, "x and y must be of one float dtype");
  if (residual && (residual.size() != x.size() || residual.dtype != x.dtype || !residual.is_contiguous() ||
                   !sum || sum.size() != x.size() || sum.dtype != x.dtype || !sum.is_contiguous())) {
    return refuse(op, "residual and sum must be like x");
  }
  for (const View& p : {weight, bias}) {
    if (p && (p.size() != x.cols() || !is_float(p.dtype) || !p.is_contiguous())) {
      return refuse(op, "weight and bias must have the length of a row");
    }
  }
  if (weight && bias && weight.dtype != bias.dtype)
    return refuse_dtype(op, "weight and bias must be of one dtype");
  return {};
}

template <bool layer>
void dispatch(cudaStream_t stream, View y, View sum, View x, View residual, View weight, View bias,
              const Row& row) {
  with_float_type(x.dtype, [&](auto* p) {
    launch<layer, std::remove_pointer_t<decltype(p)>>(stream, y, sum, x, residual, weight, bias, row);
  });
}

}  // namespace

Status CudaBackend::rms_norm(Queue queue, View y, View sum, View x, View residual, View weight, float eps,
                             float weight_offset) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_norm("rms_norm", y, sum, x, residual, weight, View{}); !status.ok())
    return status;
  if (x.size() == 0) return {};
  dispatch<false>(stream(queue), y, sum, x, residual, weight, View{}, Row{x.cols(), eps, weight_offset});
  return check(cudaGetLastError(), "rms_norm");
}

Status CudaBackend::layer_norm(Queue queue, View y, View sum, View x, View residual, View weight, View bias,
                               float eps) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_norm("layer_norm", y, sum, x, residual, weight, bias); !status.ok())
    return status;
  if (x.size() == 0) return {};
  dispatch<true>(stream(queue), y, sum, x, residual, weight, bias, Row{x.cols(), eps, 0.0f});
  return check(cudaGetLastError(), "layer_norm");
}

}  // namespace halfbyte::cuda
