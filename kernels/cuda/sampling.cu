// sample, over rows of logits. Its rules are backend.h's and those of the CPU backend, draw for draw:
// ../random.h.
//
// A block of 1024 threads a row. Nothing is sorted: top-k and top-p are both the smallest key that has less
// than a given weight above it, found by a radix search over histograms of the keys' bits in shared memory.
// For top-k only keys count that are not below the k-th largest of the threads' own maxima: few. Weights are
// added as integers of 2^-40, so that sums do not depend on the order in which threads come. A greedy row is
// read once and nothing else.
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

/// The sum over the threads before this one, and over all. Every thread of the block calls it.
struct Prefix {
  Weight before, total;
};
__device__ Prefix block_prefix(Weight own) {
  __shared__ Weight warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Weight sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const Weight other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Prefix prefix{sum - own, 0};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) prefix.before += warps[w];
    prefix.total += warps[w];
  }
  __syncthreads();
  return prefix;
}

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
    // from the highest bucket downwards, two a thread: the lowest one with less than the target above it
    const int high = buckets - 1 - 2 * static_cast<int>(threadIdx.x);
    const Weight upper = high > 0 ? h.sums[high] : 0, lower = high > 0 ? h.sums[high - 1] : 0;
    if (threadIdx.x == 0) h.chosen = INT_MAX;
    const Weight above = h.above + block_prefix(upper + lower).before;
    if (high > 0) {
      if (h.present[high] && above < target) atomicMin(&h.chosen, high);
      if (h.present[high - 1] && above + upper < target) atomicMin(&h.chosen, high - 1);
    }
    __syncthreads();
    const int chosen = h.chosen;
    if (chosen == INT_MAX) return floor;
    __syncthreads();
    if (chosen == high || chosen == high - 1) {
      h.above = chosen == high ? above : above + upper;
      h.prefix = (prefix << width) | static_cast<uint32_t>(chosen);
    }
    __syncthreads();
  }
  const uint32_t key = h.prefix;
  __syncthreads();
  return key;
}

template <typename T>
__device__ int64_t choose(Histogram& h, const T* logits, int64_t n, const float* params, double u,
                          const uint8_t* seen, float* l, float* weights) {
  const float penalty = params[kRepetitionPenalty], temperature = params[kTemperature], top_p = params[kTopP];
  const bool penalise = seen && penalty > 0.0f && penalty != 1.0f;
  const bool greedy = !(temperature > 0.0f) || top_p <= 0.0f;
  // a thread that sees nothing above -infinity offers index 0, which is the answer when no thread does
  Best best{-INFINITY, 0};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float x = to_float(logits[i]);
    x = isnan(x) ? -INFINITY : fminf(x, kLargest);
    if (penalise && seen[i]) x = fminf(kLargest, x < 0.0f ? x * penalty : __fdiv_rn(x, penalty));
    if (!greedy) l[i] = x;
    if (x > best.value) best = {x, i};
  }
  best = block_best(best);
  if (best.value == -INFINITY) return 0;
  if (greedy) return best.index;
  const auto warm = [&](float x) {
    // -infinity stays: what a caller has masked is never chosen
    if (temperature == 1.0f || !(x >= -kLargest)) return x;
    return fmaxf(-kLargest, fminf(kLargest, __fdiv_rn(x, temperature)));
  };
  const float most = warm(best.value);
  float own_most = -INFINITY;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float x = warm(l[i]);
    l[i] = x;
    weights[i] = expf(x - most);
    own_most = fmaxf(own_most, x);
  }
  __syncthreads();
  uint32_t floor = key_of(-kLargest);
  const float k = params[kTopK];
  if (k >= 1.0f && k < static_cast<float>(n)) {
    const Weight count = static_cast<Weight>(k);
    uint32_t least = floor;
    if (count <= kThreads) {
      // so many of the threads' maxima are at least that large
      __shared__ float maxima[kThreads];
      maxima[threadIdx.x] = own_most;
      __syncthreads();
      least = max(least, threshold(h, maxima, nullptr, kThreads, floor, count));
    }
    floor = max(floor, threshold(h, l, nullptr, n, least, count));
  }
  if (top_p < 1.0f) {
    Weight total = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      if (key_of(l[i]) >= floor) total += weight_of(weights[i]);
    }
    total = block_prefix(total).total;
    // the target is above 0: something is always kept
    const Weight target = static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    floor = max(floor, threshold(h, l, weights, n, floor, target > 0 ? target : Weight{1}));
  }
  const float min_p = fminf(params[kMinP], 1.0f);
  const bool use_min_p = params[kMinP] > 0.0f;
  const auto weight_at = [&](int64_t i) -> Weight {
    const bool kept = key_of(l[i]) >= floor && !(use_min_p && weights[i] < min_p && l[i] < most);
    return kept ? weight_of(weights[i]) : 0;
  };
  // each warp a run of tokens; the running sum goes in the order of the indices
  const int lane = threadIdx.x % 32;
  const int64_t run = (n + kThreads / 32 - 1) / (kThreads / 32), begin = threadIdx.x / 32 * run;
  const int64_t end = min(n, begin + run);
  Weight own = 0;
#pragma unroll 4
  for (int64_t i = begin + lane; i < end; i += 32) own += weight_at(i);
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  const Prefix prefix = block_prefix(lane == 0 ? own : 0);
  Weight sum = __shfl_sync(0xffffffffu, prefix.before, 0);
  const Weight target = static_cast<Weight>(u * static_cast<double>(prefix.total));
  __shared__ int64_t chosen;
  if (threadIdx.x == 0) chosen = -1;
  __syncthreads();
  if (own > 0 && sum <= target && target < sum + own) {
    // this warp's run: eight tokens a lane at a time
    constexpr int kEach = 8;
    for (int64_t first = begin; first < end; first += 32 * kEach) {
      Weight some[kEach], mine = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t i = first + lane * kEach + j;
        some[j] = i < end ? weight_at(i) : 0;
        mine += some[j];
      }
      Weight upto = mine;
      for (int step = 1; step < 32; step *= 2) {
        const Weight other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
      }
      const unsigned passed = __ballot_sync(0xffffffffu, sum + upto > target);
      if (passed != 0) {
        if (lane == __ffs(static_cast<int>(passed)) - 1) {
          Weight running = sum + upto - mine;
          for (int j = 0; j < kEach; ++j) {
            running += some[j];
            if (running > target) {
              chosen = first + lane * kEach + j;
              break;
            }
          }
        }
        break;
      }
      sum += __shfl_sync(0xffffffffu, upto, 31);
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
