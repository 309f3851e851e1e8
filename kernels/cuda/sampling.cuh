// What the kernel of `sample` is made of below its passes over a row: keys and weights of logits, what the
// blocks of a cluster share, and how a block reads its part of a row.
#pragma once

#include "activation.cuh"
#include "cluster.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace sampling {

constexpr int kMostWarps = 16;  // of a block
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kBucketBits = 9;
constexpr int kBuckets = 1 << kBucketBits;  // of a histogram of weights
constexpr int kBins = 512;                  // of the histogram of a sample
constexpr int kPlaces = 1024;               // of the histogram of what a pass remembers
constexpr int kSampled = 8192;              // logits of a sample
constexpr int kAhead = 384;                 // vectors of a warp that L2 is asked for ahead: 6 KiB
constexpr int kListed = 1024;               // tokens that one block ranks
constexpr int kPeaked = 128;                // tokens that a list for top-p has at least
constexpr int kLoads = 2;                   // vectors that a thread asks for at once
constexpr int kStep = 32 * kLoads;          // vectors of a warp's step
constexpr int kSlots = 8;                   // of the run of a warp: a thread's part of one is a group
constexpr float kMostExponent = 0x1p22f;    // of weights: a float there has no quarters
constexpr float kLargest = 3.402823466e+38f;

/// Blocks that a multiprocessor has at once: 64 registers a thread.
template <int kThreads>
constexpr int kResident = 1024 / kThreads;

__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

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

/// Logits [rows, n] and what goes with them, and how blocks and warps share a row.
template <typename T>
struct Problem {
  int32_t* tokens;
  const T* logits;
  const float* params;
  int64_t* rng;
  uint8_t* seen;
  int64_t n;
  int part, run;  // vectors of a block, of a warp
  int blocks;     // of a row: 1, 2, 4 or 8, a cluster
  int log_blocks;
  int fold;      // 2^fold steps of a warp make a slot
  int capacity;  // items that two lanes can remember of a row

  __device__ __forceinline__ int slot() const { return kStep << fold; }  // vectors
  __device__ __forceinline__ int64_t row_of(unsigned block) const { return block >> log_blocks; }
  __device__ __forceinline__ int64_t row() const { return row_of(blockIdx.x); }
  __device__ __forceinline__ const float* params_of_row() const { return params + row() * kSamplingColumns; }
};

struct alignas(16) Shared {
  union {
    uint2 sums[kBuckets];  // a sum each, in two words
    uint32_t counts[kBins];
    uint32_t places[kPlaces];  // of the histogram of what is remembered
    float gathered[kListed];   // what is in one of them
    int32_t queue[kListed];    // groups that hold tokens for the list
  };
  Weight slots[2][kMostBlocks][3];  // what the blocks of the cluster tell each other, in turns
  Weight warps[kMostWarps];
  float2 pairs[kMostWarps];
  double runs[2][kMostWarps];           // what tokens of each warp weigh
  double sums_of[kMostWarps][kSlots];   // and of the slots of its run
  double above_of[kMostWarps][kSlots];  // those above the upper bound
  double beyond[kMostWarps];            // what a warp remembers that is above the histogram
  double upto[kMostWarps];              // what the places of the threads of a warp weigh
  double before;                        // and all those above the place found
  Weight above;                         // what lies above a bucket
  double uniform;                       // the random number
  float divisor, min_p;                 // the temperature; in units of 2^-40, 0 where it is off
  int bucket, in_bucket;                // that is found, and how many are gathered of it
  uint32_t of_bucket;                   // their sum
  float cut;
  uint32_t least;
  int queued, listed, counted;  // groups on the queue; tokens on the list (the first block's), of this block
  int low_bin, high_bin;        // of the bounds of a cut, counted from the lowest logits
  float rest;                   // what the row weighs beyond its top-p, for the second pass
  int round;                    // the cluster's, for the pass after one that chose no token
};
/// What the kernel was given is in shared memory too, so that functions which are not inline need not be
/// handed it, and know in what memory they are.
__device__ __forceinline__ Shared& shared() {
  __shared__ Shared s;
  return s;
}
template <typename T>
__device__ __forceinline__ Problem<T>& problem() {
  __shared__ Problem<T> p;
  return p;
}
extern __shared__ __align__(16) char dynamic_area[];

/// Tokens that one block ranks.
struct List {
  float l[kListed];
  int32_t index[kListed];
};
/// What the ranking needs besides, where the groups were.
struct Ranked {
  float sorted[kListed];
  uint32_t ranks[kListed];
};

/// The blocks of a row. They speak in rounds, of which two have room: a block that has gone on to the next
/// one cannot reach the one after before all have read this. A block's last access to another's memory is
/// followed by a barrier, so that none ends while it is read.
template <int kThreads>
struct Cluster {
  Shared& s;
  int blocks, rank;
  int round;

  __device__ __forceinline__ explicit Cluster(int blocks_of_row, int rounds = 0)
      : s(shared()),
        blocks(blocks_of_row),
        rank(static_cast<int>(blockIdx.x) & (blocks_of_row - 1)),
        round(rounds) {}

  __device__ __forceinline__ void barrier() const {
    if (blocks == 1) {
      __syncthreads();
    } else {
      __syncwarp();  // the barrier is for whole warps, and lanes come from loops of their own
      cluster_barrier();
    }
  }
  /// Every block's words, as its first threads have them, to all of the cluster; slot(r) then has them.
  __device__ void tell(Weight a, Weight b = 0, Weight c = 0) {
    ++round;
    if (static_cast<int>(threadIdx.x) < blocks) {
      Weight* slot = cluster_place(&s.slots[round % 2][rank][0], static_cast<int>(threadIdx.x));
      slot[0] = a;
      slot[1] = b;
      slot[2] = c;
    }
    barrier();
  }
  __device__ void tell(double a, double b, double c) { tell(word_of(a), word_of(b), word_of(c)); }
  __device__ __forceinline__ const Weight* slot(int r) const { return s.slots[round % 2][r]; }
  __device__ __forceinline__ double number(int r, int i) const {
    return __longlong_as_double(static_cast<long long>(slot(r)[i]));
  }
  /// The sum of what the blocks have told, in their order.
  __device__ double sum(int i) const {
    double sum = 0.0;
#pragma unroll 1
    for (int r = 0; r < blocks; ++r) sum += number(r, i);
    return sum;
  }
  static __device__ __forceinline__ Weight word_of(double x) {
    return static_cast<Weight>(__double_as_longlong(x));
  }
};

/// The sum over the threads before this one, and over all. Every thread of the block calls it, and there is a
/// barrier before they do so again.
struct Prefix {
  Weight before, total;
};
template <int kThreads>
__device__ __forceinline__ Prefix block_prefix(Shared& s, Weight own) {
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
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) prefix.before += s.warps[w];
    prefix.total += s.warps[w];
  }
  return prefix;
}

template <typename N>
__device__ __forceinline__ N warp_total(N own) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  return own;
}

/// Of parts that lanes have, the one that `target` falls into, and what is before it; the last that weighs
/// anything when roundings put it beyond them. `upto`: the sums of the parts up to each.
struct Picked {
  int part;
  double before, weight;
};
__device__ __forceinline__ double warp_upto(double part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, part, step);
    if (lane >= step) part += other;
  }
  return part;
}
__device__ __forceinline__ Picked pick(double part, double upto, double target) {
  const unsigned all = __ballot_sync(0xffffffffu, part > 0.0);
  const unsigned beyond = __ballot_sync(0xffffffffu, part > 0.0 && target < upto);
  const int at =
      beyond != 0 ? __ffs(static_cast<int>(beyond)) - 1 : max(0, 31 - __clz(static_cast<int>(all)));
  return {at, __shfl_sync(0xffffffffu, upto - part, at), __shfl_sync(0xffffffffu, part, at)};
}

/// A logit divided by the temperature, rounded to nearest as __fdiv_rn() does it. With the reciprocal at hand
/// two corrections are enough while nothing leaves the normal floats.
struct Temperature {
  float d, reciprocal;
  bool easy;

  __device__ explicit Temperature(float divisor)
      : d(divisor), reciprocal(1.0f / divisor), easy(divisor > 0x1p-60f && divisor < 0x1p60f) {}

  __device__ __forceinline__ float under(float value) const {
    if (!easy || !(fabsf(value) > 0x1p-60f && fabsf(value) < 0x1p60f)) return __fdiv_rn(value, d);
    float q = value * reciprocal;
    q = fmaf(fmaf(-d, q, value), reciprocal, q);
    return fmaf(fmaf(-d, q, value), reciprocal, q);
  }
  /// -infinity stays: what a caller has masked is never chosen.
  __device__ __forceinline__ float warm(float value) const {
    if (d == 1.0f || !(value >= -kLargest)) return value;
    return fmaxf(-kLargest, fminf(kLargest, under(value)));
  }
  /// Otherwise the division may make many logits one, or infinity.
  static __device__ __forceinline__ bool is_mild(float d) { return d > 0x1p-20f && d < 0x1p20f; }
};

/// The elements of a vector as words: so they stay whole registers.
template <typename T>
struct Words {
  uint32_t w[4];

  __device__ __forceinline__ float value(int j) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(w[j]);
    if constexpr (std::is_same_v<T, bf16_t>)
      return __uint_as_float(j % 2 == 0 ? w[j / 2] << 16 : w[j / 2] & 0xffff0000u);
    if constexpr (std::is_same_v<T, half_t>) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&w[j / 2]);
      return j % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }
  /// -infinity in all.
  static __device__ __forceinline__ Words nothing() {
    constexpr uint32_t kLow = sizeof(T) == 4              ? 0xff800000u
                              : std::is_same_v<T, bf16_t> ? 0xff80ff80u
                                                          : 0xfc00fc00u;
    return {{kLow, kLow, kLow, kLow}};
  }
  static __device__ __forceinline__ Words load(const void* from) {
    const uint4 v = __ldg(static_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
  }
  /// The same of what makes room in the caches for what is still to be read.
  static __device__ __forceinline__ Words load_once(const void* from) {
    const uint4 v = __ldcs(static_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
  }
};

/// A block's part of a row: vectors of 16 bytes where global memory has them aligned, so that the first and
/// the last of a row may reach beyond it. A warp has a run of them, in steps of kStep; its lanes take turns.
template <typename T, bool kSeen>
struct Row {
  static constexpr int N = 16 / sizeof(T);
  using Vector = Words<T>;

  const T* x;            // the row
  const uint8_t* seen;   // null: no penalty
  int64_t n, offset;     // its length; the element that the block's vector 0 begins with
  int count, run;        // vectors of the block, of a warp
  int begin, end;        // vectors of this warp
  int whole, whole_end;  // vectors that lie inside the row
  float penalty = 1.0f;

  /// Anew wherever it is used: the compiler, which does not see that the block is always the same, then need
  /// not keep all this from one use to the next.
  __device__ __forceinline__ Row() : Row(problem<T>()) {}
  __device__ __forceinline__ explicit Row(const Problem<T>& p) : seen(nullptr), n(p.n) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int rank = static_cast<int>(block) & (p.blocks - 1);
    const int64_t at = p.row_of(block);
    x = p.logits + at * n;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    const int vectors = static_cast<int>((n + shift + N - 1) / N);
    const int first = min(vectors, rank * p.part);
    count = min(p.part, vectors - first);
    offset = static_cast<int64_t>(first) * N - shift;
    run = p.run;
    begin = run_begin(threadIdx.x / 32);
    end = run_end(threadIdx.x / 32);
    whole = offset < 0 ? 1 : 0;
    whole_end = static_cast<int>((n - offset) / N);
    if constexpr (kSeen) {
      penalty = __ldg(p.params + at * kSamplingColumns + kRepetitionPenalty);
      if (penalty > 0.0f && penalty != 1.0f) seen = p.seen + at * n;
    }
  }
  __device__ __forceinline__ int run_begin(int warp) const { return min(count, warp * run); }
  __device__ __forceinline__ int run_end(int warp) const { return min(count, warp * run + run); }
  __device__ __forceinline__ int64_t index(int v) const { return offset + static_cast<int64_t>(v) * N; }

  /// A vector; -infinity for what is not of the row.
  __device__ __forceinline__ Vector read(int v) const {
    if (v >= whole && v < whole_end) return Vector::load(x + index(v));
    // rare: short code rather than fast
    using Bits = std::conditional_t<N == 8, uint16_t, uint32_t>;
    const T low = from_float<T>(-INFINITY);
    uint64_t words[2] = {};
#pragma unroll 1
    for (int j = N - 1; j >= 0; --j) {
      const int64_t i = index(v) + j;
      const T value = i >= 0 && i < n ? __ldg(x + i) : low;
      constexpr int kBits = 8 * sizeof(T);
      words[1] = words[1] << kBits | words[0] >> (64 - kBits);
      words[0] = words[0] << kBits | *reinterpret_cast<const Bits*>(&value);
    }
    return {{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32),
             static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[1] >> 32)}};
  }
  /// A step of a warp: the vectors first + lane, 32 further on, ..., of those before `stop`.
  __device__ __forceinline__ void read_step(Vector (&in)[kLoads], int first, int stop) const {
    const int v = first + static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) in[i] = Vector::nothing();
    if (first >= whole && stop <= whole_end) {
      const T* from = x + index(v);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (v + 32 * i < stop) in[i] = Vector::load(from + 32 * i * N);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (v + 32 * i < stop) in[i] = read(v + 32 * i);
      }
    }
  }
  /// What `seen` has for a vector.
  struct Bytes {
    uint32_t words[N / 4];
    __device__ __forceinline__ bool any() const { return (words[0] | words[N / 4 - 1]) != 0; }
    __device__ __forceinline__ bool at(int j) const { return (words[j / 4] >> (8 * (j % 4)) & 0xff) != 0; }
  };
  __device__ __forceinline__ Bytes read_marks(int v) const {
    const uint8_t* from = seen + index(v);
    Bytes bytes;
    if (v >= whole && v < whole_end && is_aligned(from, N)) {
      if constexpr (N == 8)
        *reinterpret_cast<uint2*>(&bytes) = *reinterpret_cast<const uint2*>(from);
      else
        bytes.words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      uint64_t bits = 0;
#pragma unroll 1
      for (int j = N - 1; j >= 0; --j)
        bits = bits << 8 | (index(v) + j >= 0 && index(v) + j < n ? from[j] : 0);
      bytes.words[0] = static_cast<uint32_t>(bits);
      bytes.words[N / 4 - 1] = static_cast<uint32_t>(bits >> (8 * (N - 4)));
    }
    return bytes;
  }
  __device__ __forceinline__ void read_marks(Bytes (&marks)[kLoads], int first, int stop) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = first + 32 * i + static_cast<int>(threadIdx.x % 32);
      marks[i] = v < stop ? read_marks(v) : Bytes{};
    }
  }
  /// A logit without NaN (-infinity) and infinity (the largest float).
  static __device__ __forceinline__ float clean(float value) {
    return fminf(fmaxf(value, -INFINITY), kLargest);
  }
  __device__ __forceinline__ float penalised(float value) const {
    return fminf(kLargest, value < 0.0f ? value * penalty : __fdiv_rn(value, penalty));
  }
  /// Logit i of the row, penalised, before the temperature.
  __device__ __forceinline__ float value(int64_t i) const {
    float value = clean(to_float(__ldg(x + i)));
    if constexpr (kSeen) {
      if (seen && seen[i]) value = penalised(value);
    }
    return value;
  }
  /// Calls body(value, j) for the elements of vector v.
  template <typename Body>
  __device__ __forceinline__ void values(const Vector& vector, int v, const Body& body) const {
    Bytes marks{};
    if constexpr (kSeen) {
      if (seen) marks = read_marks(v);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = clean(vector.value(j));
      if constexpr (kSeen) {
        if (marks.at(j)) value = penalised(value);
      }
      body(value, j);
    }
  }
  /// Calls body(value) for every one from vector `first` to `stop`, the lanes taking turns.
  template <typename Body>
  __device__ __forceinline__ void each(int first, int stop, const Body& body) const {
    const int lane = threadIdx.x % 32;
    Vector next = first + lane < stop ? read(first + lane) : Vector::nothing();
#pragma unroll 1
    for (int v = first + lane; v < stop; v += 32) {
      const Vector vector = next;
      if (v + 32 < stop) next = read(v + 32);
      values(vector, v, [&](float value, int) { body(value); });
    }
  }
};

}  // namespace sampling
}  // namespace halfbyte::cuda
