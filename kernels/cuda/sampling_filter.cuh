// Filters of `sample`: the search for the smallest logit that is kept, and the block that ranks a list.
#pragma once

#include "sampling.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// The running sum that the token drawn is the first to exceed; rounding must not put it beyond them all.
__device__ __forceinline__ Weight draw_target(double part, Weight total) {
  return min(static_cast<Weight>(part * static_cast<double>(total)), total - 1);
}
/// Tokens with less than this above them are the top-p of what weighs `total` together. It is above 0, so
/// that something is kept, and not above the total: that is 2^40 at least, and a top-p under 1 is 2^-24 from
/// it.
__device__ __forceinline__ Weight top_p_target(float top_p, Weight total) {
  return static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

/// This block's part of a new histogram; s.bucket is -1 from the next barrier on.
template <int kThreads>
__device__ __forceinline__ void clear_buckets(Shared& s) {
#pragma unroll
  for (int i = 0; i < kBuckets; i += kThreads) s.sums[i + threadIdx.x] = make_uint2(0, 0);
  __syncthreads();
  if (threadIdx.x == 0) s.bucket = -1;
}
/// The thread's buckets, from its last: what the cluster has of them. The sums of the first threads are
/// those of the largest keys.
template <int kThreads, typename Body>
__device__ __forceinline__ void sum_buckets(const Cluster<kThreads>& cluster,
                                            Weight (&mine)[kBuckets / kThreads], const Body& weight_of_sum) {
  constexpr int kOwn = kBuckets / kThreads;
  const int last = kBuckets - 1 - kOwn * static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) mine[i] = 0;
#pragma unroll 4
  for (int r = 0; r < cluster.blocks; ++r) {
    const auto there =
        *reinterpret_cast<const Vec<uint2, kOwn>*>(cluster_place(&cluster.s.sums[last - kOwn + 1], r));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) mine[i] += weight_of_sum(there.v[kOwn - 1 - i], last - i);
  }
}
/// The bucket before which there is less than `target`, and with it not: to s.bucket, and to s.above what is
/// above it.
template <int kThreads>
__device__ __forceinline__ void find_bucket(Shared& s, const Weight (&mine)[kBuckets / kThreads],
                                            Weight above, Weight target) {
  constexpr int kOwn = kBuckets / kThreads;
  Weight own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += mine[i];
  Weight before = above + block_prefix<kThreads>(s, own).before;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < target && target <= before + mine[i]) {
      s.bucket = kBuckets - 1 - kOwn * static_cast<int>(threadIdx.x) - i;
      s.above = before;
    }
    before += mine[i];
  }
}

/// The smallest l from `lowest` to `highest` that has less than `target` above it, of those that
/// tokens.each() calls its argument with; `lowest` when all together are less. A token weighs its weight, or
/// 1. A search over histograms of the keys, narrower by kBucketBits each time.
template <bool kWeighted, int kThreads, typename Tokens>
__device__ __forceinline__ float threshold(const Cluster<kThreads>& cluster, const Tokens& tokens, float most,
                                           float lowest, float highest, Weight target) {
  Shared& s = cluster.s;
  uint32_t low = key_of(lowest), high = key_of(highest);
  Weight above = 0;
  while (low < high) {
    const int shift = max(0, 32 - kBucketBits - __clz(static_cast<int>(high - low)));
    clear_buckets<kThreads>(s);
    tokens.each([&](float l) {
      const uint32_t key = key_of(l);
      if (key < low || key > high) return;
      uint2& sum = s.sums[(key - low) >> shift];
      if constexpr (kWeighted) {
        const Weight w = weight_of(l, most);
        const uint32_t part = static_cast<uint32_t>(w), before = atomicAdd(&sum.x, part);
        const uint32_t upper = static_cast<uint32_t>(w >> 32) + (before + part < part ? 1 : 0);
        if (upper != 0) atomicAdd(&sum.y, upper);
      } else {
        atomicAdd(&sum.x, 1u);
      }
    });
    cluster.barrier();
    Weight mine[kBuckets / kThreads];
    sum_buckets(cluster, mine, [](uint2 sum, int) { return static_cast<Weight>(sum.y) << 32 | sum.x; });
    find_bucket<kThreads>(s, mine, above, target);
    cluster.barrier();
    if (s.bucket < 0) return lowest;
    low += static_cast<uint32_t>(s.bucket) << shift;
    high = min(high, low + (1u << shift) - 1);
    above = s.above;
  }
  return value_of(low);
}

/// The smallest of the cluster's items up to `high_value` that has less than `target` above it; none when all
/// together are less. Weights are 2^(x * scale - reference). A thread has `count` items, of which those from
/// `low_value` up are looked at, floats whose lowest kZero bits are zero. The search is threshold()'s, but a
/// sum is in words of 16 bits, so that no addition waits for another, and the last round of items that are
/// all the same within a bucket only counts them.
template <int kZero, int kThreads, typename Items>
__device__ __forceinline__ bool find_cut(const Cluster<kThreads>& cluster, const Items& items, int count,
                                         float low_value, float high_value, float scale, float reference,
                                         double target, float& cut) {
  Shared& s = cluster.s;
  constexpr uint32_t kRest = (1u << kZero) - 1;
  uint32_t low = key_of(low_value) & ~kRest, high = key_of(high_value);
  // an item of the upper bound weighs 2^31 in the units of the histograms
  const auto weigh = [&](float x) { return __float2uint_rn(rough_exp2(fmaf(x - high_value, scale, 31.0f))); };
  const auto value_at = [](uint32_t key) { return value_of(key & 0x80000000u ? key : key | kRest); };
  if (!(target > 0.0)) return false;
  const double exponent =
      31.0 + static_cast<double>(reference) - static_cast<double>(high_value) * static_cast<double>(scale);
  const Weight goal =
      static_cast<Weight>(ceil(target * static_cast<double>(exp2f(static_cast<float>(exponent)))));
  Weight above = 0;
  bool last = false;
#pragma unroll 1
  while (!last) {
    const int shift = max(kZero, 32 - kBucketBits - __clz(static_cast<int>(high - low | 1)));
    last = shift == kZero;
    const bool counting = kZero > 0 && last;  // all that is in a bucket is the same
    clear_buckets<kThreads>(s);
    items.each(count, value_of(low), value_of(high), [&](float x) {
      const uint32_t key = key_of(x);
      if (key < low || key > high) return;
      uint2* const sum = &s.sums[(key - low) >> shift];
      if (counting) {
        atomicAdd(&sum->x, 1u);
      } else {
        const uint32_t w = weigh(x);
        atomicAdd(&sum->x, w & 0xffff);
        atomicAdd(&sum->y, w >> 16);
      }
    });
    cluster.barrier();
    Weight mine[kBuckets / kThreads];
    sum_buckets(cluster, mine, [&](uint2 sum, int bucket) {
      const Weight all = (static_cast<Weight>(sum.y) << 16) + sum.x;
      if (!counting || all == 0) return all;
      return all * weigh(value_at(low + (static_cast<uint32_t>(bucket) << shift)));
    });
    find_bucket<kThreads>(s, mine, above, goal);
    cluster.barrier();
    if (s.bucket < 0) return false;
    low += static_cast<uint32_t>(s.bucket) << shift;
    high = min(high, low + (1u << shift) - 1);
    above = s.above;
  }
  cut = value_at(low);
  return true;
}

/// Filters and draws from the list of `size`, by the first block: top-k where `count` is not 0, and top-p
/// where it is below 1. Without top-k `total` is what the whole row weighs. The token, in one thread; -1 in
/// all others.
template <int kThreads>
__device__ __forceinline__ int64_t draw_listed(Shared& s, List& list, Ranked& ranked, int size, float most,
                                               Weight count, float top_p, Weight total, float min_p) {
  float floor = -kLargest;
  const int thread = threadIdx.x;
  // how many are larger, or as large and before; and how many have a lower index, above. Several threads a
  // token when there are many threads.
  int width = 32;
  while (width < size && width < kThreads) width *= 2;
  const int slices = kThreads / width, slice = thread / width, each = (size + slices - 1) / slices;
  for (int i = thread; i < size; i += kThreads) ranked.ranks[i] = 0;
  __syncthreads();
  for (int i = thread % width; i < size; i += width) {
    const float l = list.l[i];
    const int32_t index = list.index[i];
    uint32_t rank = 0;
    const int stop = min(size, (slice + 1) * each);
#pragma unroll 4
    for (int j = slice * each; j < stop; ++j) {
      const float other = list.l[j];
      const bool first = list.index[j] < index;
      rank += (other > l || (other == l && first) ? 1u : 0u) + (first ? 1u << 16 : 0u);
    }
    atomicAdd(&ranked.ranks[i], rank);
  }
  if (thread == 0) s.least = ~0u;
  __syncthreads();
  constexpr int kOwn = kListed / kThreads;
  float l[kOwn];
  int32_t index[kOwn];
  uint32_t rank[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int from = thread + i * kThreads;
    if (from >= size) continue;
    l[i] = list.l[from];
    index[i] = list.index[from];
    rank[i] = ranked.ranks[from];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (thread + i * kThreads >= size) continue;
    ranked.sorted[rank[i] & 0xffff] = l[i];
    list.l[rank[i] >> 16] = l[i];
    list.index[rank[i] >> 16] = index[i];
  }
  __syncthreads();
  if (count > 0 && count <= static_cast<Weight>(size)) floor = ranked.sorted[count - 1];
  const int at = kOwn * thread;
  Weight weights[kOwn], own = 0;
  if (top_p < 1.0f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      l[i] = at + i < size ? ranked.sorted[at + i] : -INFINITY;
      weights[i] = l[i] >= floor ? weight_of(l[i], most) : 0;
      own += weights[i];
    }
    const Prefix prefix = block_prefix<kThreads>(s, own);
    const Weight target = top_p_target(top_p, count > 0 ? prefix.total : total);
    Weight before = prefix.before;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (weights[i] > 0 && before < target) atomicMin(&s.least, key_of(l[i]));
      before += weights[i];
    }
    __syncthreads();
    floor = value_of(s.least);
  }
  own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    weights[i] = 0;
    if (at + i < size && list.l[at + i] >= floor) {
      const float w = scaled_exp(list.l[at + i] - most);
      weights[i] = w < min_p && list.l[at + i] < most ? 0 : __float2ull_rz(w);
    }
    own += weights[i];
  }
  const Prefix prefix = block_prefix<kThreads>(s, own);
  const Weight target = draw_target(s.uniform, prefix.total);
  if (target < prefix.before || target >= prefix.before + own) return -1;
  Weight upto = prefix.before;
  int chosen = at;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    upto += weights[i];
    chosen += upto <= target ? 1 : 0;
  }
  return list.index[chosen];
}

}  // namespace sampling
}  // namespace halfbyte::cuda
