// argmax and cross_entropy over rows of logits: one pass, 16 bytes at a time.
//
// A block a row; where rows are few and long (one token of a model with a large vocabulary), a cluster of
// kCluster blocks shares a row, on GPUs that have clusters. A thread holds what it has seen as a pair, merged
// over the warp, the block and the cluster: the largest value and its index, or the largest value and the sum
// of exp(value - largest) in double.
#include "activation.cuh"
#include "cluster.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kCluster = 8;

/// Largest value and the lowest index that has it; NaN never wins.
struct Best {
  float value = -INFINITY;
  int32_t index = 0;

  template <int N>
  __device__ __forceinline__ void see(const float (&x)[N], int64_t at) {
    float most = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) most = fmaxf(most, x[j]);
    if (!(most > value)) return;  // as it mostly is
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (x[j] > value) {
        value = x[j];
        index = static_cast<int32_t>(at + j);
      }
    }
  }
  __device__ __forceinline__ void merge(const Best& other) {
    // one that saw nothing above -infinity offers index 0, the answer when no other did either
    if (other.value > value || (other.value == value && other.index < index)) *this = other;
  }
  __device__ __forceinline__ Best from_lane(int step) const {
    return {__shfl_xor_sync(0xffffffffu, value, step), __shfl_xor_sync(0xffffffffu, index, step)};
  }
  __device__ __forceinline__ void put(float (&words)[3]) const {
    words[0] = value;
    words[1] = __int_as_float(index);
  }
  static __device__ __forceinline__ Best get(const float (&words)[3]) {
    return {words[0], __float_as_int(words[1])};
  }
};

/// Largest value and the sum of exp(value - largest); NaN is in the sum.
struct ExpSum {
  float most = -INFINITY;
  double sum = 0.0;

  template <int N>
  __device__ __forceinline__ void see(const float (&x)[N], int64_t) {
    float top = most;
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, x[j]);
    if (top == -INFINITY) return;
    if (top > most) {
      sum *= expf(most - top);
      most = top;
    }
    float some = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) some += rough_exp2((x[j] - top) * kLog2E);
    sum += some;
  }
  __device__ __forceinline__ void merge(const ExpSum& other) {
    const float top = fmaxf(most, other.most);
    if (top == -INFINITY) return;
    sum = sum * expf(most - top) + other.sum * expf(other.most - top);
    most = top;
  }
  __device__ __forceinline__ ExpSum from_lane(int step) const {
    return {__shfl_xor_sync(0xffffffffu, most, step), __shfl_xor_sync(0xffffffffu, sum, step)};
  }
  __device__ __forceinline__ void put(float (&words)[3]) const {
    words[0] = most;
    words[1] = static_cast<float>(sum);
    words[2] = static_cast<float>(sum - static_cast<double>(words[1]));
  }
  static __device__ __forceinline__ ExpSum get(const float (&words)[3]) {
    return {words[0], static_cast<double>(words[1]) + static_cast<double>(words[2])};
  }
};

/// Elements begin .. end of a row seen by the threads of a block.
template <typename Seen, typename T>
__device__ __forceinline__ Seen see_row(const T* x, int64_t begin, int64_t end) {
  constexpr int N = 16 / sizeof(T), kLoads = 4;
  Seen seen;
  const auto see_one = [&](int64_t at) {
    const float value[1] = {to_float(x[at])};
    seen.see(value, at);
  };
  const int64_t odd = (16 - reinterpret_cast<uintptr_t>(x + begin) % 16) % 16 / sizeof(T);
  const int64_t first = min(begin + odd, end), vectors = (end - first) / N, last = first + vectors * N;
  for (int64_t at = begin + threadIdx.x; at < first; at += kThreads) see_one(at);
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads * kLoads) {
    Vec<T, N> in[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (v + i * kThreads < vectors)
        in[i] = *reinterpret_cast<const Vec<T, N>*>(x + first + (v + i * kThreads) * N);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (v + i * kThreads >= vectors) break;
      float value[N];
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = to_float(in[i].v[j]);
      seen.see(value, first + (v + i * kThreads) * N);
    }
  }
  for (int64_t at = last + threadIdx.x; at < end; at += kThreads) see_one(at);
  return seen;
}

/// What all blocks of the cluster have seen of row blockIdx.x / cluster_size(), in thread 0 of the first.
template <typename Seen, typename T>
__device__ __forceinline__ Seen see_in_cluster(const T* x, int64_t n) {
  __shared__ float words[kThreads / 32][3];
  const int blocks = cluster_size(), rank = cluster_rank(), warp = threadIdx.x / 32;
  const int64_t part = (n + blocks - 1) / blocks;
  Seen seen = see_row<Seen>(x, min(rank * part, n), min((rank + 1) * part, n));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) seen.merge(seen.from_lane(step));
  if (threadIdx.x % 32 == 0) seen.put(words[warp]);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) seen.merge(Seen::get(words[w]));
    seen.put(words[0]);
  }
  if (blocks == 1) return seen;
  cluster_barrier();
  if (rank == 0 && threadIdx.x == 0) {
    for (int r = 1; r < blocks; ++r) {
      float there[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) there[i] = cluster_value(&words[0][i], r);
      seen.merge(Seen::get(there));
    }
  }
  cluster_barrier();  // the others' shared memory has been read
  return seen;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) argmax_kernel(int32_t* y, const T* x, int64_t n) {
  const int64_t row = blockIdx.x / cluster_size();
  const auto best = see_in_cluster<Best>(x + row * n, n);
  if (cluster_rank() == 0 && threadIdx.x == 0) y[row] = best.index;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(float* out, const T* logits, const void* targets, bool wide, int64_t n) {
  const int64_t row = blockIdx.x / cluster_size();
  const T* x = logits + row * n;
  const auto all = see_in_cluster<ExpSum>(x, n);
  if (cluster_rank() != 0 || threadIdx.x != 0) return;
  const int64_t target =
      wide ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
  if (target < 0) {
    out[row] = 0.0f;
  } else if (target >= n || all.most == -INFINITY) {
    out[row] = NAN;
  } else {
    const double top = static_cast<double>(all.most);
    out[row] = static_cast<float>(log(all.sum) + (top - static_cast<double>(to_float(x[target]))));
  }
}

/// A block or a cluster for each of `rows` rows of n.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_rows(const Launch& launch, cudaStream_t stream, int64_t rows, int64_t n,
                        void (*kernel)(Parameters...), Arguments... arguments) {
  const bool shared = launch.arch >= 90 && n >= int64_t{kThreads} * kCluster * 4 &&
                      rows * kCluster <= 2 * launch.multiprocessors;
  Launch on = launch;
  on.stream = stream;
  on.early = false;
  LaunchShape shape;
  shape.cluster = shared ? kCluster : 1;
  shape.grid = dim3(static_cast<unsigned>(rows) * shape.cluster);
  shape.block = dim3(kThreads);
  return launch_kernel(on, shape, kernel, arguments...);
}

}  // namespace

Status CudaBackend::cross_entropy(Queue queue, View out, View logits, View targets) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_cross_entropy("cross_entropy", out, logits, targets); !status.ok()) return status;
  if (out.size() == 0) return {};
  const cudaError_t error = with_float_type(logits.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    return launch_rows(launch_, stream(queue), out.size(), logits.shape[1], cross_entropy_kernel<T>,
                       out.as<float>(), logits.as<const T>(), static_cast<const void*>(targets.data),
                       targets.dtype == DType::i64, logits.shape[1]);
  });
  return check(error, "cross_entropy");
}

Status CudaBackend::argmax(Queue queue, View y, View x) {
  if (Status status = enter(); !status.ok()) return status;
  if (x.ndim < 1 || !x.is_contiguous() || !y.is_contiguous() || y.size() != x.rows()) {
    return refuse("argmax", "x must be [..., V] and the result [...], contiguous");
  }
  if (!is_float(x.dtype) || y.dtype != DType::i32)
    return refuse_dtype("argmax", "x must be float and the result int32");
  if (y.size() == 0) return {};
  if (x.cols() == 0) return refuse("argmax", "rows of nothing");
  const cudaError_t error = with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    return launch_rows(launch_, stream(queue), y.size(), x.cols(), argmax_kernel<T>, y.as<int32_t>(),
                       x.as<const T>(), x.cols());
  });
  return check(error, "argmax");
}

}  // namespace halfbyte::cuda
