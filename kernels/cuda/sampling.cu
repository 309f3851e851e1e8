// sample, over rows of logits. Its rules are backend.h's and those of the CPU backend, draw for draw:
// ../random.h.
//
// A row is read once, by one block or by a cluster of blocks, and is not kept. A block has a part of it, a
// warp a run of that part, in at most kSlots slots. Kept are the sum of the weights of every slot, and the
// largest value that each thread has there: its group. What has to be looked at again is little and is read
// again. The token is drawn from the sums of the warps, then from those of the slots of the one warp that it
// falls into, and then from that slot, anew and in integers.
//
// Nothing is sorted but a short list. For top-k, for min-p and for what is peaked, the tokens that can be
// kept are few: those above a cut, which the threads' own maxima or min-p give, are looked up in their
// groups, and one block ranks, filters and draws. For top-p, and for a top-k of more than a list, a sample of
// the row gives bounds of the cut before the row is read: what lies between is remembered, what lies above is
// summed, and the search goes over what is remembered. Where a bound or the room fails, the row is read once
// more, between better bounds, as its sum is known then; and where those fail, the search goes over the row,
// read for every step of it.
//
// It is made for vocabularies of about 100k tokens, one row to some hundreds, of 16 bits above all: few rows
// are shared by clusters, of many a multiprocessor has four at once. Any length works; a row of up to kListed
// is a list as it is. Shared and Area say what lies where in shared memory.
//
// The code after a pass starts from nothing but what shared memory has, so that the pass has the registers.
#include "sampling_search.cuh"

namespace halfbyte::cuda {
namespace sampling {
namespace {

/// No token yet: it is to be found by passes over the row.
constexpr int64_t kSlowly = -2;
/// Nor yet: it is to be found by one more pass, between better bounds.
constexpr int64_t kAgain = -3;

/// A block's part in choosing a row's token.
template <int kThreads, typename T, bool kSeen>
struct Sampler {
  static constexpr int N = 16 / sizeof(T), kWarps = kThreads / 32;
  static_assert(kWarps <= kMostWarps);
  using Store = Area<kThreads, T, kSeen>;

  const Problem<T>& p;
  Shared& s;
  Cluster<kThreads> cluster;

  __device__ __forceinline__ explicit Sampler(int round = 0)
      : p(problem<T>()), s(shared()), cluster(p.blocks, round) {}

  /// What of a row is kept, after the temperature.
  struct Kept {
    float most;   // the largest logit
    float floor;  // the smallest that is kept
    float min_p;  // in units of 2^-40; 0 keeps all

    /// The weight of a token that is kept, 0 of another.
    __device__ __forceinline__ Weight weight(float l, float reference) const {
      if (!(l >= floor)) return 0;
      if (min_p > 0.0f && l < most && scaled_exp(l - most) < min_p) return 0;
      return weight_of(l, reference);
    }
  };
  __device__ __forceinline__ Temperature temperature() const { return Temperature(s.divisor); }

  /// How many slots this warp's run has, and the sum of what they have, in every lane.
  __device__ __forceinline__ int slots() const {
    const Row<T, kSeen> row;
    return (row.end - row.begin + p.slot() - 1) / p.slot();
  }
  __device__ __forceinline__ double of_slots(const double (&sums)[kMostWarps][kSlots]) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    return warp_total(lane < slots() ? sums[threadIdx.x / 32][lane] : 0.0);
  }

  /// The largest key that at least `wanted` of the block's threads reach with theirs; its lower 16 bits are
  /// left zero, which a cut can afford.
  __device__ __forceinline__ uint32_t least_of(int wanted, uint32_t key) const {
    uint32_t least = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 16; --bit) {
      const uint32_t higher = least | 1u << bit;
      if (__syncthreads_count(key >= higher) >= wanted) least = higher;
    }
    return least;
  }

  /// Puts the tokens with a value of at least `cut` before the temperature on the first block's list when
  /// they find room there; how many they are and what they weigh. Once for a row: nothing resets the counts.
  struct Listed {
    Weight count, weight;
  };
  __device__ __forceinline__ Listed list(float cut, float most) {
    const Row<T, kSeen> row;
    const Temperature warmth = temperature();
    const auto* const groups = Store::groups();
    const int steps = (row.end - row.begin + kStep - 1) / kStep;
    const int slots = (steps + (1 << p.fold) - 1) >> p.fold;
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
      const int group = slot * kThreads + static_cast<int>(threadIdx.x);
      if (to_float(groups[group]) >= cut) {
        const int at = atomicAdd(&s.queued, 1);
        if (at < kListed) s.queue[at] = group;
      }
    }
    __syncthreads();
    // a thread takes four elements at once of a group that is on the queue
    const int queued = s.queued, fours = N / 4 * kLoads << p.fold;
    Weight weight = 0;
    int count = 0;
    if (queued <= kListed) {
      List* const to = cluster_place(&Store::listed(), 0);
      int* const counter = cluster_place(&s.listed, 0);
#pragma unroll 1
      for (int i = threadIdx.x; i < queued * fours; i += kThreads) {
        const int group = s.queue[i / fours], part = i % fours / (N / 4);
        const int thread = group % kThreads, warp = thread / 32;
        const int v = row.run_begin(warp) + ((group / kThreads << p.fold) + part / kLoads) * kStep +
                      part % kLoads * 32 + thread % 32;
        if (v >= row.run_end(warp)) continue;
        const int64_t index = row.index(v) + i % (N / 4) * 4;
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          values[j] = index + j >= 0 && index + j < row.n ? row.value(index + j) : -INFINITY;
        unsigned hits = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) hits |= values[j] >= cut ? 1u << j : 0u;
        while (hits != 0) {
          const int j = __ffs(static_cast<int>(hits)) - 1;
          hits &= hits - 1;
          // values[j], without an index that would put them in memory
          const float low = j % 2 == 0 ? values[0] : values[1], high = j % 2 == 0 ? values[2] : values[3];
          const float l = warmth.warm(j < 2 ? low : high);
          const int at = atomicAdd(counter, 1);
          if (at < kListed) {
            to->l[at] = l;
            to->index[at] = static_cast<int32_t>(index + j);
          }
          weight += weight_of(l, most);
          ++count;
        }
      }
    } else if (threadIdx.x == 0) {
      count = kListed + 1;
    }
    if (count > 0) atomicAdd(&s.counted, count);
    const Prefix of_block = block_prefix<kThreads>(s, weight);
    cluster.tell(static_cast<Weight>(s.counted), of_block.total);
    Listed all{0, 0};
#pragma unroll 1
    for (int r = 0; r < cluster.blocks; ++r) {
      all.count += cluster.slot(r)[0];
      all.weight += cluster.slot(r)[1];
    }
    return all;
  }

  /// By the first block, from the list of tokens from `cut` up, when it has all that are kept: the token in
  /// one thread of the cluster, -1 in the others; kSlowly in all when it has not. `total` is what the row
  /// weighs where top-p is of the whole row; 0: what the list weighs. It takes one round of the cluster.
  __device__ __forceinline__ int64_t draw_from(float cut, float most, Weight count, float top_p,
                                               Weight total) {
    const Listed all = list(cut, most);
    if (all.count > kListed) return kSlowly;
    if (total == 0) {
      total = all.weight;
    } else if (all.weight < top_p_target(top_p, total)) {
      return kSlowly;
    }
    if (cluster.rank != 0) return -1;
    return draw_listed<kThreads>(s, Store::listed(), Store::ranked(), static_cast<int>(all.count), most,
                                 count, top_p, total, s.min_p);
  }

  /// The drawn token in the one thread that finds it, -1 in the others; kSlowly in all when there is no sum.
  /// `of_warp`: what the warp's kept tokens weigh. weigh_slots(warp, slots) makes the sums of its slots, when
  /// they are not there yet.
  template <typename WeighSlots>
  __device__ __forceinline__ int64_t draw(double of_warp, const Kept& kept, const WeighSlots& weigh_slots) {
    const Temperature warmth = temperature();
    const int lane = threadIdx.x % 32;
    if (lane == 0) s.runs[0][threadIdx.x / 32] = of_warp;
    __syncthreads();
    double part = lane < kWarps ? s.runs[0][lane] : 0.0, upto = warp_upto(part);
    double all = __shfl_sync(0xffffffffu, upto, 31);
    if (cluster.blocks > 1) {
      cluster.tell(all, 0.0, 0.0);
      all = cluster.sum(0);
    }
    double target = s.uniform * all;
    if (!isfinite(target) || !(all > 0.0)) return kSlowly;
    if (cluster.blocks > 1) {
      const double of_block = lane < cluster.blocks ? cluster.number(lane, 0) : 0.0;
      const Picked block = pick(of_block, warp_upto(of_block), target);
      if (cluster.rank != block.part) return -1;
      target -= block.before;
    }
    const auto part_of = [&](const Picked& picked) {
      return fmin(1.0, fmax(0.0, (target - picked.before) / picked.weight));
    };
    const Picked in_block = pick(part, upto, target);
    const int warp_found = in_block.part;
    const Row<T, kSeen> row;
    const int run = row.run_begin(warp_found), run_end = row.run_end(warp_found);
    const int slots = (run_end - run + p.slot() - 1) / p.slot();
    weigh_slots(warp_found, slots);
    part = lane < slots ? s.sums_of[warp_found][lane] : 0.0;
    upto = warp_upto(part);
    target = part_of(in_block) * __shfl_sync(0xffffffffu, upto, 31);
    const Picked in_warp = pick(part, upto, target);
    const int slot = in_warp.part;
    const double part_of_slot = part_of(in_warp);

    // that slot once more, a piece for every thread, in integers of the largest there
    const int begin = run + slot * p.slot(), end = min(run_end, begin + p.slot());
    const int piece = (end - begin + kThreads - 1) / kThreads;
    const int from = min(end, begin + piece * static_cast<int>(threadIdx.x)), stop = min(end, from + piece);
    const float largest = warp_max(to_float(Store::groups()[slot * kThreads + warp_found * 32 + lane]));
    const float reference = warmth.warm(row.clean(largest));
    const auto weigh_vector = [&](int v, Weight(&weights)[N]) {
      row.values(row.read(v), v,
                 [&](float value, int j) { weights[j] = kept.weight(warmth.warm(value), reference); });
      Weight sum = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) sum += weights[j];
      return sum;
    };
    Weight weights[N], own = 0;
#pragma unroll 1
    for (int v = from; v < stop; ++v) own += weigh_vector(v, weights);
    const Prefix prefix = block_prefix<kThreads>(s, own);
    const Weight exact = draw_target(part_of_slot, prefix.total);
    if (exact < prefix.before || exact >= prefix.before + own) return -1;
    Weight passed = prefix.before;
#pragma unroll 1
    for (int v = from; v < stop; ++v) {
      const Weight of_vector = weigh_vector(v, weights);
      if (passed + of_vector <= exact) {
        passed += of_vector;
        continue;
      }
      int at = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        passed += weights[j];
        at += passed <= exact ? 1 : 0;
      }
      return row.index(v) + at;
    }
    return -1;
  }

  /// What threshold() searches.
  struct Whole {
    const Row<T, kSeen>& row;
    const Temperature& warmth;
    template <typename Body>
    __device__ __forceinline__ void each(const Body& body) const {
      row.each(row.begin, row.end, [&](float value) { body(warmth.warm(value)); });
    }
  };
  /// What choose() has left to do, in passes over the row: `count` is that of top-k, or 0.
  __device__ __forceinline__ int64_t finish(float most, float floor, Weight count, float top_p) {
    __syncthreads();  // others may still read what sent them here, in s.runs
    const Row<T, kSeen> row;
    const Temperature warmth = temperature();
    Kept kept{most, floor, 0.0f};
    const Whole whole{row, warmth};
    // what the kept tokens of this warp's slots weigh, to sums_of, and of all together
    const auto weigh = [&]() {
      const int slots = this->slots();
#pragma unroll 1
      for (int slot = 0; slot < slots; ++slot) {
        const int first = row.begin + slot * p.slot();
        Weight sum = 0;
        row.each(first, min(row.end, first + p.slot()),
                 [&](float value) { sum += kept.weight(warmth.warm(value), most); });
        sum = warp_total(sum);
        if (threadIdx.x % 32 == 0) s.sums_of[threadIdx.x / 32][slot] = static_cast<double>(sum);
      }
      return of_slots(s.sums_of);
    };
    if (count > 0) kept.floor = threshold<false>(cluster, whole, most, kept.floor, most, count);
    if (top_p < 1.0f) {
      const double of_warp = weigh();
      if (threadIdx.x % 32 == 0) s.runs[0][threadIdx.x / 32] = of_warp;
      __syncthreads();
      double of_block = 0.0;
      for (int w = 0; w < kWarps; ++w) of_block += s.runs[0][w];
      cluster.tell(of_block, 0.0, 0.0);
      const Weight total = static_cast<Weight>(cluster.sum(0)), target = top_p_target(top_p, total);
      // all tokens below it, were they n of its weight, would not be enough for what is left out; 1 % more
      // for the roundings
      const double rest = static_cast<double>(total - target) / static_cast<double>(row.n);
      const float lowest =
          fmaxf(kept.floor, __fadd_rd(most, logf(static_cast<float>(rest * 0x1p-40)) - 0.01f));
      kept.floor = threshold<true>(cluster, whole, most, lowest, most, target);
    }
    kept.min_p = s.min_p;
    return draw(weigh(), kept, [](int, int) {});
  }
};

// What is not inline has registers of its own, and little is handed over to it.

/// Sampler::finish(): seldom needed.
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_slowly(int round, float most, float floor, Weight count, float top_p) {
  return Sampler<kThreads, T, kSeen>(round).finish(most, floor, count, top_p);
}
/// Sampler::draw_from().
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_listed(int round, float cut, float most, Weight count, float top_p,
                                              Weight total) {
  return Sampler<kThreads, T, kSeen>(round).draw_from(cut, most, count, top_p, total);
}
/// Sampler::draw(), or from passes over the row where there is no sum.
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_summed(int round, double of_warp, float most, float floor,
                                              float min_p) {
  Sampler<kThreads, T, kSeen> sampler(round);
  const typename Sampler<kThreads, T, kSeen>::Kept kept{most, floor, min_p};
  const int64_t token = sampler.draw(of_warp, kept, [](int, int) {});
  if (token != kSlowly) return token;
  return choose_slowly<kThreads, T, kSeen>(sampler.cluster.round, most, floor, 0, 1.0f);
}

/// The same of what is remembered of a row, from `cut` up.
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_remembered(int round, double of_warp, float most, float floor,
                                                  float min_p, float cut, const Bounds bounds, float scale) {
  Sampler<kThreads, T, kSeen> sampler(round);
  const typename Sampler<kThreads, T, kSeen>::Kept kept{most, floor, min_p};
  const int64_t token = sampler.draw(of_warp, kept, [&](int warp, int slots) {
    const Remembered<kThreads, T, kSeen> remembered(bounds, scale, 0);
    if (min_p > 0.0f) {
      const Temperature warmth = sampler.temperature();
      remembered.weigh_slots(warp, cut, slots,
                             [&](float x) { return kept.weight(warmth.warm(x), most) > 0; });
    } else {
      remembered.weigh_slots(warp, cut, slots, [](float) { return true; });
    }
  });
  if (token != kSlowly) return token;
  return choose_slowly<kThreads, T, kSeen>(sampler.cluster.round, most, floor, 0, 1.0f);
}

/// Chooser::choose_seen().
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_seen(int round, const Seen seen, const Bounds bounds, float scale,
                                            float top_p, float rest);

/// The passes over a row, each with what is done after it.
template <int kThreads, typename T, bool kSeen>
struct Chooser : Sampler<kThreads, T, kSeen> {
  using Base = Sampler<kThreads, T, kSeen>;
  using Base::cluster, Base::p, Base::s, Base::kWarps, Base::N, Base::Base, Base::temperature;
  using Item = ItemOf<T, kSeen>;

  /// What the cluster's blocks have seen of the row: its largest value, the lowest index that has it where
  /// the pass was kBest, and a key that `wanted` threads of every block reach, 0 where `wanted` is.
  struct Largest {
    float value;
    uint32_t index, least_key;
  };
  __device__ __forceinline__ Largest largest_of_row(const Seen& seen, int wanted) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t own_key = key_of(fminf(seen.own, kLargest));
    Weight largest = static_cast<Weight>(own_key) << 32 | static_cast<uint32_t>(~seen.best);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0) s.warps[warp] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = max(largest, s.warps[w]);
    Weight least_key = wanted > 0 ? this->least_of(wanted, own_key) : 0;
    if (cluster.blocks > 1) {
      cluster.tell(largest, least_key);
#pragma unroll 1
      for (int r = 0; r < cluster.blocks; ++r) {
        largest = max(largest, cluster.slot(r)[0]);
        least_key = min(least_key, cluster.slot(r)[1]);
      }
    }
    return {value_of(static_cast<uint32_t>(largest >> 32)), ~static_cast<uint32_t>(largest),
            static_cast<uint32_t>(least_key)};
  }
  /// `token` in one thread of the cluster, -1 in all others.
  __device__ __forceinline__ int64_t in_one_thread(int64_t token) const {
    return cluster.rank == 0 && threadIdx.x == 0 ? token : -1;
  }
  /// A value a little below the key's, since the division by the temperature can make two logits one: the
  /// fourth before it.
  static __device__ __forceinline__ float below_key(uint32_t key) {
    return value_of(max(key, key_of(-kLargest) + 4) - 4);
  }

  __device__ __forceinline__ int64_t slowly(float most, float floor, Weight count, float top_p) {
    return choose_slowly<kThreads, T, kSeen>(cluster.round, most, floor, count, top_p);
  }

  /// The best token.
  __device__ __forceinline__ int64_t choose_best() {
    const Largest largest = largest_of_row(scan_run<kBest, kThreads, T, kSeen>(1.0f, Bounds{}), 0);
    return in_one_thread(largest.value == -INFINITY ? 0 : static_cast<int64_t>(largest.index));
  }

  /// Top-k, min-p, few tokens, and temperatures with which nothing is summed.
  __device__ __forceinline__ int64_t choose_few(Weight count, float top_p, bool mild) {
    const bool few = p.n <= kListed;
    // how many of the block's threads are to reach the cut of the list
    const Weight of_block = (count + cluster.blocks - 1) / cluster.blocks;
    const bool reaches = !few && mild && count > 0 && of_block <= kThreads;
    const Largest largest = largest_of_row(scan_run<kMaxima, kThreads, T, kSeen>(1.0f, Bounds{}),
                                           reaches ? static_cast<int>(of_block) : 0);
    if (largest.value == -INFINITY) return in_one_thread(0);
    const Temperature warmth = temperature();
    const float most = warmth.warm(largest.value), min_p = s.min_p;
    float cut = NAN;
    if (few) {
      cut = -kLargest;
    } else if (reaches) {
      cut = below_key(largest.least_key);
    } else if (mild && count == 0 && min_p > 0.0f && !(top_p < 1.0f)) {
      // what min-p keeps, 1 % more of it, and more for the roundings of large logits
      cut = largest.value + (logf(min_p * 0x1p-40f) - 0.01f) * warmth.d;
      cut = fmaxf(-kLargest, cut - 1e-6f * fabsf(cut));
    }
    if (isnan(cut)) return slowly(most, -kLargest, count, top_p);
    const int64_t token = choose_listed<kThreads, T, kSeen>(cluster.round, cut, most, count, top_p, 0);
    if (token != kSlowly) return token;
    ++cluster.round;
    return slowly(most, count > 0 ? warmth.warm(cut) : -kLargest, count, top_p);
  }

  /// What 1 of a pass, whose weights are 2^(logit * scale - reference), is in the units of Weight, of a row
  /// whose largest logit is `value`.
  __device__ __forceinline__ static double unit_of(const Seen& seen, float value, float scale) {
    return 0x1p40 * static_cast<double>(exp2f(static_cast<float>(static_cast<double>(seen.reference) -
                                                                 static_cast<double>(value) * scale)));
  }
  /// The sums over the row of what every warp has, and the largest value.
  struct Sums {
    double all, above;
    float value;
  };
  __device__ __forceinline__ Sums sums_of_row(const Seen& seen, double of_warp, double above) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float own = warp_max(fminf(seen.own, kLargest));
    if (lane == 0) {
      s.runs[0][warp] = of_warp;
      s.runs[1][warp] = above;
      s.pairs[warp].x = own;
    }
    __syncthreads();
    Sums sums{0.0, 0.0, -INFINITY};
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) {
      sums.all += s.runs[0][w];
      sums.above += s.runs[1][w];
      sums.value = fmaxf(sums.value, s.pairs[w].x);
    }
    if (cluster.blocks > 1) {
      cluster.tell(cluster.word_of(sums.all), cluster.word_of(sums.above), key_of(sums.value));
      sums.all = cluster.sum(0);
      sums.above = cluster.sum(1);
#pragma unroll 1
      for (int r = 0; r < cluster.blocks; ++r)
        sums.value = fmaxf(sums.value, value_of(static_cast<uint32_t>(cluster.slot(r)[2])));
    }
    return sums;
  }
  /// Top-p from a list of the largest tokens, kPeaked or some more, of a row that weighs `total`; kSlowly
  /// when that is not enough.
  __device__ __forceinline__ int64_t choose_peaked(const Seen& seen, float most, float top_p, Weight total) {
    const uint32_t own_key = key_of(fminf(seen.own, kLargest));
    cluster.tell(static_cast<Weight>(this->least_of(kPeaked / cluster.blocks, own_key)));
    Weight least = cluster.slot(0)[0];
#pragma unroll 1
    for (int r = 1; r < cluster.blocks; ++r) least = min(least, cluster.slot(r)[0]);
    const int64_t token = choose_listed<kThreads, T, kSeen>(
        cluster.round, below_key(static_cast<uint32_t>(least)), most, 0, top_p, total);
    ++cluster.round;
    return token;
  }

  /// Without a filter, or top-p where nothing can be remembered of the row.
  __device__ __forceinline__ int64_t choose_sums(float scale, float top_p) {
    Bounds bounds{INFINITY, INFINITY, NAN};
    Seen seen;
    bool summed = true;
    // again when the reference was not one for what came later: sums would be infinite, or miss what is small
#pragma unroll 1
    for (;;) {
      seen = scan_run<kSums, kThreads, T, kSeen>(scale, bounds);
      const float top = warp_max(seen.own), exponent = fmaf(top, scale, -seen.reference);
      if (top == -INFINITY || (exponent >= -30.0f && exponent <= 100.0f)) break;
      summed = isnan(bounds.reference) && fabsf(top * scale) < kMostExponent;
      if (!summed) break;
      bounds.reference = reference_of(top, scale);
    }
    const Largest largest = largest_of_row(seen, 0);
    if (largest.value == -INFINITY) return in_one_thread(0);
    const float most = temperature().warm(largest.value);
    const double of_warp =
        summed ? this->of_slots(s.sums_of) * unit_of(seen, largest.value, scale) : static_cast<double>(NAN);
    if (!(top_p < 1.0f)) {
      return choose_summed<kThreads, T, kSeen>(cluster.round, of_warp, most, -kLargest, 0.0f);
    }
    const double all = sums_of_row(seen, of_warp, 0.0).all;
    if (!isfinite(all)) return slowly(most, -kLargest, 0, top_p);
    const int64_t token = choose_peaked(seen, most, top_p, static_cast<Weight>(all));
    return token != kSlowly ? token : slowly(most, -kLargest, 0, top_p);
  }

  /// Top-p with bounds of its cut. kSlowly: there are none, and nothing but a sample is read yet. kAgain: it
  /// takes another pass, for which s.rest is known now. `rest`: what s.rest was after the pass before, NaN in
  /// the first one. s.round is where the next pass goes on.
  __device__ __forceinline__ int64_t choose_nucleus(float scale, float top_p, float rest) {
    const Bounds bounds = find_bounds<kThreads, T, kSeen>(cluster.round, scale, top_p, rest, 0);
    if (cluster.blocks > 1) ++cluster.round;
    if (isnan(bounds.reference)) {
      if (threadIdx.x == 0) s.round = cluster.round;
      __syncthreads();
      return kSlowly;
    }
    const Seen seen = bounds.high == INFINITY ? scan_run<kTail, kThreads, T, kSeen>(scale, bounds)
                                              : scan_run<kSplit, kThreads, T, kSeen>(scale, bounds);
    return sampling::choose_seen<kThreads, T, kSeen>(cluster.round, seen, bounds, scale, top_p, rest);
  }
  /// What comes after its pass.
  __device__ __forceinline__ int64_t choose_seen(const Seen& seen, const Bounds& bounds, float scale,
                                                 float top_p, float rest) {
    const int slots = this->slots();
    const Remembered<kThreads, T, kSeen> remembered(bounds, scale, seen.items);
    if (cluster.blocks == 1) remembered.tally();
    const Sums sums = sums_of_row(seen, this->of_slots(s.sums_of), seen.full ? NAN : remembered.above(slots));
    if (sums.value == -INFINITY) return in_one_thread(0);
    const float most = temperature().warm(sums.value);
    const double unit = unit_of(seen, sums.value, scale), all = sums.all * unit;
    if (!isfinite(all)) return slowly(most, -kLargest, 0, top_p);
    const Weight total = static_cast<Weight>(all);
    // in units of the reference
    const double needed = static_cast<double>(top_p_target(top_p, total)) / unit;
    float cut, low = bounds.low;
    // false too where `above` is NaN, for want of room
    if (sums.above < needed &&
        ((cluster.blocks == 1 && remembered.find_tallied(sums.value, needed - sums.above, cut, low)) ||
         remembered.find(cluster, low, sums.value, sums.above, needed, cut))) {
      const Temperature warmth = temperature();
      const typename Base::Kept kept{most, warmth.warm(cut), s.min_p};
      // min-p has to keep what is above the bound
      if (kept.min_p > 0.0f && sums.above > 0.0 && scaled_exp(warmth.warm(bounds.high) - most) < kept.min_p) {
        return slowly(most, kept.floor, 0, 1.0f);
      }
      const double of_warp =
          kept.min_p > 0.0f
              ? remembered.weigh(cut, slots, [&](float x) { return kept.weight(warmth.warm(x), most) > 0; })
              : remembered.weigh(cut, slots, [](float) { return true; });
      return choose_remembered<kThreads, T, kSeen>(cluster.round, of_warp, most, kept.floor, kept.min_p, cut,
                                                   bounds, scale);
    }
    if (!isnan(rest)) return slowly(most, -kLargest, 0, top_p);
    const int64_t token = choose_peaked(seen, most, top_p, total);
    if (token != kSlowly) return token;
    if (threadIdx.x == 0) {
      s.rest = static_cast<float>(sums.all - needed);
      s.round = cluster.round;
    }
    __syncthreads();
    return kAgain;
  }

  /// Top-k of more than a list has, and top-p of that: from a bound of the cut up all is remembered. kSlowly:
  /// there is none, and nothing but a sample is read yet.
  __device__ __forceinline__ int64_t choose_many(float scale, Weight wanted, float top_p) {
    const Bounds bounds = find_bounds<kThreads, T, kSeen>(cluster.round, scale, top_p, NAN, wanted);
    if (cluster.blocks > 1) ++cluster.round;
    if (isnan(bounds.reference)) {
      cluster.barrier();  // what comes then begins with the first round
      return kSlowly;
    }
    const Seen seen = scan_run<kTail, kThreads, T, kSeen>(scale, bounds);
    const int slots = this->slots();
    const Remembered<kThreads, T, kSeen> remembered(bounds, scale, seen.items);
    // how many there are; a NaN for want of room
    const Sums sums = sums_of_row(seen, warp_total(static_cast<double>(seen.items)), seen.full ? NAN : 0.0);
    if (sums.value == -INFINITY) return in_one_thread(0);
    const Temperature warmth = temperature();
    const float most = warmth.warm(sums.value);
    if (!(sums.above == 0.0 && sums.all >= static_cast<double>(wanted)))
      return slowly(most, -kLargest, wanted, top_p);
    const auto all = [](float) { return true; };
    __syncthreads();  // all have read the row's sums; a search that has nothing to do does not wait
    float cut = remembered.find_count(cluster, sums.value, wanted);
    if (top_p < 1.0f) {
      const double unit = unit_of(seen, sums.value, scale);
      const double weight = sums_of_row(seen, remembered.weigh(cut, slots, all), 0.0).all * unit;
      if (!isfinite(weight)) return slowly(most, -kLargest, wanted, top_p);
      const double needed = static_cast<double>(top_p_target(top_p, static_cast<Weight>(weight))) / unit;
      remembered.find(cluster, cut, sums.value, 0.0, needed, cut);
    }
    const typename Base::Kept kept{most, warmth.warm(cut), s.min_p};
    const double of_warp =
        kept.min_p > 0.0f
            ? remembered.weigh(cut, slots, [&](float x) { return kept.weight(warmth.warm(x), most) > 0; })
            : remembered.weigh(cut, slots, all);
    return choose_remembered<kThreads, T, kSeen>(cluster.round, of_warp, most, kept.floor, kept.min_p, cut,
                                                 bounds, scale);
  }
};

template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_best() {
  return Chooser<kThreads, T, kSeen>().choose_best();
}
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_few(Weight count, float top_p, bool mild) {
  return Chooser<kThreads, T, kSeen>().choose_few(count, top_p, mild);
}
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_many(float scale, Weight count, float top_p) {
  return Chooser<kThreads, T, kSeen>().choose_many(scale, count, top_p);
}
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_sums(int round, float scale, float top_p) {
  return Chooser<kThreads, T, kSeen>(round).choose_sums(scale, top_p);
}
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_seen(int round, const Seen seen, const Bounds bounds, float scale,
                                            float top_p, float rest) {
  return Chooser<kThreads, T, kSeen>(round).choose_seen(seen, bounds, scale, top_p, rest);
}
template <int kThreads, typename T, bool kSeen>
__device__ __noinline__ int64_t choose_nucleus(int round, float scale, float top_p, float rest) {
  return Chooser<kThreads, T, kSeen>(round).choose_nucleus(scale, top_p, rest);
}

/// The token, in one thread of the cluster; -1 in all others.
template <int kThreads, typename T, bool kSeen>
__device__ __forceinline__ int64_t choose(const Problem<T>& p) {
  Shared& s = shared();
  if (threadIdx.x == 0) problem<T>() = p;
  // the first step is on its way before it is known what for
  {
    const Row<T, kSeen> row(p);
    const int v = row.begin + static_cast<int>(threadIdx.x % 32);
    if (v >= row.whole && v < row.whole_end) prefetch(row.x + row.index(v));
    if (threadIdx.x == kThreads - 32) prefetch(p.rng + 2 * p.row());
  }
  const float* const params = p.params_of_row();
  const float k = params[kTopK], divisor = params[kTemperature], top_p = params[kTopP], min_p = params[kMinP];
  if (threadIdx.x == 0) {
    s.divisor = divisor;
    s.min_p = min_p > 0.0f ? fminf(min_p, 1.0f) * 0x1p40f : 0.0f;
    s.queued = s.listed = s.counted = 0;
  }
  __syncthreads();
  if (p.blocks > 1) cluster_meet();  // nothing is written to a block that has not begun

  if (!(divisor > 0.0f) || top_p <= 0.0f) return choose_best<kThreads, T, kSeen>();
  const Weight count = k >= 1.0f && k < static_cast<float>(p.n) ? static_cast<Weight>(k) : 0;
  const bool nucleus = top_p < 1.0f, mild = Temperature::is_mild(divisor);
  const float scale = divisor == 1.0f ? kLog2E : kLog2E / divisor;
  // more than the threads' largest tell apart, and not so much that there is no room for it in any case
  if (mild && p.capacity > 0 && count > static_cast<Weight>(kThreads * p.blocks) &&
      count < static_cast<Weight>(kThreads * p.blocks * 3 / 8) * p.capacity) {
    const int64_t token = choose_many<kThreads, T, kSeen>(scale, count, top_p);
    if (token != kSlowly) return token;
  }
  if (p.n <= kListed || count > 0 || !mild || (!nucleus && min_p > 0.0f))
    return choose_few<kThreads, T, kSeen>(count, top_p, mild);
  int round = 0;
  if (nucleus && p.capacity > 0) {
    float rest = NAN;
    for (;;) {
      const int64_t token = choose_nucleus<kThreads, T, kSeen>(round, scale, top_p, rest);
      if (token != kAgain && token != kSlowly) return token;
      round = s.round;
      if (token == kSlowly) break;
      rest = s.rest;
    }
  }
  return choose_sums<kThreads, T, kSeen>(round, scale, top_p);
}

template <int kThreads, typename T, bool kSeen>
__global__ void __launch_bounds__(kThreads, kResident<kThreads>)
    sample_kernel(const __grid_constant__ Problem<T> p) {
  const int64_t token = choose<kThreads, T, kSeen>(p);
  if (token < 0) return;
  const int64_t row = p.row();
  p.tokens[row] = static_cast<int32_t>(token);
  // nobody else adds to it: only so that this thread need not wait for the old value
  atomicAdd(reinterpret_cast<unsigned long long*>(p.rng + 2 * row + 1), 1ull);
  if constexpr (kSeen) p.seen[row * p.n + token] = 1;
}

/// How many blocks share a row: so many that few rows keep the whole chip at work, while every fourth thread
/// has a vector and all rows are at work at once.
template <int kThreads>
int blocks_of_row(const Launch& on, int64_t rows, int64_t vectors) {
  int blocks = 1;
  while (on.arch >= 90 && blocks < kMostBlocks && vectors >= int64_t{kThreads} / 2 * blocks &&
         rows <= kResident<kThreads> * on.clusters_of(2 * blocks))
    blocks *= 2;
  return blocks;
}

template <int kThreads, bool kSeen, typename T>
cudaError_t launch_threads(const Launch& launch, cudaStream_t stream, int64_t rows, Problem<T> p) {
  constexpr int N = 16 / sizeof(T), kWarps = kThreads / 32;
  const int64_t vectors = (p.n + 2 * (N - 1)) / N;  // of a row that begins inside one
  Launch on = launch;
  on.stream = stream;
  on.early = false;
  LaunchShape shape;
  p.blocks = blocks_of_row<kThreads>(launch, rows, vectors);
  p.log_blocks = p.blocks == 8 ? 3 : p.blocks / 2;
  shape.cluster = static_cast<unsigned>(p.blocks);
  shape.grid = dim3(static_cast<unsigned>(rows) * shape.cluster);
  shape.block = dim3(kThreads);
  p.part = static_cast<int>((vectors + p.blocks - 1) / p.blocks);
  p.run = ((p.part + kWarps - 1) / kWarps + 7) / 8 * 8;
  p.fold = 0;
  while (((p.run + kStep - 1) / kStep + (1 << p.fold) - 1) >> p.fold > kSlots) ++p.fold;
  // items for a quarter of the row, and for chance; none where there is room for far less, nor for a row
  // that is no longer than its sample. A block pays 1 KiB besides its own. Columns are an odd number of 16
  // bytes, so that lanes which read theirs at once find them in different banks.
  using Store = Area<kThreads, T, kSeen>;
  constexpr int64_t kItem = sizeof(typename Store::Item), kOdd = 32 / kItem, kColumns = kThreads / 2;
  const int64_t fixed = Store::kFixed + Store::kSpare;
  const int64_t share = std::min(launch.shared / kResident<kThreads> - 1024, launch.block_shared);
  const int64_t room =
      (share - 128 - fixed - static_cast<int64_t>(sizeof(Shared) + sizeof(Problem<T>))) / (kColumns * kItem);
  const int64_t wanted = p.run * N / 64 + 64, most = std::min(std::min(room, wanted), int64_t{255});
  p.capacity = p.n >= kSampled && room >= wanted / 3
                   ? static_cast<int>((most + kOdd / 2) / kOdd * kOdd - kOdd / 2)
                   : 0;
  shape.shared = static_cast<size_t>(fixed) +
                 std::max(sizeof(List) + sizeof(Ranked), static_cast<size_t>(p.capacity * kColumns * kItem));
  return launch_kernel(on, shape, sample_kernel<kThreads, T, kSeen>, p);
}

/// Small blocks where items are small: hundreds of rows are then at work at once, and none waits for another
/// to end. Where more has to be remembered of a row, fewer of them have room.
template <typename T>
cudaError_t launch_sample(const Launch& launch, cudaStream_t stream, int64_t rows, const Problem<T>& p) {
  constexpr int kThreads = sizeof(T) == 2 ? 256 : 512;
  if (p.seen) return launch_threads<512, true>(launch, stream, rows, p);
  return launch_threads<kThreads, false>(launch, stream, rows, p);
}

}  // namespace
}  // namespace sampling

size_t CudaBackend::sample_workspace(const View&) const { return 0; }

Status CudaBackend::sample(Queue queue, View tokens, View logits, View params, View rng, View seen, View) {
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
  const cudaError_t error = with_float_type(logits.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    return sampling::launch_sample<T>(launch_, stream(queue), rows,
                                      {tokens.as<int32_t>(), logits.as<const T>(), params.as<const float>(),
                                       rng.as<int64_t>(), seen ? seen.as<uint8_t>() : nullptr, n});
  });
  return check(error, "sample");
}

}  // namespace halfbyte::cuda
