// What the kernel of `sample` is made of below its passes over a row: keys and weights of logits, what the
// blocks of a cluster share, and how a block reads its part of a row.
#pragma once

#include "activation.cuh"
#include "cluster.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace sampling {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kResident = 1024 / kThreads;  // blocks of a multiprocessor
constexpr int kMostBlocks = 8;              // of a cluster
constexpr int kBucketBits = 9;
constexpr int kBuckets = 1 << kBucketBits;  // of a histogram of weights, one a thread
constexpr int kBins = 2 * kThreads;         // of the histogram of a sample
constexpr int kListed = 2 * kThreads;       // tokens that one block ranks
constexpr int kLoads = 2;                   // vectors that a thread has under way
constexpr int kStep = 32 * kLoads;          // vectors of a warp's step
constexpr int kSlots = 8;                   // groups of a thread
constexpr float kLargest = 3.402823466e+38f;
static_assert(kBuckets == kThreads);

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

template <typename T>
struct Problem {
  int32_t* tokens;
  const T* logits;
  const float* params;
  int64_t* rng;
  uint8_t* seen;
  int64_t n;
  int part, run;   // vectors of a block, of a warp
  int blocks;      // of a row: 1, 2, 4 or 8, a cluster
  int fold;        // 2^fold steps of a warp make a group
  int item_bytes;  // for what the threads remember of a row

  __device__ __forceinline__ int64_t row() const { return blockIdx.x / static_cast<unsigned>(blocks); }
};

struct alignas(16) Shared {
  union {
    uint2 sums[kBuckets];  // a sum each, in two words
    uint32_t counts[kBins];
    int32_t queue[kListed];  // groups that hold tokens for the list
  };
  Weight slots[2][kMostBlocks][3];  // what the blocks of the cluster tell each other, in turns
  Weight warps[kWarps];
  float2 pairs[kWarps];
  double runs[3][kWarps];   // what tokens of each warp weigh
  float warp_most[kWarps];  // largest logit of each warp, before the temperature
  Weight above;
  double uniform;
  int bucket;
  uint32_t least;
  int queued, listed, counted;
  int low_bin, high_bin;
};
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
static_assert(sizeof(Ranked) <= sizeof(float) * kSlots * kThreads);

/// The blocks of a row.
struct Cluster {
  Shared& s;
  int blocks, rank;
  int round = 0;

  __device__ Cluster(Shared& shared, int blocks_of_row)
      : s(shared), blocks(blocks_of_row), rank(static_cast<int>(blockIdx.x) & (blocks_of_row - 1)) {}

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
__device__ inline Prefix block_prefix(Shared& s, Weight own) {
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

template <typename N>
__device__ __forceinline__ N warp_total(N own) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  return own;
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
  __device__ __forceinline__ bool mild() const { return d > 0x1p-20f && d < 0x1p20f; }
};

/// A block's part of a row: vectors of 16 bytes where global memory has them, so that the first and the last
/// of a row may reach beyond it. A warp has a run of them, in steps of kStep; its lanes take turns.
template <typename T, bool kSeen>
struct Row {
  static constexpr int N = 16 / sizeof(T);
  using Vector = Vec<T, N>;

  const T* x;            // the row
  const uint8_t* seen;   // null: no penalty
  int64_t n, offset;     // its length; the element that the block's vector 0 begins with
  int count, run;        // vectors of the block, of a warp
  int begin, end;        // vectors of this warp
  int whole, whole_end;  // vectors that lie inside the row
  float penalty = 1.0f;

  __device__ Row(const Problem<T>& p, int rank) : seen(nullptr), n(p.n) {
    x = p.logits + p.row() * n;
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
  }
  __device__ __forceinline__ void penalise(const Problem<T>& p, float by) {
    if constexpr (kSeen) {
      penalty = by;
      seen = by > 0.0f && by != 1.0f ? p.seen + p.row() * n : nullptr;
    }
  }
  __device__ __forceinline__ int run_begin(int warp) const { return min(count, warp * run); }
  __device__ __forceinline__ int run_end(int warp) const { return min(count, warp * run + run); }
  __device__ __forceinline__ int64_t index(int v) const { return offset + static_cast<int64_t>(v) * N; }

  static __device__ __forceinline__ Vector nothing() {
    Vector vector;
#pragma unroll
    for (int j = 0; j < N; ++j) vector.v[j] = from_float<T>(-INFINITY);
    return vector;
  }
  /// A vector; -infinity for what is not of the row.
  __device__ __forceinline__ Vector read(int v) const {
    if (v >= whole && v < whole_end) return *reinterpret_cast<const Vector*>(x + index(v));
    // rare: short code rather than fast
    using Bits = std::conditional_t<N == 8, uint16_t, uint32_t>;
    const T low = from_float<T>(-INFINITY);
    uint64_t words[2] = {};
#pragma unroll 1
    for (int j = N - 1; j >= 0; --j) {
      const int64_t i = index(v) + j;
      const T value = i >= 0 && i < n ? x[i] : low;
      constexpr int kBits = 8 * sizeof(T);
      words[1] = words[1] << kBits | words[0] >> (64 - kBits);
      words[0] = words[0] << kBits | *reinterpret_cast<const Bits*>(&value);
    }
    return *reinterpret_cast<const Vector*>(words);
  }
  /// A step of a warp: the vectors first + lane, 32 further on, ..., of those before `stop`.
  __device__ __forceinline__ void read_step(Vector (&in)[kLoads], int first, int stop) const {
    const int v = first + static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) in[i] = nothing();
    if (first >= whole && stop <= whole_end) {
      const Vector* from = reinterpret_cast<const Vector*>(x + index(v));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (v + 32 * i < stop) in[i] = from[32 * i];
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
    float value = clean(to_float(x[i]));
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
      float value = clean(to_float(vector.v[j]));
      if constexpr (kSeen) {
        if (marks.at(j)) value = penalised(value);
      }
      body(value, j);
    }
  }
  /// Calls body(value) for every one of this warp.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    const int lane = threadIdx.x % 32;
    Vector next = begin + lane < end ? read(begin + lane) : nothing();
#pragma unroll 1
    for (int v = begin + lane; v < end; v += 32) {
      const Vector vector = next;
      if (v + 32 < end) next = read(v + 32);
      values(vector, v, [&](float value, int) { body(value); });
    }
  }
};

}  // namespace sampling
}  // namespace halfbyte::cuda
