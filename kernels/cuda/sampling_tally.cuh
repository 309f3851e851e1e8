// What a pass of `sample` remembers of a row, in columns of shared memory, and a histogram of it. Of bfloat16
// the histogram counts values, one by one; of other items it has sums of weights in narrow buckets.
#pragma once

#include "sampling.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// Between what the cut of top-p lies, before the temperature.
struct Bounds {
  float low, high;
  float reference;
};

/// What is remembered of a logit: as it is, or penalised.
template <typename T, bool kSeen>
using ItemOf = std::conditional_t<kSeen, float, T>;

/// The items of a thread of the block. Two lanes share a column, which one fills from its beginning and the
/// other from its end.
template <typename Item>
struct Column {
  static constexpr int N = 16 / sizeof(Item);
  Item* first;  // the thread's first item
  int step;     // 1 or -1
  __device__ __forceinline__ Column(Item* items, int thread, int capacity)
      : first(items + (thread / 32 * 16 + thread % 16) * capacity + (thread & 16 ? capacity - 1 : 0)),
        step(thread & 16 ? -1 : 1) {}
  __device__ __forceinline__ float item(int i) const { return to_float(first[i * step]); }
  /// The thread's items from `from` on, of which `left` are still to be seen; -infinity for what is not of
  /// them.
  __device__ __forceinline__ Words<Item> read(const uint4* from, int left) const {
    const uint4 v = *from;
    Words<Item> words{{v.x, v.y, v.z, v.w}};
    if (left < N) {
      const uint32_t valid = step > 0 ? (1u << left) - 1 : 0xffu << (N - left);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t keep =
            N == 4 ? (valid >> i & 1 ? ~0u : 0u)
                   : (valid >> (2 * i) & 1 ? 0xffffu : 0u) | (valid >> (2 * i) & 2 ? 0xffff0000u : 0u);
        words.w[i] = (words.w[i] & keep) | (Words<Item>::nothing().w[i] & ~keep);
      }
    }
    return words;
  }
  __device__ __forceinline__ const uint4* vectors() const {
    return reinterpret_cast<const uint4*>(step > 0 ? first : first - (N - 1));
  }
  /// Calls body(words) for 16 bytes of the thread's `count` items after the other.
  template <typename Body>
  __device__ __forceinline__ void each_vector(int count, const Body& body) const {
    const uint4* from = vectors();
#pragma unroll 1
    for (int left = count; left > 0; left -= N, from += step) body(read(from, left));
  }
  /// Calls body(x) for the items from `low` to `high`: they are few, and are found again by their bits.
  template <typename Body>
  __device__ __forceinline__ void each(int count, float low, float high, const Body& body) const {
    const uint4 *from = vectors(), *hits_from = from;
    uint32_t hits = 0;
    int bit = 0;
#pragma unroll 1
    for (int left = count; left > 0; left -= N) {
      const Words<Item> words = read(from, left);
      uint32_t here = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = words.value(j);
        if (x >= low && x <= high) here |= 1u << j;
      }
      hits |= here << bit;
      bit += N;
      from += step;
      if (bit < 32 && left > N) continue;
#pragma unroll 1
      while (hits != 0) {
        const int at = __ffs(static_cast<int>(hits)) - 1;
        hits &= hits - 1;
        body(to_float(reinterpret_cast<const Item*>(hits_from + at / N * step)[at % N]));
      }
      hits_from = from;
      bit = 0;
    }
  }
};

/// A reference that weights of logits up to `value` can have: 2^(logit * scale - reference) is 1 at most.
__device__ __forceinline__ float reference_of(float value, float scale) {
  return value > -INFINITY ? ceilf(value * scale) : 0.0f;
}
/// A value of 16 bits in both halves of a word.
template <typename T>
__device__ __forceinline__ uint32_t bits_twice(float x) {
  const T value = from_float<T>(x);
  return *reinterpret_cast<const uint16_t*>(&value) * 0x10001u;
}

/// The places of bfloat16 in a histogram that counts kPlaces of them one by one: those whose largest are
/// about as large as a sample's, or as the upper bound. Bits are integers in the order of the values, of
/// negative ones when they are turned over. The first place is for all that is below the others.
struct Values {
  uint32_t turned;
  int first;

  __device__ __forceinline__ Values(const Bounds& bounds, float scale) {
    const float top = fminf(bounds.high, bounds.reference * reciprocal(scale));
    turned = top > 0.0f ? 0u : 0xffffffffu;
    const int low = bounds.low > 0.0f || turned != 0 ? bits_of(bounds.low) : 0;
    first = max(0, min(0x7fff - (kPlaces - 1), max(low - 1, bits_of(top) - kPlaces * 3 / 4)));
  }
  __device__ __forceinline__ int bits_of(float x) const {
    return static_cast<int16_t>(bits_twice<bf16_t>(x) ^ turned);
  }
  __device__ __forceinline__ float at(int place) const {
    return __uint_as_float((static_cast<uint32_t>(first + place) ^ turned) << 16);
  }
  static __device__ __forceinline__ uint32_t twice(int x) { return static_cast<uint32_t>(x) * 0x10001u; }
};

/// Places of other items in a histogram of weights: buckets, each as wide as the other, from the lower bound
/// to the sample's largest, or to what weighs 2^8 as much. In a bucket weights are integers of 2^(x * scale +
/// exponent), 2^16 at most, so that a word has the sum of all that can be remembered. What rounding to them
/// does to the sum of some thousands is about a hundredth of what the smallest of them weighs.
struct Line {
  float low, top, width, factor, shift, scale, step, exponent_of_first;

  __device__ __forceinline__ Line(const Bounds& bounds, float scale_of_row)
      : low(bounds.low), scale(scale_of_row) {
    const float per_power = reciprocal(scale);
    top = fminf(fminf(bounds.high, bounds.reference * per_power), fmaf(8.0f, per_power, low));
    width = (top - low) * (1.0f / kPlaces);
    factor = reciprocal(width);
    shift = __fmul_rn(-low, factor);
    step = __fmul_rn(-width, scale);
    exponent_of_first = __fadd_rn(fmaf(-low, scale, 16.0f), step);
  }
  __device__ __forceinline__ bool is_usable() const { return factor > 0.0f && fabsf(shift) < 0x1p20f; }
  /// 2^23 and the bucket of an item that is not above all: so it is an integer without a conversion, which is
  /// slow.
  __device__ __forceinline__ float bucket_of(float x) const {
    return __fadd_rz(fmaxf(0.0f, fminf(kPlaces - 1, fmaf(x, factor, shift))), 0x1p23f);
  }
  static __device__ __forceinline__ int number_of(float bucket) {
    return __float_as_int(bucket) & (kPlaces - 1);
  }
  __device__ __forceinline__ float exponent(float bucket) const {
    return fmaf(bucket - 0x1p23f, step, exponent_of_first);
  }
  __device__ __forceinline__ uint32_t weigh(float x, float exponent_of_bucket) const {
    return __float_as_uint(rough_exp2(fmaf(x, scale, exponent_of_bucket)) + 0x1p23f) & 0x7fffff;
  }
};

/// The histogram of what is remembered, in Shared.
template <int kThreads, typename Item>
struct Tally {
  static constexpr bool kFew = std::is_same_v<Item, bf16_t>;  // values, which are counted one by one
  static constexpr int kOwn = kPlaces / kThreads;
  using Places = std::conditional_t<kFew, Values, Line>;

  Shared& s;
  Places places;
  float scale, reference;

  __device__ __forceinline__ Tally(const Bounds& bounds, float scale_of_row)
      : s(shared()), places(bounds, scale_of_row), scale(scale_of_row), reference(bounds.reference) {}

  /// Puts items there, and adds to `beyond` what those weigh that are above all buckets.
  __device__ __forceinline__ void add(const Words<Item>& words, float& beyond) const {
    if constexpr (kFew) {
      const uint32_t least = Values::twice(places.first), most = Values::twice(places.first + kPlaces - 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t two = __vmins2(__vmaxs2(words.w[i] ^ places.turned, least), most);
        atomicAdd(&s.places[static_cast<int>(two & 0xffff) - places.first], 1u);
        atomicAdd(&s.places[static_cast<int>(two >> 16) - places.first], 1u);
      }
    } else {
      // nothing is a branch where no item is above the buckets; what is no item weighs nothing
      float largest = words.value(0);
#pragma unroll
      for (int j = 1; j < Column<Item>::N; ++j) largest = fmaxf(largest, words.value(j));
      if (largest > places.top) {
#pragma unroll
        for (int j = 0; j < Column<Item>::N; ++j) {
          const float x = words.value(j);
          if (x > places.top) beyond += rough_exp2(fmaf(x, scale, -reference));
        }
      }
#pragma unroll
      for (int j = 0; j < Column<Item>::N; ++j) {
        const float x = words.value(j), bucket = places.bucket_of(x);
        const uint32_t w = places.weigh(x, places.exponent(bucket));
        atomicAdd(&s.places[Line::number_of(bucket)], x <= places.top ? w : 0);
      }
    }
  }
  /// What 1 of a place weighs, in units of the reference.
  __device__ __forceinline__ float unit(int place) const {
    if constexpr (kFew)
      return rough_exp2(fmaf(places.at(place), scale, -reference));
    else
      return exp2f(-places.exponent(0x1p23f + static_cast<float>(place)) - reference);
  }
  /// The place with which `goal` is reached, counted down from the highest, to s.bucket, and what is before
  /// it to s.before; -1 where all together are less.
  __device__ __forceinline__ void find(double goal) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // the thread's places, from the highest
    const int last = kPlaces - 1 - kOwn * static_cast<int>(threadIdx.x);
    const auto here = *reinterpret_cast<const Vec<uint32_t, kOwn>*>(&s.places[last - kOwn + 1]);
    double parts[kOwn], own = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t sum = here.v[kOwn - 1 - i];
      parts[i] = sum > 0 ? static_cast<double>(sum) * static_cast<double>(unit(last - i)) : 0.0;
      own += parts[i];
    }
    const double upto = warp_upto(own);
    double before = __shfl_up_sync(0xffffffffu, upto, 1);
    if (lane == 0) before = 0.0;
    if (lane == 31) s.upto[warp] = upto;
    if (threadIdx.x == 0) {
      s.bucket = -1;
      s.in_bucket = 0;
    }
    __syncthreads();
    double of_warps = 0.0;
#pragma unroll 4
    for (int w = 0; w < kThreads / 32; ++w) of_warps += w < warp ? s.upto[w] : 0.0;
    before += of_warps;
    const double end = of_warps + upto;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const double with = i == kOwn - 1 ? end : fmin(end, before + parts[i]);
      if (before < goal && goal <= with) {
        s.bucket = last - i;
        s.before = before;
        s.of_bucket = here.v[kOwn - 1 - i];
      }
      before = with;
    }
    __syncthreads();
  }
};

}  // namespace sampling
}  // namespace halfbyte::cuda
