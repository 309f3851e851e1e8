// sample, over rows of logits. Its rules are backend.h's and those of the CPU backend, draw for draw:
// ../random.h.
//
// A row is shared by a cluster of blocks (one block before sm_90). Its logits are read once and stay in the
// cluster's shared memory as they came, each 16-byte vector there for the thread that has copied it; rows too
// long for that are read from global memory in every pass. Weights are made anew wherever they are needed and
// added as integers of 2^-40, so that sums do not depend on the order in which threads come.
//
// Nothing is sorted but a short list. With top-k, and with top-p where the rest of the row cannot weigh
// enough, tokens under a cut are out: top-k keeps at least the k-th largest of the threads' own maxima. What
// is left is mostly few, goes in the order of its indices to the first block's list, and that block alone
// ranks it, filters and draws. When it is more, top-k and top-p are both the smallest key that has less than
// a given weight above it: a search over histograms of the keys, narrower by 9 bits each time.
#include "../random.h"
#include "activation.cuh"
#include "cluster.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kBuckets = 512;   // two a thread where that many threads are
constexpr int kListed = 2 * kThreads;
constexpr float kLargest = 3.402823466e+38f;

/// Unsigned keys in the order of the floats (no NaN; -0 and 0 are one), and back.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// 2^40 e^x for x <= 0: the steps of expf() with a power of two that is 40 higher, so that it is expf(x)
/// times 2^40 to the bit wherever that is 1 or more.
__device__ __forceinline__ float scaled_exp(float x) {
  const float power = __fmaf_rd(__saturatef(fmaf(x, 0x1.77313ap-8f, 0.5f)), 252.0f, 12582913.0f + 40.0f);
  const float rest = fmaf(x, 0x1.4ae0cp-26f, fmaf(x, 0x1.715476p+0f, 12583039.0f + 40.0f - power));
  return rough_exp2(rest) * __uint_as_float(__float_as_uint(power) << 23);
}
using Weight = unsigned long long;  // multiples of 2^-40; 2^24 of the largest have room
__device__ __forceinline__ Weight weight_of(float l, float most) {
  return __float2ull_rz(scaled_exp(l - most));
}
/// The weight of a token that is kept, 0 of another; min_p too is in units of 2^-40, and 0 keeps all.
__device__ __forceinline__ Weight kept_weight(float l, float most, float floor, float min_p) {
  const float w = scaled_exp(l - most);
  return l >= floor && !(w < min_p && l < most) ? __float2ull_rz(w) : 0;
}

template <typename T>
struct Problem {
  int32_t* tokens;
  const T* logits;
  const float* params;
  int64_t* rng;
  uint8_t* seen;
  int64_t n;
  int64_t part;  // vectors of a block
  int blocks;    // of a row: 1, 2, 4 or 8, a cluster

  __device__ __forceinline__ int64_t row() const { return blockIdx.x / static_cast<unsigned>(blocks); }
  __device__ __forceinline__ int rank() const { return static_cast<int>(blockIdx.x) & (blocks - 1); }
  __device__ __forceinline__ void barrier() const {
    if (blocks == 1) {
      __syncthreads();
    } else {
      __syncwarp();  // the barrier is for whole warps, and lanes come from loops of their own
      cluster_barrier();
    }
  }
};

struct alignas(16) Shared {
  union {
    uint2 sums[kBuckets];  // a Weight each, the low word first
    struct {
      float l[kListed];
      int32_t index[kListed];
    } list;
  };
  Weight slots[2][kMostBlocks][2];  // what the blocks of the cluster tell each other, in turns
  Weight warps[kWarps];
  Weight above;
  double uniform;
  int bucket;
  uint32_t least;
};
/// What the first block's list needs besides, where the logits were.
struct Ranked {
  float sorted[kListed];
  uint32_t ranks[kListed];
};

/// The sum over the threads before this one, and over all. Every thread of the block calls it, and there is a
/// barrier before they do so again.
struct Prefix {
  Weight before, total;
};
__device__ Prefix block_prefix(Shared& s, Weight own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Weight sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Weight other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) s.warps[warp] = sum;
  __syncthreads();
  Prefix prefix{sum - own, 0};
#pragma unroll 4
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) prefix.before += s.warps[w];
    prefix.total += s.warps[w];
  }
  return prefix;
}

__device__ __forceinline__ Weight warp_total(Weight own) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  return own;
}

/// x / d, rounded to nearest as __fdiv_rn() does it. With the reciprocal at hand two corrections are enough
/// while nothing leaves the normal floats.
struct Divisor {
  float d, reciprocal;
  bool easy;

  __device__ explicit Divisor(float divisor) {
    d = divisor;
    reciprocal = __frcp_rn(divisor);
    easy = divisor > 0x1p-60f && divisor < 0x1p60f;
  }
  __device__ __forceinline__ float under(float x) const {
    if (!easy || !(fabsf(x) > 0x1p-60f && fabsf(x) < 0x1p60f)) return __fdiv_rn(x, d);
    float q = x * reciprocal;
    q = fmaf(fmaf(-d, q, x), reciprocal, q);
    return fmaf(fmaf(-d, q, x), reciprocal, q);
  }
};

/// The running sum that the token drawn is the first to exceed; rounding must not put it beyond them all.
__device__ __forceinline__ Weight draw_target(const Shared& s, Weight total) {
  return min(static_cast<Weight>(s.uniform * static_cast<double>(total)), total - 1);
}
/// Tokens with less than this above them are the top-p of what weighs `total` together. It is above 0, so
/// that something is kept, and not above the total: that is 2^40 at least, and a top-p under 1 is 2^-24 from
/// it.
__device__ __forceinline__ Weight top_p_target(float top_p, Weight total) {
  return static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

/// Filters and draws from the list of `size`, by the first block: top-k where `count` is not 0, and top-p
/// where it is below 1. Without top-k `total` is what the whole row weighs.
__device__ __noinline__ int64_t draw_listed(Shared& s, Ranked& ranked, int size, float most, Weight count,
                                            float top_p, Weight total, float min_p) {
  float floor = -kLargest;
  const int thread = threadIdx.x;
  // how many are larger, or as large and before; several threads a token when there are many threads
  int width = 32;
  while (width < size && width < kThreads) width = min(2 * width, kThreads);
  const int slices = kThreads / width, slice = thread / width, each = (size + slices - 1) / slices;
  for (int i = thread; i < size; i += kThreads) ranked.ranks[i] = 0;
  __syncthreads();
  for (int i = thread % width; i < size; i += width) {
    const float l = s.list.l[i];
    uint32_t rank = 0;
    const int stop = min(size, (slice + 1) * each);
#pragma unroll 4
    for (int j = slice * each; j < stop; ++j) {
      const float other = s.list.l[j];
      rank += other > l || (other == l && j < i) ? 1 : 0;
    }
    atomicAdd(&ranked.ranks[i], rank);
  }
  if (thread == 0) s.least = ~0u;
  __syncthreads();
  for (int i = thread; i < size; i += kThreads) ranked.sorted[ranked.ranks[i]] = s.list.l[i];
  __syncthreads();
  if (count > 0 && count <= static_cast<Weight>(size)) floor = ranked.sorted[count - 1];
  const int at = 2 * thread;
  if (top_p < 1.0f) {
    const float first = at < size ? ranked.sorted[at] : -INFINITY;
    const float second = at + 1 < size ? ranked.sorted[at + 1] : -INFINITY;
    const Weight a = first >= floor ? weight_of(first, most) : 0,
                 b = second >= floor ? weight_of(second, most) : 0;
    const Prefix prefix = block_prefix(s, a + b);
    const Weight target = top_p_target(top_p, count > 0 ? prefix.total : total);
    if (a > 0 && prefix.before < target) atomicMin(&s.least, key_of(first));
    if (b > 0 && prefix.before + a < target) atomicMin(&s.least, key_of(second));
    __syncthreads();
    floor = value_of(s.least);
  }
  const auto weight_at = [&](int i) { return i < size ? kept_weight(s.list.l[i], most, floor, min_p) : 0; };
  const Weight a = weight_at(at), b = weight_at(at + 1);
  const Prefix prefix = block_prefix(s, a + b);
  const Weight target = draw_target(s, prefix.total);
  if (target < prefix.before || target >= prefix.before + a + b) return -1;
  return s.list.index[target < prefix.before + a ? at : at + 1];
}

/// A block's part of a row: vectors of 16 bytes where global memory has them, so that the first and the last
/// of a row may reach beyond it. A warp has a run of them, its lanes take turns.
///
/// kResident: the vectors are in shared memory. kPlain: neither penalty nor temperature.
template <typename T, bool kResident, bool kPlain>
struct Part {
  static constexpr int N = 16 / sizeof(T);
  using Index = std::conditional_t<kResident, int, int64_t>;

  const Problem<T>& p;
  const T* x;           // the row
  const uint8_t* seen;  // null: no penalty
  Index n, offset;      // element of the row that vector 0 begins with
  Index begin, end;     // vectors of this warp
  Vec<T, N>* here;      // resident vectors; after them a byte each, the bits of `seen`
  float penalty;
  Divisor temperature;

  __device__ Part(const Problem<T>& problem, const float* params, int64_t row, char* area)
      : p(problem), penalty(params[kRepetitionPenalty]), temperature(params[kTemperature]) {
    n = static_cast<Index>(p.n);
    x = p.logits + row * p.n;
    seen = p.seen && penalty > 0.0f && penalty != 1.0f ? p.seen + row * p.n : nullptr;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    const Index part = static_cast<Index>(p.part), vectors = (n + shift + N - 1) / N;
    const Index first = min(vectors, p.rank() * part), count = min(part, vectors - first);
    offset = first * N - shift;
    here = reinterpret_cast<Vec<T, N>*>(area);
    const Index run = (count + kWarps - 1) / kWarps;
    begin = min(count, static_cast<Index>(threadIdx.x / 32) * run);
    end = min(count, begin + run);
  }

  __device__ __forceinline__ Index index(Index v) const { return offset + v * N; }
  __device__ __forceinline__ uint8_t* marks() const { return reinterpret_cast<uint8_t*>(here + p.part); }
  __device__ __forceinline__ bool inside(Index v) const { return index(v) >= 0 && index(v) + N <= n; }

  /// A vector from global memory; -infinity for what is not of the row.
  __device__ __forceinline__ Vec<T, N> read(Index v) const {
    if (inside(v)) return *reinterpret_cast<const Vec<T, N>*>(x + index(v));
    Vec<T, N> vector;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Index i = index(v) + j;
      vector.v[j] = i >= 0 && i < n ? x[i] : from_float<T>(-INFINITY);
    }
    return vector;
  }
  /// Bit j: element j is to be penalised.
  __device__ __forceinline__ uint32_t read_marks(Index v) const {
    using Bytes = std::conditional_t<N == 8, uint2, uint32_t>;
    const uint8_t* from = seen + index(v);
    uint32_t bits = 0;
    if (inside(v) && is_aligned(from, N)) {
      const Bytes bytes = *reinterpret_cast<const Bytes*>(from);
#pragma unroll
      for (int j = 0; j < N; ++j) bits |= (reinterpret_cast<const uint8_t*>(&bytes)[j] ? 1u : 0u) << j;
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (index(v) + j >= 0 && index(v) + j < n && from[j]) bits |= 1u << j;
      }
    }
    return bits;
  }
  __device__ __forceinline__ void fetch(Index v) const {
    if (inside(v))
      copy_async(shared_address(here + v), x + index(v), 16);
    else
      here[v] = read(v);
    if constexpr (!kPlain) {
      if (seen) marks()[v] = static_cast<uint8_t>(read_marks(v));
    }
  }

  /// Calls body(value, j) for the elements of a vector, penalised, not yet divided by the temperature.
  template <typename Body>
  __device__ __forceinline__ void values(Index v, const Body& body) const {
    const Vec<T, N> vector = kResident ? here[v] : read(v);
    uint32_t bits = 0;
    if constexpr (!kPlain) {
      if (seen) bits = kResident ? marks()[v] : read_marks(v);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = fminf(fmaxf(to_float(vector.v[j]), -INFINITY), kLargest);  // NaN: -infinity
      if constexpr (!kPlain) {
        if (bits >> j & 1)
          value = fminf(kLargest, value < 0.0f ? value * penalty : __fdiv_rn(value, penalty));
      }
      body(value, j);
    }
  }
  /// The largest of them; never NaN.
  __device__ __forceinline__ float largest(Index v) const {
    float most = -INFINITY;
    if constexpr (kPlain && N == 8) {
      using Pair = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
      const Vec<T, N> vector = kResident ? here[v] : read(v);
      const Pair* pairs = reinterpret_cast<const Pair*>(&vector);
      const Pair two = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
      most = fminf(fmaxf(fmaxf(most, to_float(two.x)), to_float(two.y)), kLargest);
    } else {
      values(v, [&](float value, int) { most = fmaxf(most, value); });
    }
    return most;
  }
  /// -infinity stays: what a caller has masked is never chosen.
  __device__ __forceinline__ float warm(float x) const {
    if constexpr (kPlain) return x;
    if (temperature.d == 1.0f || !(x >= -kLargest)) return x;
    return fmaxf(-kLargest, fminf(kLargest, temperature.under(x)));
  }
  /// Whether one of them is at least `cut` when divided by the temperature.
  __device__ __forceinline__ bool reaches(Index v, float cut) const { return warm(largest(v)) >= cut; }
  /// The same as values(), divided by the temperature.
  template <typename Body>
  __device__ __forceinline__ void logits(Index v, const Body& body) const {
    values(v, [&](float value, int j) { body(warm(value), j); });
  }
};

/// The smallest l >= `lowest` that has less than `target` above it; `lowest` when all together are less.
/// A token weighs its weight, or 1. Not inline, for the sake of the registers of what is always run.
template <bool kWeighted, typename Row>
__device__ __noinline__ float threshold(Shared& s, const Row row, float own, float most, float lowest,
                                        Weight target) {
  using Index = typename Row::Index;
  uint32_t low = key_of(lowest), high = key_of(most);
  Weight above = 0;
  while (low < high) {
    const int shift = max(0, 23 - __clz(static_cast<int>(high - low)));
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) s.sums[b] = make_uint2(0, 0);
    __syncthreads();
    if (threadIdx.x == 0) s.bucket = -1;
    if (key_of(own) >= low) {
      for (Index v = row.begin + threadIdx.x % 32; v < row.end; v += 32) {
        row.logits(v, [&](float l, int) {
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
      }
    }
    row.p.barrier();
    const int bucket = kBuckets - 2 - 2 * static_cast<int>(threadIdx.x);  // and the one above it
    Weight lower = 0, upper = 0;
    for (int r = 0; bucket >= 0 && r < row.p.blocks; ++r) {
      const uint4 both = *reinterpret_cast<const uint4*>(cluster_place(&s.sums[bucket], r));
      lower += static_cast<Weight>(both.y) << 32 | both.x;
      upper += static_cast<Weight>(both.w) << 32 | both.z;
    }
    Weight before = above + block_prefix(s, lower + upper).before;
    if (before < target && target <= before + upper) {
      s.bucket = bucket + 1;
      s.above = before;
    }
    before += upper;
    if (before < target && target <= before + lower) {
      s.bucket = bucket;
      s.above = before;
    }
    row.p.barrier();
    if (s.bucket < 0) return lowest;
    low += static_cast<uint32_t>(s.bucket) << shift;
    high = min(high, low + (1u << shift) - 1);
    above = s.above;
  }
  return value_of(low);
}

template <typename T, bool kResident, bool kPlain>
struct Sampler {
  using Row = Part<T, kResident, kPlain>;
  using Index = typename Row::Index;

  Shared& s;
  const Row& row;
  Ranked& ranked;
  int round = 0;
  float own = -INFINITY;   // largest l of this thread's
  float most = -INFINITY;  // and of the row
  float floor = -kLargest, min_p = 0.0f;

  __device__ Sampler(Shared& shared, const Row& part, char* area)
      : s(shared), row(part), ranked(*reinterpret_cast<Ranked*>(area)) {}

  __device__ __forceinline__ Weight weight(float l) const { return kept_weight(l, most, floor, min_p); }

  /// Every block's (a, b), as its first threads have them, to all of the cluster; slot(r) then has them.
  __device__ void tell(Weight a, Weight b) {
    ++round;
    if (static_cast<int>(threadIdx.x) < row.p.blocks) {
      Weight* slot = cluster_place(&s.slots[round % 2][row.p.rank()][0], threadIdx.x);
      slot[0] = a;
      slot[1] = b;
    }
    row.p.barrier();
  }
  __device__ __forceinline__ const Weight* slot(int rank) const { return s.slots[round % 2][rank]; }

  /// The sum over the cluster of what the warps have, and over the warps before this one.
  __device__ Prefix sum_before(Weight of_warp) {
    const Prefix in_block = block_prefix(s, threadIdx.x % 32 == 0 ? of_warp : 0);
    tell(in_block.total, 0);
    Prefix prefix{__shfl_sync(0xffffffffu, in_block.before, 0), 0};
#pragma unroll 1  // for the sake of the registers
    for (int r = 0; r < row.p.blocks; ++r) {
      if (r < row.p.rank()) prefix.before += slot(r)[0];
      prefix.total += slot(r)[0];
    }
    return prefix;
  }

  /// What the kept tokens of the warp weigh.
  __device__ Weight weigh() const {
    Weight sum = 0;
    const Index first = row.begin + threadIdx.x % 32;
    if (floor == -kLargest && min_p == 0.0f) {
      for (Index v = first; v < row.end; v += 32)
        row.logits(v, [&](float l, int) { sum += weight_of(l, most); });
    } else if (own >= floor) {
      for (Index v = first; v < row.end; v += 32) {
        if (row.reaches(v, floor)) row.logits(v, [&](float l, int) { sum += weight(l); });
      }
    }
    return warp_total(sum);
  }

  /// The drawn token in the one thread that finds it, -1 in the others.
  __device__ int64_t draw() {
    const int lane = threadIdx.x % 32;
    const Weight of_warp = weigh();
    const Prefix prefix = sum_before(of_warp);
    const Weight target = draw_target(s, prefix.total);
    Weight sum = prefix.before;
    if (!(sum <= target && target < sum + of_warp)) return -1;
    for (Index first = row.begin;; first += 32) {
      const Index v = first + lane;
      Weight mine = 0;
      if (v < row.end) row.logits(v, [&](float l, int) { mine += weight(l); });
      Weight upto = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const Weight other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
      }
      const unsigned passed = __ballot_sync(0xffffffffu, sum + upto > target);
      if (passed == 0) {
        sum += __shfl_sync(0xffffffffu, upto, 31);
        continue;
      }
      if (lane != __ffs(static_cast<int>(passed)) - 1) return -1;
      int64_t token = -1;
      sum += upto - mine;
      row.logits(v, [&](float l, int j) {
        sum += weight(l);
        if (token < 0 && sum > target) token = row.index(v) + j;
      });
      return token;
    }
  }

  /// Puts the tokens with l >= cut on the first block's list, in the order of their indices, when they find
  /// room there, and returns how many they are.
  __device__ Weight list(float cut) {
    const int lane = threadIdx.x % 32;
    uint32_t count = 0;
    if (own >= cut) {
      for (Index v = row.begin + lane; v < row.end; v += 32) {
        if (row.reaches(v, cut)) row.logits(v, [&](float l, int) { count += l >= cut ? 1 : 0; });
      }
    }
    const Weight of_warp = warp_total(count);
    const Prefix prefix = sum_before(of_warp);
    if (prefix.total > kListed) return prefix.total;
    if (of_warp > 0) {
      float* to_l = cluster_place(s.list.l, 0);
      int32_t* to_index = cluster_place(s.list.index, 0);
      int at = static_cast<int>(prefix.before);
      for (Index first = row.begin; first < row.end; first += 32) {
        const Index v = first + lane;
        int mine = 0;
        if (v < row.end && row.reaches(v, cut))
          row.logits(v, [&](float l, int) { mine += l >= cut ? 1 : 0; });
        int upto = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, upto, step);
          if (lane >= step) upto += other;
        }
        if (mine > 0) {
          int place = at + upto - mine;
          row.logits(v, [&](float l, int j) {
            if (l >= cut) {
              to_l[place] = l;
              to_index[place++] = static_cast<int32_t>(row.index(v) + j);
            }
          });
        }
        at += __shfl_sync(0xffffffffu, upto, 31);
      }
    }
    row.p.barrier();
    return prefix.total;
  }

  /// The token, in one thread of the cluster; -1 in all others.
  __device__ int64_t choose(const float* params, const int64_t* rng) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float temperature = params[kTemperature], top_p = params[kTopP], k = params[kTopK];
    const bool greedy = !(temperature > 0.0f) || top_p <= 0.0f;
    const Weight count = !greedy && k >= 1.0f && k < static_cast<float>(row.n) ? static_cast<Weight>(k) : 0;

    Index best = row.begin;
    const auto see = [&](Index v) {
      const float here = row.largest(v);
      if (here > own) {
        own = here;
        best = v;
      }
    };
    // all copies are under way before the first is looked at
    constexpr int kGroups = 4;
    const Index each = (row.end - row.begin + 32 * kGroups - 1) / (32 * kGroups) * 32;
    const auto visit = [&](int group, const auto& body) {
      const Index stop = min(row.end, row.begin + (group + 1) * each);
      for (Index v = row.begin + group * each + lane; v < stop; v += 32) body(v);
    };
    if constexpr (kResident) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        visit(g, [&](Index v) { row.fetch(v); });
        commit_copies();
      }
    }
    if (threadIdx.x == 0) s.uniform = uniform(rng[0], rng[1]);
    __syncwarp();
    if (row.p.blocks > 1) cluster_meet();  // nothing is written to a block that has not begun
    if constexpr (kResident) {
      wait_copies<3>();
      visit(0, see);
      wait_copies<2>();
      visit(1, see);
      wait_copies<1>();
      visit(2, see);
      wait_copies<0>();
      visit(3, see);
    } else {
#pragma unroll 4
      for (Index v = row.begin + lane; v < row.end; v += 32) see(v);
    }
    // the largest value, then the lowest index
    uint32_t index = 0;
    if (greedy && own > -INFINITY) {
      row.values(best, [&](float value, int j) {
        if (index == 0 && value == own) index = static_cast<uint32_t>(row.index(best) + j) + 1;
      });
      --index;
    }
    const uint32_t own_key = key_of(own);
    Weight largest = static_cast<Weight>(own_key) << 32 | (~index & 0xffffffffu);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0) s.warps[warp] = largest;
    __syncthreads();
    if (warp == 0) {
      largest = lane < kWarps ? s.warps[lane] : 0;
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    // at least `of_block` of the block's threads have a value that is not below `least`, the upper bits of
    // the last one's
    const Weight of_block = (count + row.p.blocks - 1) / row.p.blocks;
    uint32_t least = 0;
    if (of_block > 0 && of_block <= kThreads) {
      for (int bit = 31; bit >= 16; --bit) {
        const uint32_t higher = least | 1u << bit;
        if (__syncthreads_count(own_key >= higher) >= static_cast<int>(of_block)) least = higher;
      }
    }
    tell(largest, least);
    largest = slot(0)[0];
    least = static_cast<uint32_t>(slot(0)[1]);
#pragma unroll 1
    for (int r = 1; r < row.p.blocks; ++r) {
      largest = max(largest, slot(r)[0]);
      least = min(least, static_cast<uint32_t>(slot(r)[1]));
    }
    const uint32_t key = static_cast<uint32_t>(largest >> 32);
    const bool first_block = row.p.rank() == 0;
    if (greedy || key == key_of(-INFINITY)) {
      if (!first_block || threadIdx.x != 0) return -1;
      return key == key_of(-INFINITY) ? 0 : static_cast<int64_t>(~static_cast<uint32_t>(largest));
    }

    most = row.warm(value_of(key));
    own = row.warm(own);
    min_p = params[kMinP] > 0.0f ? fminf(params[kMinP], 1.0f) * 0x1p40f : 0.0f;
    if (count > 0) {
      const float cut = row.warm(value_of(max(least, key_of(-kLargest))));
      if (of_block <= kThreads) {
        const Weight listed = list(cut);
        if (listed <= kListed)
          return first_block ? draw_listed(s, ranked, static_cast<int>(listed), most, count, top_p, 0, min_p)
                             : -1;
      }
      floor = threshold<false>(s, row, own, most, cut, count);
    }
    if (top_p < 1.0f) {
      const float every = min_p;
      min_p = 0.0f;
      const Weight total = sum_before(weigh()).total;
      min_p = every;
      const Weight target = top_p_target(top_p, total);
      // all tokens below it, were they n of its weight, would not be enough for what is left out; 1 % more
      // for the roundings
      const double rest = static_cast<double>(total - target) / static_cast<double>(row.n);
      const float cut = fmaxf(
          floor, __fadd_rd(most, logf(static_cast<float>(rest * 9.094947017729282e-13)) - 0.01f));  // 2^-40
      const Weight listed = list(cut);
      if (listed <= kListed)
        return first_block ? draw_listed(s, ranked, static_cast<int>(listed), most, 0, top_p, total, min_p)
                           : -1;
      floor = threshold<true>(s, row, own, most, cut, target);
    }
    return draw();
  }
};

template <typename T, bool kResident>
__global__ void __launch_bounds__(kThreads, HALFBYTE_SM75 ? 2 : 3)
    sample_kernel(const __grid_constant__ Problem<T> p) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char area[];
  const int64_t row = p.row();
  const float* params = p.params + row * kSamplingColumns;
  int64_t* rng = p.rng + 2 * row;
  const float penalty = params[kRepetitionPenalty];
  const auto choose = [&](auto plain) {
    const Part<T, kResident, plain.value> part(p, params, row, area);
    return Sampler<T, kResident, plain.value>(shared, part, area).choose(params, rng);
  };
  const bool plain = params[kTemperature] == 1.0f && !(p.seen && penalty > 0.0f && penalty != 1.0f);
  const int64_t token = plain ? choose(std::true_type{}) : choose(std::false_type{});
  if (token < 0) return;
  p.tokens[row] = static_cast<int32_t>(token);
  // nobody else adds to it: only so that this thread need not wait for the old value
  atomicAdd(reinterpret_cast<unsigned long long*>(rng + 1), 1ull);
  if (p.seen) p.seen[row * p.n + token] = 1;
}

/// How many blocks share a row: so few that three of them find room on a multiprocessor, or so many that
/// few rows keep the whole chip at work.
int blocks_of_row(const Launch& on, int64_t rows, int64_t vectors) {
  if (on.arch < 90) return 1;
  const int64_t room = on.shared / 3 - 1024 - static_cast<int64_t>(sizeof(Shared));
  int blocks = 1;
  while (blocks < kMostBlocks &&
         ((vectors + blocks - 1) / blocks * 16 > room ||
          (rows * blocks * 2 <= 2 * on.multiprocessors && vectors >= int64_t{kThreads} / 2 * blocks)))
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
  p.part = (vectors + p.blocks - 1) / p.blocks;
  const int64_t bytes = p.part * 16 + (p.seen ? p.part : 0);
  const bool resident = bytes + static_cast<int64_t>(sizeof(Shared)) + 1024 <= launch.shared;
  shape.shared = std::max(sizeof(Ranked), resident ? static_cast<size_t>(bytes) : 0);
  return resident ? launch_kernel(on, shape, sample_kernel<T, true>, p)
                  : launch_kernel(on, shape, sample_kernel<T, false>, p);
}

}  // namespace

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
    return launch_sample<T>(launch_, stream(queue), rows,
                            {tokens.as<int32_t>(), logits.as<const T>(), params.as<const float>(),
                             rng.as<int64_t>(), seen ? seen.as<uint8_t>() : nullptr, n, 0, 0});
  });
  return check(error, "sample");
}

}  // namespace halfbyte::cuda
