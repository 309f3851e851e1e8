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

constexpr float kFine = 16.0f;  // bins to a power of two
constexpr float kSure = 3.5f;   // deviations that the estimates for a bound allow for
/// Vectors of a sample that a thread has, where a block has the row.
template <int kThreads, typename T>
constexpr int kSamplesOf = kSampled / (16 / static_cast<int>(sizeof(T))) / kThreads;

__device__ __forceinline__ float rough_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// What a token of a bin weighs.
__device__ __forceinline__ float weight_of_bin(int bin) {
  return rough_exp2((static_cast<float>(bin) + 0.5f) * (-1.0f / kFine));
}
/// What a part of the row weighs, by the sum and the sum of squares of its part that is in the sample, give
/// or take so many deviations.
struct Estimate {
  float factor;  // the row to the sample

  template <int kThreads, typename T>
  static __device__ __forceinline__ Estimate of(const Problem<T>& p, int samples) {
    return {static_cast<float>(p.run) / static_cast<float>(32 * samples)};
  }
  __device__ __forceinline__ float operator()(float2 sums, float deviations) const {
    return factor * fmaf(deviations, rough_sqrt(fmaxf(0.0f, sums.y)), sums.x);
  }
};

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
#pragma unroll
  for (int i = 0; i < kBins; i += kThreads) s.counts[i + thread] = 0;
#pragma unroll
  for (int q = 0; q < kMost; ++q) top = fmaxf(top, largest_of(sample[q]));
  top = warp_max(top);
  // What a pass reads first is fetched while the sample is counted, but not before that is there: of many
  // blocks on a multiprocessor, the last to begin would wait for what the others have asked for.
  if (cluster.blocks > 1) prefetch_run(row, lane == 0 && top > -INFINITY);
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
  // short code, as all of it has to be fetched while nothing else runs
#pragma unroll 1
  for (int q = 0; q < kMost; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // the last bin is also for what is -infinity or NaN, and is not looked at
      const float bin = fmaf(sample[0].value(j), -kFine * scale, kFine * reference);
      atomicAdd(&s.counts[static_cast<int>(fmaxf(0.0f, fminf(kBins - 1, bin)))], 1u);
    }
#pragma unroll
    for (int i = 1; i < kMost; ++i) sample[i - 1] = sample[i];
  }
  if (cluster.blocks == 1) prefetch_run(row, lane == 0);
  return reference;
}

/// The upper edge of a bin.
template <typename T>
__device__ __forceinline__ float edge_of_bin(int bin, float scale, float reference) {
  return round_down<T>((reference * kFine - static_cast<float>(bin)) * __fdividef(1.0f, kFine * scale));
}
/// The bounds where what weighs less than the top-p is from `least` to `most`: places in the order of the
/// logits, to `low` and `high`. `upto`: up to each of the thread's bins, the first of them and what is before
/// it; the highest is `bin`.
template <int kThreads>
__device__ __forceinline__ void find_places(const float2 (&upto)[kBins / kThreads + 1],
                                            const Estimate& estimate, float least, float most, int& low,
                                            int& high) {
  constexpr int kOwn = kBins / kThreads;
  int highest = kBins, lowest = -1;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int place = kOwn * static_cast<int>(threadIdx.x) + i;
    // as if four more of a bin's tokens were below it
    const float2 below = {upto[i].x + 4.0f * weight_of_bin(kBins - 1 - place), upto[i].y};
    if (estimate(upto[i + 1], -kSure) >= most) highest = min(highest, place);
    if (estimate(below, kSure) <= least) lowest = place;
  }
  // of a warp by one lane, as those of all would wait for each other
  const int lane = threadIdx.x % 32;
  const unsigned with_high = __ballot_sync(0xffffffffu, highest < kBins),
                 with_low = __ballot_sync(0xffffffffu, lowest >= 0);
  if (with_high != 0 && lane == __ffs(static_cast<int>(with_high)) - 1) atomicMin(&high, highest);
  if (with_low != 0 && lane == 31 - __clz(static_cast<int>(with_low))) atomicMax(&low, lowest);
}

/// Bounds that hold but for a chance in a few hundred, from a sample of the row before penalties; NaN where
/// there are none. `rest`: what weighs less than the top-p of the row, in units of the reference; NaN while
/// it is not known. `count`: that of top-k, whose cut then has the bounds; 0: top-p. All threads of the
/// cluster call it.
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ Bounds find_bounds(int round, float scale, float top_p, float rest, Weight count) {
  const Problem<T>& p = problem<T>();
  Cluster<kThreads> cluster(p.blocks, round);
  Shared& s = cluster.s;
  constexpr int kOwn = kBins / kThreads;  // bins of a thread
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = threadIdx.x;
  const int samples = max(1, kSamplesOf<kThreads, T> >> p.log_blocks);
  const float reference = count_sample(cluster, Row<T, kSeen>(), samples, scale);
  if (isnan(reference)) return {NAN, NAN, NAN};
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
  if (thread == 0) counts[0] = 0;
  // sums and sums of squares
  float2 upto[kOwn + 1], own = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float w = count > 0 ? 1.0f : weight_of_bin(bin - i), of_bin = static_cast<float>(counts[i]) * w;
    own.x += of_bin;
    own.y = fmaf(of_bin, w, own.y);
    upto[i + 1] = own;
  }
  float2 before = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float a = __shfl_up_sync(0xffffffffu, before.x, step),
                b = __shfl_up_sync(0xffffffffu, before.y, step);
    if (lane >= step) {
      before.x += a;
      before.y += b;
    }
  }
  if (lane == 31) s.pairs[warp] = before;
  before.x -= own.x;
  before.y -= own.y;
  __syncthreads();
  // for a histogram of what will be remembered, where the counts were
  if (cluster.blocks == 1) {
#pragma unroll
    for (int i = 0; i < kPlaces; i += kThreads) s.places[i + thread] = 0;
  }
  float2 total = {};
#pragma unroll 4
  for (int w = 0; w < kThreads / 32; ++w) {
    const float2 there = s.pairs[w];
    before.x += w < warp ? there.x : 0.0f;
    before.y += w < warp ? there.y : 0.0f;
    total.x += there.x;
    total.y += there.y;
  }
  upto[0] = before;
#pragma unroll
  for (int i = 1; i <= kOwn; ++i) {
    upto[i].x += before.x;
    upto[i].y += before.y;
  }
  // The deviation of what a part of the row weighs is the square root of the sum of the squares, and where
  // the sample has nothing there may still be some. The whole row weighs at least what lies below any value,
  // so estimated, and what the sample itself has above; at most six deviations more than is estimated, where
  // one is less than a twelfth of it. Otherwise there is no upper bound.
  const Estimate estimate = Estimate::of<kThreads>(p, samples);
  if (count > 0) {
    // what lies from a bin up
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float above = total.x - upto[i].x;
      if (estimate({above, above}, -kSure) > static_cast<float>(count))
        atomicMax(&s.low_bin, kOwn * thread + i);
    }
  } else {
    float least = 0.999f * rest, most = 1.001f * rest;
    if (isnan(rest)) {
      const float part = 1.0f - top_p;
      float all = 0.0f;
#pragma unroll
      for (int i = 1; i <= kOwn; ++i) all = fmaxf(all, estimate(upto[i], -2.0f) + (total.x - upto[i].x));
      all = warp_max(all);
      if (lane == 0) s.runs[0][warp] = all;
      __syncthreads();
#pragma unroll 4
      for (int w = 0; w < kThreads / 32; ++w) all = fmaxf(all, static_cast<float>(s.runs[0][w]));
      least = part * all;
      most = total.x * total.x > 150.0f * total.y ? part * estimate(total, 6.0f) : INFINITY;
    }
    find_places<kThreads>(upto, estimate, least, most, s.low_bin, s.high_bin);
  }
  __syncthreads();
  // the places are those of the bins, counted the other way round
  const int low = s.low_bin, high = s.high_bin;
  return {edge_of_bin<T>(kBins - low, scale, reference),
          high >= kBins - 1 ? INFINITY : edge_of_bin<T>(kBins - 1 - high, scale, reference), reference};
}

}  // namespace sampling
}  // namespace halfbyte::cuda
