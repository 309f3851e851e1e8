// The search for the cut of top-p, or of a long top-k, in what a pass has remembered of a row: columns of
// items in shared memory, one for two lanes. Where one block has the row, every thread puts its items into a
// histogram as soon as its part of the row is read. Of bfloat16 that has a place for every value, and the cut
// is one of them; else it has buckets, and the items of the bucket with the cut are few and are ranked.
#pragma once

#include "sampling_bounds.cuh"
#include "sampling_filter.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// What a thread has to do with what is remembered of a row. Weights are in units of the reference. A cut is
/// a logit before the temperature; a token is kept when it is as large.
template <int kThreads, typename T, bool kSeen>
struct Remembered {
  using Store = Area<kThreads, T, kSeen>;
  using Item = ItemOf<T, kSeen>;
  static constexpr int kWarps = kThreads / 32;
  /// The bits of a float that an item has not.
  static constexpr int kZero = sizeof(Item) == 4 ? 0 : std::is_same_v<T, bf16_t> ? 16 : 13;

  Shared& s;
  Bounds bounds;
  float scale;
  int count;  // of the thread

  __device__ __forceinline__ Remembered(const Bounds& between, float scale_of_row, int items)
      : s(shared()), bounds(between), scale(scale_of_row), count(items) {}

  static __device__ __forceinline__ Column<Item> column(int thread) {
    return Column<Item>(Store::items(), thread, problem<T>().capacity);
  }
  __device__ __forceinline__ Column<Item> column() const { return column(static_cast<int>(threadIdx.x)); }
  __device__ __forceinline__ float weight(float x) const {
    return rough_exp2(fmaf(x, scale, -bounds.reference));
  }
  /// What the warp has above the upper bound.
  __device__ __forceinline__ double above(int slots) const {
    if (!(bounds.high < INFINITY)) return 0.0;
    const int lane = threadIdx.x % 32;
    return warp_total(lane < slots ? s.above_of[threadIdx.x / 32][lane] : 0.0);
  }

  /// The cut with which `needed` is kept, between all that is remembered from `low` up: `above` is what the
  /// row has above it, `value` its largest logit. False when it does not lie there.
  __device__ __forceinline__ bool find(const Cluster<kThreads>& cluster, float low, float value, double above,
                                       double needed, float& cut) const {
    return find_cut<kZero>(cluster, column(), count, low, fminf(value, bounds.high), scale, bounds.reference,
                           needed - above, cut);
  }
  /// What the thread remembers, to a histogram that find_bounds() has cleared, while the sum of the row is
  /// not known yet. Only where one block has the row; a barrier before find_tallied() follows.
  __device__ __forceinline__ void tally() const {
    const Tally<kThreads, Item> tally(bounds, scale);
    float beyond = 0.0f;
    column().each_vector(count, [&](const Words<Item>& words) { tally.add(words, beyond); });
    if constexpr (!tally.kFew) {
      beyond = warp_total(beyond);
      if (threadIdx.x % 32 == 0) s.beyond[threadIdx.x / 32] = beyond;
    }
  }
  /// find() in that histogram, of which nothing is left then. Where the cut turns out to be above all its
  /// places, `low` is raised to their end.
  __device__ __forceinline__ bool find_tallied(float value, double goal, float& cut, float& low) const {
    const Tally<kThreads, Item> tally(bounds, scale);
    const auto& places = tally.places;
    if constexpr (tally.kFew) {
      const int largest = places.bits_of(fminf(value, bounds.high));
      if (largest <= places.first || largest >= places.first + kPlaces - 1) return false;
      tally.find(goal);
      if (s.bucket < 1) return false;
      cut = places.at(s.bucket);
      return true;
    } else {
      if (!places.is_usable()) return false;
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) goal -= s.beyond[w];
      if (!(goal > 0.0)) {
        low = places.top;
        return false;
      }
      tally.find(goal);
      if (s.bucket < 0) return false;
      return find_in_bucket(tally, s.bucket, goal - s.before, cut);
    }
  }
  /// What threshold() searches, before the temperature.
  struct Items {
    const Remembered& remembered;
    template <typename Body>
    __device__ __forceinline__ void each(const Body& body) const {
      remembered.each_item([&](float x) { body(fminf(x, kLargest)); });
    }
  };
  /// The cut of top-k, of `wanted` of all that is remembered.
  __device__ __forceinline__ float find_count(const Cluster<kThreads>& cluster, float value,
                                              Weight wanted) const {
    return threshold<false>(cluster, Items{*this}, value, bounds.low, value, wanted);
  }
  /// What the warp keeps; of all that `keeps` too.
  template <typename Keeps>
  __device__ __forceinline__ double weigh(float cut, int slots, const Keeps& keeps) const {
    float sum = 0.0f;
    each_item([&](float x) { sum += x >= cut && keeps(x) ? weight(x) : 0.0f; });
    return static_cast<double>(warp_total(sum)) + above(slots);
  }
  /// The same of each slot of one warp, to s.sums_of, by all warps.
  template <typename Keeps>
  __device__ __forceinline__ void weigh_slots(int of_warp, float cut, int slots, const Keeps& keeps) const {
    const int lane = threadIdx.x % 32, thread = of_warp * 32 + lane;
    const Column<Item> items = column(thread);
    const uint8_t* const ends = Store::ends() + thread;
#pragma unroll 1
    for (int slot = threadIdx.x / 32; slot < slots; slot += kWarps) {
      float sum = 0.0f;
      const int stop = ends[slot * kThreads];
#pragma unroll 1
      for (int i = slot > 0 ? ends[(slot - 1) * kThreads] : 0; i < stop; i += 4) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = i + j < stop ? items.item(i + j) : -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += x[j] >= cut && keeps(x[j]) ? weight(x[j]) : 0.0f;
      }
      double of_slot = static_cast<double>(warp_total(sum));
      if (bounds.high < INFINITY) of_slot += s.above_of[of_warp][slot];
      if (lane == 0) s.sums_of[of_warp][slot] = of_slot;
    }
    __syncthreads();
  }

 private:
  template <typename Body>
  __device__ __forceinline__ void each_item(const Body& body) const {
    column().each_vector(count, [&](const Words<Item>& words) {
#pragma unroll
      for (int j = 0; j < Column<Item>::N; ++j) body(words.value(j));
    });
  }
  /// The same in one bucket, whose items are few: they are ranked where the histogram was.
  __device__ __forceinline__ bool find_in_bucket(const Tally<kThreads, Item>& tally, int bucket, double goal,
                                                 float& cut) const {
    const Line& line = tally.places;
    const float place = static_cast<float>(bucket);
    // what may be there is looked at again
    const auto each_of_bucket = [&](const auto& body) {
      column().each(count, fmaf(place - 1.0f, line.width, line.low), fmaf(place + 2.0f, line.width, line.low),
                    [&](float x) {
                      if (Line::number_of(line.bucket_of(x)) == bucket && x <= line.top) body(x);
                    });
    };
    each_of_bucket([&](float x) {
      const int at = atomicAdd(&s.in_bucket, 1);
      if (at < kListed) s.gathered[at] = x;
    });
    __syncthreads();
    const int size = s.in_bucket;
    if (size > kListed) {
      // many are one value
      const float first = s.gathered[0];
      bool differs = false;
      each_of_bucket([&](float x) { differs = differs || x != first; });
      cut = first;
      return __syncthreads_or(differs) == 0;
    }
    const float exponent = line.exponent(0x1p23f + place);
    const double wanted = fmin(fmax(1.0, ceil(goal / static_cast<double>(tally.unit(bucket)))),
                               static_cast<double>(s.of_bucket));
    // eight lanes an item
    const int part = threadIdx.x % 8;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * 4; first < size; first += kThreads / 8) {
      const int i = first + static_cast<int>(threadIdx.x) % 32 / 8;
      const float x = i < size ? s.gathered[i] : INFINITY;
      double above = 0.0, with = 0.0;
#pragma unroll 2
      for (int j = part; j < size; j += 8) {
        const float other = s.gathered[j];
        const double w = line.weigh(other, exponent);
        if (other > x) above += w;
        if (other >= x) with += w;
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) {
        above += __shfl_xor_sync(0xffffffffu, above, step);
        with += __shfl_xor_sync(0xffffffffu, with, step);
      }
      if (above < wanted && wanted <= with) s.cut = x;
    }
    __syncthreads();
    cut = s.cut;
    return true;
  }
};

}  // namespace sampling
}  // namespace halfbyte::cuda
