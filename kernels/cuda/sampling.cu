// sample, over rows of logits. Its rules are backend.h's and those of the CPU backend, draw for draw:
// ../random.h.
//
// A row is read once, by one block or by a cluster of blocks, and is not kept: a thread keeps the sum of its
// weights, and the largest of every group of kLoads vectors. What has to be looked at again is little and is
// read again. The token is drawn from the sums of the warps, and then from the run of the one warp that it
// falls into, anew and in integers.
//
// Nothing is sorted but a short list. For top-k, for min-p and for what is peaked, the tokens that can be
// kept are few: those above a cut that the threads' own maxima give are looked up in their groups, and one
// block ranks, filters and draws. For top-p of what is flat, a sample of the row gives bounds of the cut
// before the row is read: what lies between is remembered, what lies above is summed, and the search goes
// over what is remembered. Where a bound or the room fails, the search goes over the row, read again.
#include "../random.h"
#include "sampling_bounds.cuh"
#include "sampling_filter.cuh"

namespace halfbyte::cuda {
namespace sampling {
namespace {

/// No token yet: choose_slowly() is to find it.
constexpr int64_t kSlowly = -2;

/// A block's part in choosing a row's token.
template <typename T, bool kSeen>
struct Sampler {
  static constexpr int N = 16 / sizeof(T);
  using Item = typename Store<T, kSeen>::Item;

  const Problem<T>& p;
  Row<T, kSeen> row;
  Cluster cluster;
  Shared& s;
  char* area;
  Temperature temperature;
  float most = -INFINITY;  // largest logit of the row
  float floor = -kLargest, min_p = 0.0f;

  __device__ __forceinline__ Sampler(const Problem<T>& problem, Shared& shared, char* dynamic,
                                     const float* params)
      : p(problem),
        row(p, static_cast<int>(blockIdx.x) & (p.blocks - 1)),
        cluster(shared, p.blocks),
        s(shared),
        area(dynamic),
        temperature(params[kTemperature]) {}

  __device__ __forceinline__ float* groups() const { return reinterpret_cast<float*>(area); }
  __device__ __forceinline__ Ranked& ranked() const { return *reinterpret_cast<Ranked*>(area); }
  __device__ __forceinline__ char* beyond() const { return area + sizeof(float) * kSlots * kThreads; }
  __device__ __forceinline__ List& listed() const { return *reinterpret_cast<List*>(beyond()); }
  __device__ __forceinline__ Item* items() const { return reinterpret_cast<Item*>(beyond()); }

  /// What threshold() searches.
  struct Whole {
    const Row<T, kSeen>& row;
    const Temperature& temperature;
    template <typename Body>
    __device__ __forceinline__ void each(const Body& body) const {
      row.each([&](float value) { body(temperature.warm(value)); });
    }
  };

  /// A value that at least `wanted` of the block's threads have one from, the upper bits of the last one's
  /// key.
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
  /// they find room there, once for a row; how many they are and what they weigh.
  struct Listed {
    Weight count, weight;
  };
  __device__ __forceinline__ Listed list(float cut) {
    const int steps = (row.end - row.begin + kStep - 1) / kStep;
    const int slots = (steps + (1 << p.fold) - 1) >> p.fold;
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
      const int group = slot * kThreads + static_cast<int>(threadIdx.x);
      if (groups()[group] >= cut) {
        const int at = atomicAdd(&s.queued, 1);
        if (at < kListed) s.queue[at] = group;
      }
    }
    __syncthreads();
    // four elements of a group that is on the queue for a thread
    const int queued = s.queued, fours = N / 4 * kLoads << p.fold;
    Weight weight = 0;
    int count = 0;
    if (queued <= kListed) {
      List* const to = cluster_place(&listed(), 0);
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
          const float low = j % 2 == 0 ? values[0] : values[1], high = j % 2 == 0 ? values[2] : values[3];
          const float l = temperature.warm(j < 2 ? low : high);
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
    const Prefix of_block = block_prefix(s, weight);
    cluster.tell(static_cast<Weight>(s.counted), of_block.total);
    Listed all{0, 0};
#pragma unroll 1
    for (int r = 0; r < cluster.blocks; ++r) {
      all.count += cluster.slot(r)[0];
      all.weight += cluster.slot(r)[1];
    }
    return all;
  }

  /// The weight of a token that is kept, 0 of another; min_p is in units of 2^-40, and 0 keeps all.
  __device__ __forceinline__ Weight kept_weight(float l, float reference) const {
    if (!(l >= floor)) return 0;
    if (min_p > 0.0f && l < most && scaled_exp(l - most) < min_p) return 0;
    return weight_of(l, reference);
  }
  /// What the kept tokens of this warp weigh, from the row.
  __device__ __forceinline__ double weigh() const {
    Weight sum = 0;
    row.each([&](float value) { sum += kept_weight(temperature.warm(value), most); });
    return static_cast<double>(warp_total(sum));
  }

  /// The drawn token in the one thread that finds it, -1 in the others; kSlowly in all when there is no sum.
  /// `of_warp`: what the warp's kept tokens weigh.
  __device__ __forceinline__ int64_t draw(double of_warp) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) s.runs[0][warp] = of_warp;
    __syncthreads();
    double of_block = 0.0;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) of_block += s.runs[0][w];
    cluster.tell(of_block, 0.0, 0.0);
    const double target = s.uniform * cluster.sum(0);
    if (!isfinite(target)) return kSlowly;
    // the part that the target falls into, the last that weighs anything when roundings put it beyond them
    double sum = 0.0, before = 0.0, weight = 1.0;
    int found = -1;
    bool passed = false;
    const auto see = [&](double part, int i) {
      if (passed || !(part > 0.0)) return;
      found = i;
      before = sum;
      weight = part;
      sum += part;
      passed = target < sum;
    };
#pragma unroll 1
    for (int r = 0; r < cluster.blocks; ++r) see(cluster.number(r, 0), r);
    if (cluster.rank != found) return -1;
    sum = before;
    passed = false;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) see(s.runs[0][w], w);
    const double part = fmin(1.0, fmax(0.0, (target - before) / weight));

    // that warp's run once more, a piece for every thread, in integers of the largest there
    const int begin = row.run_begin(found), end = row.run_end(found);
    const int piece = (end - begin + kThreads - 1) / kThreads;
    const int from = min(end, begin + piece * static_cast<int>(threadIdx.x)), stop = min(end, from + piece);
    const float reference = temperature.warm(row.clean(s.warp_most[found]));
    const auto weigh_vector = [&](int v, Weight(&weights)[N]) {
      row.values(row.read(v), v,
                 [&](float value, int j) { weights[j] = kept_weight(temperature.warm(value), reference); });
      Weight sum = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) sum += weights[j];
      return sum;
    };
    Weight weights[N], own = 0;
#pragma unroll 1
    for (int v = from; v < stop; ++v) own += weigh_vector(v, weights);
    const Prefix prefix = block_prefix(s, own);
    const Weight exact = draw_target(part, prefix.total);
    if (exact < prefix.before || exact >= prefix.before + own) return -1;
    Weight upto = prefix.before;
#pragma unroll 1
    for (int v = from; v < stop; ++v) {
      const Weight of_vector = weigh_vector(v, weights);
      if (upto + of_vector <= exact) {
        upto += of_vector;
        continue;
      }
      int at = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        upto += weights[j];
        at += upto <= exact ? 1 : 0;
      }
      return row.index(v) + at;
    }
    return -1;
  }

  /// The token, in one thread of the cluster; -1 in all others. kSlowly in all: with `floor`, `count` and
  /// `top_p` what is still to be done.
  __device__ __forceinline__ int64_t choose(const float* params, const int64_t* rng, Weight& count,
                                            float& top_p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // the first step is under way before it is known what for
    Step<T, kSeen> next;
    row.read_step(next.vectors, row.begin, row.end);
    const float k = params[kTopK], scale = temperature.d == 1.0f ? kLog2E : kLog2E / temperature.d;
    top_p = params[kTopP];
    min_p = params[kMinP] > 0.0f ? fminf(params[kMinP], 1.0f) * 0x1p40f : 0.0f;
    const bool greedy = !(temperature.d > 0.0f) || top_p <= 0.0f;
    count = !greedy && k >= 1.0f && k < static_cast<float>(row.n) ? static_cast<Weight>(k) : 0;
    row.penalise(p, params[kRepetitionPenalty]);
    if constexpr (kSeen) {
      if (row.seen) row.read_marks(next.marks, row.begin, row.end);
    }
    const bool few = row.n <= kListed, nucleus = top_p < 1.0f, mild = temperature.mild();

    if (threadIdx.x == 0) {
      s.uniform = uniform(rng[0], rng[1]);
      s.queued = s.listed = s.counted = 0;
    }
    __syncwarp();
    if (cluster.blocks > 1) cluster_meet();  // nothing is written to a block that has not begun

    const Store<T, kSeen> store{groups(), items(), p.item_bytes / static_cast<int>(kThreads * sizeof(Item)),
                                p.fold};
    Bounds bounds{INFINITY, INFINITY, NAN};
    Seen seen;
    bool summed = false, split = false;
    if (greedy) {
      scan_run<kBest>(seen, row, store, scale, bounds, next);
    } else if (few || count > 0 || !mild || (!nucleus && min_p > 0.0f)) {
      scan_run<kMaxima>(seen, row, store, scale, bounds, next);
    } else {
      summed = true;
      split = nucleus && p.item_bytes > 0 && find_bounds(cluster, row, scale, top_p, bounds);
      if (split) {
        scan_run<kSplit>(seen, row, store, scale, bounds, next);
      } else {
        // again when the reference was not one for what came later
#pragma unroll 1
        for (;;) {
          scan_run<kSums>(seen, row, store, scale, bounds, next);
          const float top = warp_max(seen.own), exponent = fmaf(top, scale, -seen.reference);
          if (top == -INFINITY || (exponent >= -30.0f && exponent <= 100.0f)) break;
          seen.sum = 0.0;
          if (!isnan(bounds.reference) || !(fabsf(top * scale) < 0x1p22f)) {
            seen.sum = NAN;
            break;
          }
          bounds.reference = reference_of(top, scale);
          next.read(row, row.begin);
        }
      }
    }

    // the largest value, then the lowest index
    const uint32_t own_key = key_of(fminf(seen.own, kLargest));
    Weight largest = static_cast<Weight>(own_key) << 32 | static_cast<uint32_t>(~seen.best);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0) {
      s.warps[warp] = largest;
      s.warp_most[warp] = value_of(static_cast<uint32_t>(largest >> 32));
    }
    __syncthreads();
    if (warp == 0) {
      largest = lane < kWarps ? s.warps[lane] : 0;
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    // how many of the block's threads are to reach the cut of a list
    int wanted = 0;
    if (mild && !few && !greedy) {
      const Weight of_block = (count + cluster.blocks - 1) / cluster.blocks;
      if (of_block > 0 && of_block <= kThreads) wanted = static_cast<int>(of_block);
      if (count == 0 && nucleus && bounds.high == INFINITY) wanted = kThreads / 4 / cluster.blocks;
    }
    const uint32_t least = wanted > 0 ? least_of(wanted, own_key) : 0;
    cluster.tell(largest, least);
    largest = cluster.slot(0)[0];
    Weight least_key = cluster.slot(0)[1];
#pragma unroll 1
    for (int r = 1; r < cluster.blocks; ++r) {
      largest = max(largest, cluster.slot(r)[0]);
      least_key = min(least_key, cluster.slot(r)[1]);
    }
    const float value = value_of(static_cast<uint32_t>(largest >> 32));
    if (greedy || value == -INFINITY) {
      if (cluster.rank != 0 || threadIdx.x != 0) return -1;
      return value == -INFINITY ? 0 : static_cast<int64_t>(~static_cast<uint32_t>(largest));
    }
    most = temperature.warm(value);

    // a little less than the key, since the division can make two logits one
    float cut = wanted > 0 ? value_of(max(static_cast<uint32_t>(least_key), key_of(-kLargest) + 4) - 4) : NAN;
    if (few) cut = -kLargest;
    if (!few && count == 0 && !nucleus && min_p > 0.0f && mild) {
      cut = value + (logf(min_p * 0x1p-40f) - 0.01f) * temperature.d;
      cut = fmaxf(-kLargest, cut - 1e-6f * fabsf(cut));
    }

    // what the warp's tokens weigh in the units of Weight
    double of_warp = NAN;
    Weight total = 0, target = 0;
    if (summed) {
      const double unit = exp2(40.0 + static_cast<double>(seen.reference) -
                               static_cast<double>(value) * static_cast<double>(scale));
      of_warp = warp_total(seen.sum) * unit;
      if (nucleus) {
        const double above_warp = warp_total(seen.above) * unit;
        const bool full = warp_total(seen.full || !split ? 1 : 0) != 0;
        if (lane == 0) {
          s.runs[0][warp] = of_warp;
          s.runs[1][warp] = full ? NAN : above_warp;
        }
        __syncthreads();
        double sums[2] = {};
#pragma unroll 4
        for (int w = 0; w < kWarps; ++w) {
          sums[0] += s.runs[0][w];
          sums[1] += s.runs[1][w];
        }
        cluster.tell(sums[0], sums[1], 0.0);
        const double all = cluster.sum(0), above = cluster.sum(1);
        if (!isfinite(all)) return kSlowly;
        total = static_cast<Weight>(all);
        target = top_p_target(top_p, total);
        of_warp = NAN;
        if (above < static_cast<double>(target)) {
          // an item of the upper bound weighs 2^31 there
          constexpr int kZero = kSeen || N == 4 ? 0 : std::is_same_v<T, bf16_t> ? 16 : 13;
          const float high = fminf(value, bounds.high);
          const double goal =
              (static_cast<double>(target) - above) *
              exp2((static_cast<double>(value) - static_cast<double>(high)) * static_cast<double>(scale) -
                   9.0);
          float least_kept = 0.0f;
          if (find_cut<kZero>(cluster, items() + threadIdx.x, seen.items, bounds.low, high, scale,
                              static_cast<Weight>(ceil(goal)), least_kept)) {
            floor = temperature.warm(least_kept);
            float sum = 0.0f;
#pragma unroll 4
            for (int i = 0; i < seen.items; ++i) {
              const float x = to_float(items()[threadIdx.x + i * kThreads]);
              sum += x >= least_kept ? rough_exp2(fmaf(x, scale, -seen.reference)) : 0.0f;
            }
            of_warp = above_warp + warp_total(static_cast<double>(sum)) * unit;
            top_p = 1.0f;
            cut = NAN;
          }
        }
      }
    }
    if (!isnan(cut)) {
      const Listed all = list(cut);
      if (all.count <= kListed && (few || count > 0 || all.weight >= target)) {
        return cluster.rank == 0 ? draw_listed(s, listed(), ranked(), static_cast<int>(all.count), most,
                                               count, top_p, few ? all.weight : total, min_p)
                                 : -1;
      }
      if (count > 0) floor = temperature.warm(cut);
    }
    if (min_p > 0.0f || !summed) return kSlowly;
    return draw(of_warp);
  }

  /// What choose() has left to do, in passes over the row.
  __device__ __forceinline__ int64_t finish(Weight count, float top_p) {
    const Whole whole{row, temperature};
    if (count > 0) floor = threshold<false>(cluster, whole, most, floor, most, count);
    if (top_p < 1.0f) {
      const float wanted = min_p;
      min_p = 0.0f;
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
      const float lowest = fmaxf(
          floor, __fadd_rd(most, logf(static_cast<float>(rest * 9.094947017729282e-13)) - 0.01f));  // 2^-40
      floor = threshold<true>(cluster, whole, most, lowest, most, target);
      min_p = wanted;
    }
    return draw(weigh());
  }
};

/// What a row needs seldom: not inline, so that what is always run has the registers, and with little to
/// hand over.
template <typename T, bool kSeen>
__device__ __noinline__ int64_t choose_slowly(const Problem<T>& p, Shared& s, char* area, int round,
                                              float most, float floor, Weight count, float top_p) {
  const float* params = p.params + p.row() * kSamplingColumns;
  Sampler<T, kSeen> sampler(p, s, area, params);
  sampler.row.penalise(p, params[kRepetitionPenalty]);
  sampler.cluster.round = round;
  sampler.most = most;
  sampler.floor = floor;
  sampler.min_p = params[kMinP] > 0.0f ? fminf(params[kMinP], 1.0f) * 0x1p40f : 0.0f;
  return sampler.finish(count, top_p);
}

template <typename T, bool kSeen>
__global__ void __launch_bounds__(kThreads, kResident) sample_kernel(const __grid_constant__ Problem<T> p) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char area[];
  int64_t* rng = p.rng + 2 * p.row();
  const float* params = p.params + p.row() * kSamplingColumns;
  Weight count;
  float top_p;
  Sampler<T, kSeen> sampler(p, shared, area, params);
  int64_t token = sampler.choose(params, rng, count, top_p);
  if (token == kSlowly) {
    token = choose_slowly<T, kSeen>(p, shared, area, sampler.cluster.round, sampler.most, sampler.floor,
                                    count, top_p);
  }
  if (token < 0) return;
  p.tokens[p.row()] = static_cast<int32_t>(token);
  // nobody else adds to it: only so that this thread need not wait for the old value
  atomicAdd(reinterpret_cast<unsigned long long*>(rng + 1), 1ull);
  if constexpr (kSeen) p.seen[p.row() * p.n + token] = 1;
}

/// How many blocks share a row: so many that few rows keep the whole chip at work.
int blocks_of_row(const Launch& on, int64_t rows, int64_t vectors) {
  int blocks = 1;
  while (on.arch >= 90 && blocks < kMostBlocks && rows * blocks * 2 <= kResident * on.multiprocessors &&
         vectors >= int64_t{kThreads} / 2 * blocks)
    blocks *= 2;
  return blocks;
}

template <typename T>
cudaError_t launch_sample(const Launch& launch, cudaStream_t stream, int64_t rows, Problem<T> p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t vectors = (p.n + 2 * (N - 1)) / N;  // of a row that begins inside one
  Launch on = launch;
  on.stream = stream;
  on.early = false;
  LaunchShape shape;
  p.blocks = blocks_of_row(launch, rows, vectors);
  shape.cluster = static_cast<unsigned>(p.blocks);
  shape.grid = dim3(static_cast<unsigned>(rows) * shape.cluster);
  shape.block = dim3(kThreads);
  p.part = static_cast<int>((vectors + p.blocks - 1) / p.blocks);
  p.run = ((p.part + kWarps - 1) / kWarps + 7) / 8 * 8;
  p.fold = 0;
  while (((p.run + kStep - 1) / kStep + (1 << p.fold) - 1) >> p.fold > kSlots) ++p.fold;
  // items for a quarter of the row, and for chance; none where there is room for far less
  const int64_t fixed = sizeof(float) * kSlots * kThreads, each = kThreads * 16;
  const int64_t room = launch.shared / kResident - 2048 - static_cast<int64_t>(sizeof(Shared)) - fixed;
  const int64_t wanted = p.part * int64_t{16} / 4 + kThreads * 48;
  const bool has_items = p.n >= 8 * kListed && room >= std::max(wanted / 3, 3 * each);
  p.item_bytes = has_items ? static_cast<int>(std::min(room, wanted) / each * each) : 0;
  shape.shared = static_cast<size_t>(fixed) + std::max(sizeof(List), static_cast<size_t>(p.item_bytes));
  return p.seen ? launch_kernel(on, shape, sample_kernel<T, true>, p)
                : launch_kernel(on, shape, sample_kernel<T, false>, p);
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
