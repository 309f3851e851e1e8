// Bounds of the cut of top-p, from a sample of a row.
#pragma once

#include "sampling_scan.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// A bound that a logit can be compared with: of its type, not above `x`; of 16 bits it is not -infinity.
template <typename T>
__device__ __forceinline__ float round_down(float x) {
  if constexpr (std::is_same_v<T, bf16_t>) return to_float(__float2bfloat16_rd(fmaxf(x, -3.3e38f)));
  if constexpr (std::is_same_v<T, half_t>) return to_float(__float2half_rd(fmaxf(x, -65504.0f)));
  return x;
}

constexpr float kFine = 32.0f;  // bins to a power of two
/// Vectors of a sample that a thread has, where a block has the row.
template <int kThreads, typename T>
constexpr int kSamplesOf = kSampled / (16 / static_cast<int>(sizeof(T))) / kThreads;

/// Has the first kilobytes of this warp's run brought to L2, since nothing else is read while the sample is
/// counted.
template <typename T, bool kSeen>
__device__ __forceinline__ void prefetch_run(const Row<T, kSeen>& row) {
#if __CUDA_ARCH__ >= 900
  const int first = max(row.begin, row.whole), stop = min(min(row.end, row.whole_end), row.begin + kAhead);
  if (threadIdx.x % 32 == 0 && first < stop) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row.x + row.index(first)),
                 "r"((stop - first) * 16)
                 : "memory");
  }
#endif
}

/// The sample of the row, counted by bins of logits: the reference of its weights, NaN where there is none.
/// All threads of the cluster call it.
template <int kThreads, typename T, bool kSeen>
__device__ __forceinline__ float count_sample(Cluster<kThreads>& cluster, const Row<T, kSeen>& row,
                                              int samples, float scale) {
  constexpr int N = 16 / sizeof(T), kMost = kSamplesOf<kThreads, T>;
  Shared& s = cluster.s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = threadIdx.x;
  const int length = row.end - row.begin, log_pieces = __ffs(2 * samples) - 1;
  Words<T> sample[kMost];
  float top = -INFINITY;
#pragma unroll
  for (int q = 0; q < kMost; ++q) {
    // in pieces of 256 bytes, one for sixteen lanes, that lie evenly over the run
    const int v = row.begin + ((lane / 16 + 2 * q) * length >> log_pieces) + lane % 16;
    sample[q] = q < samples && v >= row.whole && v < min(row.end, row.whole_end)
                    ? Words<T>::load(row.x + row.index(v))
                    : Words<T>::nothing();
  }
  prefetch_run(row);
#pragma unroll
  for (int i = 0; i < kBins; i += kThreads) s.counts[i + thread] = 0;
#pragma unroll
  for (int q = 0; q < kMost; ++q) top = fmaxf(top, largest_of(sample[q]));
  top = warp_max(top);
  if (lane == 0) s.pairs[warp].x = top;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kThreads / 32; ++w) top = fmaxf(top, s.pairs[w].x);
  if (cluster.blocks > 1) {
    cluster.tell(key_of(top));
#pragma unroll 1
    for (int r = 0; r < cluster.blocks; ++r)
      top = fmaxf(top, value_of(static_cast<uint32_t>(cluster.slot(r)[0])));
  }
  if (!(fabsf(top * scale) < kMostExponent)) return NAN;
  const float reference = reference_of(top, scale);
  // not known to be 1: to count by ones there is another instruction, which is slow where the places differ
  uint32_t one;
  asm volatile("mov.u32 %0, 1;" : "=r"(one));
#pragma unroll
  for (int q = 0; q < kMost; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // the last bin is also for what is -infinity or NaN, and weighs nothing
      const float bin = fmaf(sample[q].value(j), -kFine * scale, kFine * reference);
      if (bin < kBins - 1.0f) atomicAdd(&s.counts[static_cast<int>(fmaxf(0.0f, bin))], one);
    }
  }
  return reference;
}

/// Bounds that hold but for a chance in a few hundred, from a sample of the row before penalties; NaN where
/// there are none. `rest`: what weighs less than the top-p of the row, in units of the reference; NaN while
/// it is not known. `reference`: that of a sample which is counted already; NaN: there is none. All threads
/// of the cluster call it.
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ Bounds find_bounds(int round, float scale, float top_p, float rest, float reference) {
  const Problem<T>& p = problem<T>();
  Cluster<kThreads> cluster(p.blocks, round);
  Shared& s = cluster.s;
  const Row<T, kSeen> row;
  constexpr int kOwn = kBins / kThreads;  // bins of a thread
  constexpr float kSure = 3.5f;           // deviations that the estimates for a bound allow for
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = threadIdx.x;
  const int samples = max(1, kSamplesOf<kThreads, T> >> p.log_blocks);
  if (isnan(reference)) {
    reference = count_sample(cluster, row, samples, scale);
    if (isnan(reference)) return {NAN, NAN, NAN};
  }
  cluster.barrier();
  if (thread == 0) {
    s.low_bin = 0;
    s.high_bin = kBins;
  }
  // a thread's bins, the lower logits first
  const int bin = kBins - 1 - kOwn * thread;
  uint32_t counts[kOwn] = {};
#pragma unroll 4
  for (int r = 0; r < cluster.blocks; ++r) {
    const auto there =
        *reinterpret_cast<const Vec<uint32_t, kOwn>*>(cluster_place(&s.counts[bin - kOwn + 1], r));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) counts[i] += there.v[kOwn - 1 - i];
  }
  const auto weight = [](int of) { return rough_exp2((static_cast<float>(of) + 0.5f) * (-1.0f / kFine)); };
  float2 own[kOwn], upto = {};  // sums and sums of squares
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float w = weight(bin - i);
    own[i] = {static_cast<float>(counts[i]) * w, static_cast<float>(counts[i]) * w * w};
    upto.x += own[i].x;
    upto.y += own[i].y;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float a = __shfl_up_sync(0xffffffffu, upto.x, step), b = __shfl_up_sync(0xffffffffu, upto.y, step);
    if (lane >= step) {
      upto.x += a;
      upto.y += b;
    }
  }
  if (lane == 31) s.pairs[warp] = upto;
  __syncthreads();
  float2 total = {};
#pragma unroll 1
  for (int w = 0; w < kThreads / 32; ++w) {
    const float2 there = s.pairs[w];
    if (w < warp) {
      upto.x += there.x;
      upto.y += there.y;
    }
    total.x += there.x;
    total.y += there.y;
  }
  // What a part of the row weighs, by the part of it that is in the sample, is within a few deviations; the
  // deviation is the square root of the sum of the squares, and where the sample has nothing there may still
  // be some: below a bin, as if four more of its tokens had been found. The whole row weighs at least what
  // lies below any value, so estimated, and what the sample itself has above; at most six deviations more
  // than is estimated, where one is less than a twelfth of it. Otherwise there is no upper bound.
  const float factor = static_cast<float>(row.run) / static_cast<float>(32 * samples);
  const auto estimate = [&](float sum, float square, float deviations) {
    return factor * (sum + deviations * sqrtf(fmaxf(0.0f, square)));
  };
  const auto most_of_block = [&](float x) {
    x = warp_max(x);
    if (lane == 0) s.runs[0][warp] = x;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kThreads / 32; ++w) x = fmaxf(x, static_cast<float>(s.runs[0][w]));
    return x;
  };
  // of what weighs less than the top-p
  float least = 0.999f * rest, most = 1.001f * rest;
  if (isnan(rest)) {
    const float part = 1.0f - top_p;
    least = part * most_of_block(estimate(upto.x, upto.y, -3.0f) + (total.x - upto.x));
    most = total.x * total.x > 150.0f * total.y ? part * estimate(total.x, total.y, 6.0f) : INFINITY;
  }
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    // without this bin, what is below it
    const float2 below = {upto.x - own[i].x, upto.y - own[i].y};
    if (estimate(upto.x, upto.y, -kSure) >= most) atomicMin(&s.high_bin, kBins - 1 - bin + i);
    if (estimate(below.x + 4.0f * weight(bin - i), below.y, kSure) <= least)
      atomicMax(&s.low_bin, kBins - 1 - bin + i);
    upto = below;
  }
  __syncthreads();
  const float per = __fdividef(1.0f, kFine * scale);
  const auto edge = [&](int bin) {
    return round_down<T>((reference * kFine - static_cast<float>(bin)) * per);
  };
  // the bins from s.low_bin to s.high_bin, counted the other way round
  Bounds bounds;
  bounds.low = edge(kBins - s.low_bin);
  bounds.high = s.high_bin >= kBins - 1 ? INFINITY : edge(kBins - 1 - s.high_bin);
  bounds.reference = reference;
  return bounds;
}

}  // namespace sampling
}  // namespace halfbyte::cuda
