// The search for the cut of top-p, or of a long top-k, in what a pass has remembered of a row: columns of
// items in shared memory, one for two lanes. With the sum of the row known, better bounds leave a window of
// the cut. Of 16 bits it has so few values that every warp counts its items of each; of 32 the search is over
// histograms. Blocks of 256 threads have the former, of 512 the latter.
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
  /// Values of a window that a warp can count one by one.
  static constexpr int kWindow = sizeof(Shared::warp_counts) / sizeof(uint32_t) / kWarps;

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

  /// The cut with which `needed` is kept, between all that is remembered: `above` is what the row has above
  /// it, `value` its largest logit. False when it does not lie there.
  __device__ __forceinline__ bool find(const Cluster<kThreads>& cluster, float value, double above,
                                       double needed, float& cut) const {
    float none;
    return find_cut<kZero, false>(cluster, column(), count, bounds.low, fminf(value, bounds.high), scale,
                                  bounds.reference, needed - above, cut, none);
  }
  /// The same of what is remembered from `low` up.
  __device__ __forceinline__ bool find_from(const Cluster<kThreads>& cluster, float low, float value,
                                            double needed, float& cut) const {
    float none;
    return find_cut<kZero, false>(cluster, column(), count, low, value, scale, bounds.reference, needed, cut,
                                  none);
  }
  /// The same between better bounds, now that the sum of the row is known, and with it the `rest` beyond what
  /// is needed: little goes through the histograms. Only where one block has the row: where several have it,
  /// each has few items. `of_warp` is then what the warp keeps.
  __device__ __forceinline__ bool find_narrowly(const Cluster<kThreads>& cluster, float value, double above,
                                                double needed, double rest, int slots, float& cut,
                                                double& of_warp) const {
    if (cluster.blocks > 1) return false;
    const Bounds narrow = narrow_bounds<kThreads, T>(bounds, scale, static_cast<float>(rest));
    const float low = narrow.low, high = fminf(value, narrow.high);
    if (!(low <= high)) return false;
    if constexpr (sizeof(Item) == 2) {
      if (low > 0.0f || high < 0.0f) {
        const int from = bits_of(low), size = (bits_of(high) - from) * (low > 0.0f ? 1 : -1) + 1;
        if (size <= kWindow) return find_in_window(low, high, from, needed, slots, cut, of_warp);
      }
    }
    float own;
    if (!find_cut<kZero, true>(cluster, column(), count, low, high, scale, bounds.reference, needed - above,
                               cut, own)) {
      return false;
    }
    column().each(
        count, cut, high, [](float) {}, [&](float x) { own += weight(x); });
    of_warp = static_cast<double>(warp_total(own)) + this->above(slots);
    return true;
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
  static __device__ __forceinline__ int bits_of(float x) {
    const T value = from_float<T>(x);
    return *reinterpret_cast<const uint16_t*>(&value);
  }
  static __device__ __forceinline__ float value_of_bits(int bits) {
    const uint16_t word = static_cast<uint16_t>(bits);
    return to_float(*reinterpret_cast<const T*>(&word));
  }
  /// Adds the weight w of x to a sum where it is above `high`, and counts it at `at` where it is from `low`
  /// to `high`. Written out, so that nothing is a branch.
  static __device__ __forceinline__ void see(float x, float w, float low, float high, uint32_t at,
                                             uint32_t one, float& sum) {
    asm volatile(
        "{\n.reg .pred p, q;\n"
        "setp.gt.f32 p|q, %1, %4;\n"
        "setp.ge.and.f32 q, %1, %3, q;\n"
        "@p add.f32 %0, %0, %2;\n"
        "@q red.shared.add.u32 [%5], %6;\n}\n"
        : "+f"(sum)
        : "f"(x), "f"(w), "f"(low), "f"(high), "r"(at), "r"(one)
        : "memory");
  }
  /// find_narrowly() where the items from `low` to `high`, whose bits begin at `from`, have few values: every
  /// warp counts its own of each, so that what it keeps is known at once.
  __device__ __forceinline__ bool find_in_window(float low, float high, int from, double needed, int slots,
                                                 float& cut, double& of_warp) const {
    static_assert(kWindow == 128, "a lane has four values");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sign = low > 0.0f ? 1 : -1;
    uint4* const counts = reinterpret_cast<uint4*>(s.warp_counts);
    // the sums of the sample are not needed any more
    counts[warp * 32 + lane] = make_uint4(0, 0, 0, 0);
    __syncwarp();
    const int step = 4 * sign;
    const uint32_t base =
        shared_address(s.warp_counts) + static_cast<uint32_t>(warp * kWindow * 4 - from * step);
    uint32_t one;  // see count_sample()
    asm volatile("mov.u32 %0, 1;" : "=r"(one));
    float sums[2] = {};
    column().each_vector(count, [&](const Words<Item>& words) {
#pragma unroll
      for (int j = 0; j < Column<Item>::N; ++j) {
        const float x = words.value(j);
        const int bits = static_cast<int>(j % 2 == 0 ? words.w[j / 2] & 0xffff : words.w[j / 2] >> 16);
        see(x, weight(x), low, high, base + static_cast<uint32_t>(bits * step), one, sums[j % 2]);
      }
    });
    const double own = static_cast<double>(warp_total(sums[0] + sums[1])) + this->above(slots);
    if (lane == 0) s.runs[1][warp] = own;
    __syncthreads();
    // every warp for itself: a lane has four values, the first the largest of all
    double goal = needed;
    uint32_t counted[4] = {};
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) {
      const uint4 there = counts[w * 32 + 31 - lane];
      goal -= s.runs[1][w];
      counted[0] += there.w;
      counted[1] += there.z;
      counted[2] += there.y;
      counted[3] += there.x;
    }
    if (!(goal > 0.0)) {
      __syncthreads();  // the counts are read
      return false;
    }
    float weights[4];
    double upto = 0.0, parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = counted[i] > 0 ? weight(value_of_bits(from + (127 - 4 * lane - i) * sign)) : 0.0f;
      parts[i] = static_cast<double>(weights[i]) * counted[i];
      upto += parts[i];
    }
    upto = warp_upto(upto);
    double before = __shfl_up_sync(0xffffffffu, upto, 1);
    if (lane == 0) before = 0.0;
    int place = -1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double with = i == 3 ? upto : before + parts[i];
      if (before < goal && goal <= with) place = 4 * lane + i;
      before = with;
    }
    const unsigned found = __ballot_sync(0xffffffffu, place >= 0);
    if (found == 0) {
      __syncthreads();
      return false;
    }
    place = __shfl_sync(0xffffffffu, place, __ffs(static_cast<int>(found)) - 1);
    cut = value_of_bits(from + (127 - place) * sign);
    const uint4 mine = counts[warp * 32 + 31 - lane];
    const uint32_t kept[4] = {mine.w, mine.z, mine.y, mine.x};
    double of_window = 0.0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of_window += 4 * lane + i <= place ? static_cast<double>(weights[i]) * kept[i] : 0.0;
    of_warp = own + warp_total(of_window);
    return true;
  }
};

}  // namespace sampling
}  // namespace halfbyte::cuda
