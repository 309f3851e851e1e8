// rms_norm and layer_norm over the last dimension, with the residual added first.
//
// A block a row. The row is kept in registers between the two passes up to kKept vectors a thread (32768
// elements of 16 bits); longer rows, and rows whose length or addresses forbid 16-byte vectors, are read
// again.
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

struct Row {
  int64_t cols;
  float eps;
  float weight_offset;
};

/// Loads N elements of x (+ residual, rounded to T and written to sum) as float.
template <typename T, int N>
__device__ __forceinline__ void load_stream(const T* x, const T* residual, T* sum, int64_t at,
                                            float (&out)[N]) {
  const auto a = *reinterpret_cast<const Vec<T, N>*>(x + at);
  if (!residual) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = to_float(a.v[j]);
    return;
  }
  const auto b = *reinterpret_cast<const Vec<T, N>*>(residual + at);
  Vec<T, N> total;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    total.v[j] = from_float<T>(to_float(a.v[j]) + to_float(b.v[j]));
    out[j] = to_float(total.v[j]);
  }
  *reinterpret_cast<Vec<T, N>*>(sum + at) = total;
}

template <bool layer, typename T, typename W, int N>
__global__ void norm_kernel(T* y, T* sum, const T* x, const T* residual, const W* weight, const W* bias,
                            Row row) {
  constexpr int kKept = 4;
  const int64_t base = blockIdx.x * row.cols;
  x += base;
  y += base;
  if (residual) residual += base;
  if (sum) sum += base;
  const int step = blockDim.x * N;
  float kept[kKept][N];
  float total = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t at = static_cast<int64_t>(i) * step + threadIdx.x * N;
    if (at >= row.cols) continue;
    load_stream<T, N>(x, residual, sum, at, kept[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      total += kept[i][j];
      squares += kept[i][j] * kept[i][j];
    }
  }
  for (int64_t at = static_cast<int64_t>(kKept) * step + threadIdx.x * N; at < row.cols; at += step) {
    float v[N];
    load_stream<T, N>(x, residual, sum, at, v);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      total += v[j];
      squares += v[j] * v[j];
    }
  }
  const T* stream = residual ? sum : x;  // what the later reads of long rows see: this thread wrote it
  float mean = 0.0f, variance;
  if constexpr (layer) {
    mean = block_sum(total) / row.cols;
    // the squares of the differences, not the difference of the squares: no cancellation
    float spread = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (static_cast<int64_t>(i) * step + threadIdx.x * N >= row.cols) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) spread += (kept[i][j] - mean) * (kept[i][j] - mean);
    }
    for (int64_t at = static_cast<int64_t>(kKept) * step + threadIdx.x * N; at < row.cols; at += step) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = to_float(stream[at + j]) - mean;
        spread += d * d;
      }
    }
    variance = block_sum(spread) / row.cols;
  } else {
    variance = block_sum(squares) / row.cols;
  }
  const float scale = rsqrtf(variance + row.eps);
  const auto finish = [&](int64_t at, const float(&v)[N]) {
    Vec<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = (v[j] - mean) * scale;
      if (weight) value *= to_float(weight[at + j]) + row.weight_offset;
      if (layer && bias) value += to_float(bias[at + j]);
      out.v[j] = from_float<T>(value);
    }
    *reinterpret_cast<Vec<T, N>*>(y + at) = out;
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t at = static_cast<int64_t>(i) * step + threadIdx.x * N;
    if (at < row.cols) finish(at, kept[i]);
  }
  for (int64_t at = static_cast<int64_t>(kKept) * step + threadIdx.x * N; at < row.cols; at += step) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(stream[at + j]);
    finish(at, v);
  }
}

template <bool layer, typename T, typename W>
void launch(cudaStream_t stream, View y, View sum, View x, View residual, View weight, View bias,
            const Row& row) {
  const auto rows = static_cast<unsigned>(y.rows());
  constexpr int N = 16 / sizeof(T);
  const bool wide = row.cols % N == 0 && is_aligned(x.data, 16) && is_aligned(y.data, 16) &&
                    (!residual || (is_aligned(residual.data, 16) && is_aligned(sum.data, 16)));
  // threads that hold about half of what they can keep: more rows in flight on a multiprocessor, shorter
  // reductions
  const int64_t wanted = (row.cols / (wide ? N * 2 : 2) + 31) / 32 * 32;
  const int threads = static_cast<int>(wanted < 32 ? 32 : wanted > 1024 ? 1024 : wanted);
  const auto run = [&](auto kernel) {
    kernel<<<rows, threads, 0, stream>>>(y.as<T>(), residual ? sum.as<T>() : nullptr, x.as<const T>(),
                                         residual ? residual.as<const T>() : nullptr,
                                         weight ? weight.as<const W>() : nullptr,
                                         bias ? bias.as<const W>() : nullptr, row);
  };
  if (wide)
    run(norm_kernel<layer, T, W, N>);
  else
    run(norm_kernel<layer, T, W, 1>);
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
  const DType w = weight ? weight.dtype : bias ? bias.dtype : x.dtype;
  with_float_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    // a norm's parameters are of the stream's dtype or fp32
    if (w == x.dtype)
      launch<layer, T, T>(stream, y, sum, x, residual, weight, bias, row);
    else
      with_float_type(w, [&](auto* p) {
        launch<layer, T, std::remove_pointer_t<decltype(p)>>(stream, y, sum, x, residual, weight, bias, row);
      });
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
