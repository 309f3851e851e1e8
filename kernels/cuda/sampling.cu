// cross_entropy, argmax and sample over rows of logits. The rules of sample are backend.h's and those of the
// CPU backend, draw for draw: ../random.h.
//
// A block of 1024 threads a row. Nothing is sorted: top-k and top-p are both the smallest key that has less
// than a given weight above it, found by a radix search over histograms of the keys' bits in shared memory.
// Weights are added as integers of 2^-40, so that sums do not depend on the order in which threads come.
#include "../random.h"
#include "common.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr float kLargest = 3.402823466e+38f;

/// Largest value and the lowest index that has it; NaN never wins.
struct Best {
  float value;
  int64_t index;
};
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
__device__ Best block_best(Best best) {
  __shared__ Best partial[32];
  for (int step = 16; step > 0; step /= 2) {
    best = better(best, {__shfl_xor_sync(0xffffffffu, best.value, step),
                         __shfl_xor_sync(0xffffffffu, best.index, step)});
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
  __syncthreads();
  best = partial[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) best = better(best, partial[w]);
  __syncthreads();
  return best;
}

template <typename T>
__device__ Best row_best(const T* x, int64_t n) {
  Best best{-INFINITY, 0};
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float value = to_float(x[i]);
    if (value > best.value) best = {value, i};
  }
  // a thread that saw nothing above -inf offers index 0, which is the answer when no thread did
  return block_best(best);
}

template <typename T>
__global__ void argmax_kernel(int32_t* y, const T* x, int64_t n) {
  const Best best = row_best(x + blockIdx.x * n, n);
  if (threadIdx.x == 0) y[blockIdx.x] = best.value == -INFINITY ? 0 : static_cast<int32_t>(best.index);
}

__device__ double block_sum_double(double x) {
  __shared__ double partial[32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) x += partial[w];
  __syncthreads();
  return x;
}

template <typename T>
__global__ void cross_entropy_kernel(float* out, const T* logits, const void* targets, bool wide, int64_t n) {
  const T* x = logits + blockIdx.x * n;
  const int64_t target = wide ? static_cast<const int64_t*>(targets)[blockIdx.x]
                              : static_cast<const int32_t*>(targets)[blockIdx.x];
  if (target < 0 || target >= n) {
    if (threadIdx.x == 0) out[blockIdx.x] = target < 0 ? 0.0f : NAN;
    return;
  }
  const float top = row_best(x, n).value;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += expf(to_float(x[i]) - top);
  sum = block_sum_double(sum);
  if (threadIdx.x == 0) {
    out[blockIdx.x] =
        static_cast<float>(log(sum) + (static_cast<double>(top) - static_cast<double>(to_float(x[target]))));
  }
}

/// Unsigned keys in the order of the floats (no NaN; -0 and 0 are one).
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

using Weight = unsigned long long;  // multiples of 2^-40
__device__ __forceinline__ Weight weight_of(float w) {
  return static_cast<Weight>(static_cast<double>(w) * 1099511627776.0);
}

struct Histogram {
  Weight sums[2048];
  uint8_t present[2048];
  uint32_t prefix;
  int chosen;
  Weight above;
};

/// The smallest key K among those >= floor such that the weights of all keys above K sum to less than
/// `target`. Weights of 1 when `weights` is null. As in the CPU backend.
__device__ uint32_t threshold(Histogram& h, const float* l, const float* weights, int64_t n, uint32_t floor,
                              Weight target) {
  constexpr int kShifts[3] = {21, 10, 0}, kWidths[3] = {11, 11, 10};
  if (threadIdx.x == 0) {
    h.prefix = 0;
    h.above = 0;
  }
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass], width = kWidths[pass], buckets = 1 << width;
    for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
      h.sums[b] = 0;
      h.present[b] = 0;
    }
    __syncthreads();
    const uint32_t prefix = h.prefix;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t key = key_of(l[i]);
      if (key < floor || (pass > 0 && (key >> (shift + width)) != prefix)) continue;
      const uint32_t bucket = (key >> shift) & static_cast<uint32_t>(buckets - 1);
      atomicAdd(&h.sums[bucket], weights ? weight_of(weights[i]) : Weight{1});
      h.present[bucket] = 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int chosen = -1;
      Weight before = h.above;
      for (int b = buckets - 1; b >= 0; --b) {
        if (!h.present[b]) continue;
        if (chosen >= 0 && !(before < target)) break;
        chosen = b;
        h.above = before;
        before += h.sums[b];
      }
      h.chosen = chosen;
      if (chosen >= 0) h.prefix = (prefix << width) | static_cast<uint32_t>(chosen);
    }
    __syncthreads();
    if (h.chosen < 0) return floor;
  }
  const uint32_t key = h.prefix;
  __syncthreads();
  return key;
}

__device__ Weight block_sum_weight(Weight x) {
  __shared__ Weight partial[32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) x += partial[w];
  __syncthreads();
  return x;
}

template <typename T>
__device__ int64_t choose(Histogram& h, const T* logits, int64_t n, const float* params, double u,
                          const uint8_t* seen, float* l, float* weights) {
  const float penalty = params[kRepetitionPenalty];
  const bool penalise = seen && penalty > 0.0f && penalty != 1.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    float x = to_float(logits[i]);
    x = isnan(x) ? -INFINITY : fminf(x, kLargest);
    if (penalise && seen[i]) x = fminf(kLargest, x < 0.0f ? x * penalty : __fdiv_rn(x, penalty));
    l[i] = x;
  }
  __syncthreads();
  const Best best = row_best(l, n);
  if (best.value == -INFINITY) return 0;
  const float temperature = params[kTemperature], top_p = params[kTopP];
  if (!(temperature > 0.0f) || top_p <= 0.0f) return best.index;
  if (temperature != 1.0f) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      // -infinity stays: what a caller has masked is never chosen
      if (l[i] >= -kLargest) l[i] = fmaxf(-kLargest, fminf(kLargest, __fdiv_rn(l[i], temperature)));
    }
    __syncthreads();
  }
  const float most = row_best(l, n).value;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) weights[i] = expf(l[i] - most);
  __syncthreads();
  uint32_t floor = key_of(-kLargest);
  const float k = params[kTopK];
  if (k >= 1.0f && k < static_cast<float>(n)) {
    floor = max(floor, threshold(h, l, nullptr, n, floor, static_cast<Weight>(k)));
  }
  if (top_p < 1.0f) {
    Weight total = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      if (key_of(l[i]) >= floor) total += weight_of(weights[i]);
    }
    total = block_sum_weight(total);
    // the target is above 0: something is always kept
    const Weight target = static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    floor = max(floor, threshold(h, l, weights, n, floor, target > 0 ? target : Weight{1}));
  }
  const float min_p = fminf(params[kMinP], 1.0f);
  const bool use_min_p = params[kMinP] > 0.0f;
  const auto kept = [&](int64_t i) {
    return key_of(l[i]) >= floor && !(use_min_p && weights[i] < min_p && l[i] < most);
  };
  // each thread a run of tokens, so that the running sum goes in the order of the indices
  const int64_t run = (n + blockDim.x - 1) / blockDim.x, begin = threadIdx.x * run, end = min(n, begin + run);
  Weight own = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (kept(i)) own += weight_of(weights[i]);
  }
  __shared__ Weight before[kThreads];
  __shared__ int64_t chosen;
  before[threadIdx.x] = own;
  if (threadIdx.x == 0) chosen = -1;
  __syncthreads();
  if (threadIdx.x == 0) {
    Weight sum = 0;
    for (int t = 0; t < static_cast<int>(blockDim.x); ++t) {
      const Weight mine = before[t];
      before[t] = sum;
      sum += mine;
    }
    h.above = sum;
  }
  __syncthreads();
  const Weight target = static_cast<Weight>(u * static_cast<double>(h.above));
  if (own > 0 && before[threadIdx.x] <= target && target < before[threadIdx.x] + own) {
    Weight sum = before[threadIdx.x];
    for (int64_t i = begin; i < end; ++i) {
      if (!kept(i)) continue;
      sum += weight_of(weights[i]);
      if (sum > target) {
        chosen = i;
        break;
      }
    }
  }
  __syncthreads();
  return chosen < 0 ? best.index : chosen;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(int32_t* tokens, const T* logits, const float* params, int64_t* rng, uint8_t* seen,
                  float* scratch, int64_t n) {
  __shared__ Histogram histogram;
  const int64_t row = blockIdx.x;
  float* l = scratch + row * 2 * n;
  uint8_t* marks = seen ? seen + row * n : nullptr;
  const int64_t counter = rng[2 * row + 1];
  const int64_t token = choose(histogram, logits + row * n, n, params + row * kSamplingColumns,
                               uniform(rng[2 * row], counter), marks, l, l + n);
  __syncthreads();
  if (threadIdx.x == 0) {
    tokens[row] = static_cast<int32_t>(token);
    rng[2 * row + 1] = static_cast<int64_t>(static_cast<uint64_t>(counter) + 1);
    if (marks) marks[token] = 1;
  }
}

}  // namespace

Status CudaBackend::cross_entropy(Queue queue, View out, View logits, View targets) {
  if (Status status = enter(); !status.ok()) return status;
  if (logits.ndim != 2 || !logits.is_contiguous() || !out.is_contiguous() || !targets.is_contiguous() ||
      out.size() != logits.shape[0] || targets.size() != logits.shape[0]) {
    return refuse("cross_entropy", "logits must be [R, V], targets and the result [R], all contiguous");
  }
  if (!is_float(logits.dtype) || out.dtype != DType::f32 ||
      (targets.dtype != DType::i32 && targets.dtype != DType::i64)) {
    return refuse_dtype("cross_entropy", "logits must be float, targets int32 or int64, the result float32");
  }
  if (out.size() == 0) return {};
  with_float_type(logits.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    cross_entropy_kernel<T><<<static_cast<unsigned>(out.size()), kThreads, 0, stream(queue)>>>(
        out.as<float>(), logits.as<const T>(), targets.data, targets.dtype == DType::i64, logits.shape[1]);
  });
  return check(cudaGetLastError(), "cross_entropy");
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
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    argmax_kernel<T><<<static_cast<unsigned>(y.size()), kThreads, 0, stream(queue)>>>(
        y.as<int32_t>(), x.as<const T>(), x.cols());
  });
  return check(cudaGetLastError(), "argmax");
}

size_t CudaBackend::sample_workspace(const View& logits) const {
  return static_cast<size_t>(logits.size()) * 2 * 4;
}

Status CudaBackend::sample(Queue queue, View tokens, View logits, View params, View rng, View seen,
                           View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (logits.ndim != 2 || !logits.is_contiguous() || logits.shape[1] < 1) {
    return refuse("sample", "logits must be contiguous [S, V]");
  }
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  if (!is_float(logits.dtype) || tokens.dtype != DType::i32 || params.dtype != DType::f32 ||
      rng.dtype != DType::i64 || (seen && seen.dtype != DType::u8)) {
    return refuse_dtype("sample",
                        "tokens must be int32, params float32, rng int64, seen uint8, logits float");
  }
  if (tokens.size() != rows || params.size() != rows * kSamplingColumns || rng.size() != rows * 2 ||
      (seen && seen.size() != rows * n) || !tokens.is_contiguous() || !params.is_contiguous() ||
      !rng.is_contiguous() || (seen && !seen.is_contiguous())) {
    return refuse("sample", "tokens, params, rng or seen do not fit the logits, or are not contiguous");
  }
  if (rows == 0) return {};
  if (!workspace || static_cast<size_t>(workspace.size()) < sample_workspace(logits)) {
    return refuse("sample", "the workspace is too small");
  }
  with_float_type(logits.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    sample_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream(queue)>>>(
        tokens.as<int32_t>(), logits.as<const T>(), params.as<const float>(), rng.as<int64_t>(),
        seen ? seen.as<uint8_t>() : nullptr, workspace.as<float>(), n);
  });
  return check(cudaGetLastError(), "sample");
}

}  // namespace halfbyte::cuda
