// Bounds of the cut of top-p, from a sample of a row.
#pragma once

#include "sampling_scan.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// Bounds that hold but for a chance in a few hundred, from 32 logits of each thread, before penalties; false
/// where there are none. All threads of the cluster call it.
template <typename T, bool kSeen>
__device__ __forceinline__ bool find_bounds(Cluster& cluster, const Row<T, kSeen>& row, float scale,
                                            float top_p, Bounds& bounds) {
  constexpr int N = 16 / sizeof(T), kSamples = 32 / N;  // vectors of a thread; four lanes have neighbours
  constexpr float kFine = 32.0f;                        // bins to a power of two
  Shared& s = cluster.s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = threadIdx.x;
  const int length = row.end - row.begin;
  Vec<T, N> sample[kSamples];
  float top = -INFINITY;
#pragma unroll
  for (int q = 0; q < kSamples; ++q) {
    const int v = row.begin + (lane / 4 + 8 * q) * length / (8 * kSamples) + lane % 4;
    sample[q] = v >= row.whole && v < min(row.end, row.whole_end)
                    ? *reinterpret_cast<const Vec<T, N>*>(row.x + row.index(v))
                    : row.nothing();
  }
  s.counts[thread] = 0;
  s.counts[thread + kThreads] = 0;
#pragma unroll
  for (int q = 0; q < kSamples; ++q) top = fmaxf(top, largest_of(sample[q]));
  top = warp_max(top);
  if (lane == 0) s.pairs[warp].x = top;
  if (thread == 0) {
    s.low_bin = 0;
    s.high_bin = kBins;
  }
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.pairs[w].x);
  if (cluster.blocks > 1) {
    cluster.tell(key_of(top));
#pragma unroll 1
    for (int r = 0; r < cluster.blocks; ++r)
      top = fmaxf(top, value_of(static_cast<uint32_t>(cluster.slot(r)[0])));
  }
  if (!(fabsf(top * scale) < 0x1p22f)) return false;
  const float reference = reference_of(top, scale);
#pragma unroll
  for (int q = 0; q < kSamples; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // the last bin is also for what is -infinity or NaN, and weighs nothing
      const float bin = fmaf(to_float(sample[q].v[j]), -kFine * scale, kFine * reference);
      if (bin < kBins - 1.0f) atomicAdd(&s.counts[static_cast<int>(fmaxf(0.0f, bin))], 1u);
    }
  }
  cluster.barrier();
  // two bins a thread, the lower logits first
  const int bin = kBins - 2 - 2 * thread;
  uint2 counts = make_uint2(0, 0);
#pragma unroll 4
  for (int r = 0; r < cluster.blocks; ++r) {
    const uint2 there = *reinterpret_cast<const uint2*>(cluster_place(&s.counts[bin], r));
    counts.x += there.x;
    counts.y += there.y;
  }
  const float upper_weight = rough_exp2((static_cast<float>(bin) + 0.5f) * (-1.0f / kFine)),
              lower_weight = rough_exp2((static_cast<float>(bin) + 1.5f) * (-1.0f / kFine));
  const float2 lower = {static_cast<float>(counts.y) * lower_weight,
                        static_cast<float>(counts.y) * lower_weight * lower_weight};
  const float2 upper = {static_cast<float>(counts.x) * upper_weight,
                        static_cast<float>(counts.x) * upper_weight * upper_weight};
  // sums and sums of squares up to here
  float2 upto = {lower.x + upper.x, lower.y + upper.y};
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
  for (int w = 0; w < kWarps; ++w) {
    const float2 there = s.pairs[w];
    if (w < warp) {
      upto.x += there.x;
      upto.y += there.y;
    }
    total.x += there.x;
    total.y += there.y;
  }
  // What a part of the row weighs, by the part of it that is in the sample, is within a few deviations; the
  // deviation is the square root of the sum of the squares. The whole row weighs at least what lies below any
  // value, so estimated, and what the sample itself has above.
  const float factor = static_cast<float>(row.run) * (1.0f / (32.0f * kSamples));
  const auto estimate = [&](float sum, float square, float deviations) {
    return factor * (sum + deviations * sqrtf(fmaxf(0.0f, square)));
  };
  const float rest = 1.0f - top_p;
  const float least = rest * block_max(estimate(upto.x, upto.y, -3.0f) + (total.x - upto.x));
  const float most =
      total.x * total.x > 100.0f * total.y ? rest * estimate(total.x, total.y, 6.0f) : INFINITY;
  const float2 between = {upto.x - upper.x, upto.y - upper.y};
  const float2 below = {between.x - lower.x, between.y - lower.y};
  if (estimate(between.x, between.y, 3.0f) <= least)
    atomicMax(&s.low_bin, 2 * thread + 1);
  else if (estimate(below.x, below.y, 3.0f) <= least)
    atomicMax(&s.low_bin, 2 * thread);
  if (estimate(between.x, between.y, -3.0f) >= most)
    atomicMin(&s.high_bin, 2 * thread);
  else if (estimate(upto.x, upto.y, -3.0f) >= most)
    atomicMin(&s.high_bin, 2 * thread + 1);
  __syncthreads();
  const float per = __fdividef(1.0f, kFine * scale);
  bounds.low = (reference * kFine - static_cast<float>(kBins - s.low_bin)) * per;
  bounds.high = s.high_bin >= kBins - 1
                    ? INFINITY
                    : (reference * kFine - static_cast<float>(kBins - 1 - s.high_bin)) * per;
  bounds.reference = reference;
  return true;
}

}  // namespace sampling
}  // namespace halfbyte::cuda
