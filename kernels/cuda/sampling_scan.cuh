// The one pass of `sample` over a row.
#pragma once

#include "sampling.cuh"

namespace halfbyte::cuda {
namespace sampling {

/// What a pass is for.
enum Pass {
  kBest,    // the largest and its index
  kMaxima,  // the largest, of every group too
  kSums,    // and what the tokens weigh
  kTail,    // and those from a bound up are remembered
  kSplit    // or those between two bounds are, and what those above them weigh
};

/// What a thread, or its warp, has seen.
struct Seen {
  float own = -INFINITY;  // the thread's largest, before the temperature
  uint32_t best = 0;      // kBest: its index
  float reference = 0.0f;
  int items = 0;      // of the warp
  bool full = false;  // there was no room for an item
};

/// Between what the cut of top-p lies, before the temperature.
struct Bounds {
  float low, high;
  float reference;
};

/// What is remembered of a logit: as it is, or penalised.
template <typename T, bool kSeen>
using ItemOf = std::conditional_t<kSeen, float, T>;

/// Dynamic shared memory: the largest values of a thread's groups, in a column; then the items of a warp, in
/// a row. Tokens that are ranked later lie where they were.
template <int kThreads, typename T, bool kSeen>
struct Area {
  using Item = ItemOf<T, kSeen>;
  static constexpr int kGroups = sizeof(float) * kSlots * kThreads;
  static_assert(sizeof(Ranked) <= kGroups);

  static __device__ __forceinline__ float* groups() { return reinterpret_cast<float*>(dynamic_area); }
  static __device__ __forceinline__ Ranked& ranked() { return *reinterpret_cast<Ranked*>(dynamic_area); }
  static __device__ __forceinline__ List& listed() {
    return *reinterpret_cast<List*>(dynamic_area + kGroups);
  }
  /// Of this warp.
  static __device__ __forceinline__ Item* items() {
    return reinterpret_cast<Item*>(dynamic_area + kGroups) +
           static_cast<int>(threadIdx.x / 32) * problem<T>().capacity;
  }
};

/// A reference that weights of logits up to `value` can have: 2^(logit * scale - reference) is 1 at most.
__device__ __forceinline__ float reference_of(float value, float scale) {
  return value > -INFINITY ? ceilf(value * scale) : 0.0f;
}

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ float largest_of(const Words<T>& vector) {
  if constexpr (sizeof(T) == 2) {
    const PairOf<T>* pairs = reinterpret_cast<const PairOf<T>*>(&vector);
    const PairOf<T> two = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    Words<T> word;
    word.w[0] = *reinterpret_cast<const uint32_t*>(&two);
    return fmaxf(word.value(0), word.value(1));
  } else {
    return fmaxf(fmaxf(vector.value(0), vector.value(1)), fmaxf(vector.value(2), vector.value(3)));
  }
}

/// A bit for each of the thread's elements that is from `low` to `high` (kTail: from `low` up), of the i-th
/// vector of a step: bit bit_of(i, j) for element j.
template <typename T, bool kSeen>
struct Hits {
  static constexpr int N = 16 / sizeof(T);
  static constexpr bool kPairs = N == 8 && !kSeen;  // compared two at once
  static_assert(kLoads * N <= 32);
  using Pair = PairOf<T>;
  std::conditional_t<kPairs, Pair, float> low, high;

  __device__ __forceinline__ explicit Hits(const Bounds& bounds) {
    if constexpr (kPairs) {
      low.x = low.y = from_float<T>(bounds.low);
      high.x = high.y = from_float<T>(bounds.high);
    } else {
      low = bounds.low;
      high = bounds.high;
    }
  }
  static __device__ __forceinline__ constexpr int bit_of(int i, int j) {
    return kPairs ? i * (N / 2) + j / 2 + j % 2 * 16 : i * N + j;
  }
  template <Pass kPass>
  __device__ __forceinline__ uint32_t of(const Words<T>& vector, const float (&x)[N], int i) const {
    uint32_t hits = 0;
    if constexpr (kPairs) {
      const Pair* pairs = reinterpret_cast<const Pair*>(&vector);
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        uint32_t both = __hge2_mask(pairs[j], low);
        if constexpr (kPass == kSplit) both &= ~__hgt2_mask(pairs[j], high);
        hits |= both & 0x10001u << bit_of(i, 2 * j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        hits |= x[j] >= low && (kPass == kTail || !(x[j] > high)) ? 1u << bit_of(i, j) : 0u;
    }
    return hits;
  }
};

/// Where `bit` of `hits` is set, x is put at `to`, which goes on. Written out, so that nothing is a branch.
__device__ __forceinline__ void put(float x, uint32_t hits, uint32_t bit, uint32_t& to) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 hit;\n"
      "and.b32 hit, %1, %2;\n"
      "setp.ne.u32 p, hit, 0;\n"
      "@p st.shared.f32 [%0], %3;\n"
      "@p add.u32 %0, %0, 4;\n}\n"
      : "+r"(to)
      : "r"(hits), "r"(bit), "f"(x)
      : "memory");
}
/// The same of the two halves of a word.
__device__ __forceinline__ void put_pair(uint32_t word, uint32_t hits, uint32_t low, uint32_t high,
                                         uint32_t& to) {
  asm volatile(
      "{\n.reg .pred p, q;\n.reg .b32 hit;\n.reg .b16 one, two;\n"
      "mov.b32 {one, two}, %4;\n"
      "and.b32 hit, %1, %2;\n"
      "setp.ne.u32 p, hit, 0;\n"
      "@p st.shared.u16 [%0], one;\n"
      "@p add.u32 %0, %0, 2;\n"
      "and.b32 hit, %1, %3;\n"
      "setp.ne.u32 q, hit, 0;\n"
      "@q st.shared.u16 [%0], two;\n"
      "@q add.u32 %0, %0, 2;\n}\n"
      : "+r"(to)
      : "r"(hits), "r"(low), "r"(high), "r"(word)
      : "memory");
}
/// Room among the items of a warp for those that its lanes have hit, in their order: where this lane's begin,
/// 0 where there is not enough.
template <typename Item>
__device__ __forceinline__ uint32_t room_for(uint32_t hits, uint32_t items, int capacity, Seen& seen) {
  const int own = __popc(hits), lane = threadIdx.x % 32;
  int upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += other;
  }
  const int before = seen.items, all = before + __shfl_sync(0xffffffffu, upto, 31);
  if (all > capacity) {
    seen.full = true;
    return 0;
  }
  seen.items = all;
  return items + static_cast<uint32_t>(before + upto - own) * static_cast<uint32_t>(sizeof(Item));
}

/// A step under way.
template <typename T, bool kSeen>
struct Step {
  Words<T> vectors[kLoads];
  typename Row<T, kSeen>::Bytes marks[kLoads];

  /// A step anywhere.
  __device__ __forceinline__ void read(const Row<T, kSeen>& row, int first) {
    row.read_step(vectors, first, row.end);
    read_marks(row, first);
  }
  /// A step that lies inside the row; this lane's first vector is at `from`.
  __device__ __forceinline__ void read_whole(const T* from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      vectors[i] = Words<T>::load(from + 32 * i * (16 / static_cast<int>(sizeof(T))));
  }
  __device__ __forceinline__ void read_marks(const Row<T, kSeen>& row, int first) {
    if constexpr (kSeen) {
      if (row.seen) row.read_marks(marks, first, row.end);
    }
  }
};

/// The pass over this warp's run, with weights of 2^(logit * scale - reference). Sums and items of slots go
/// to Shared, groups and items to Area. A NaN for the reference of kSums: one that the first step asks for.
template <Pass kPass, int kThreads, typename T, bool kSeen>
__device__ __forceinline__ Seen scan_run(float scale, const Bounds& bounds) {
  constexpr int N = 16 / sizeof(T);
  constexpr bool kRemembers = kPass == kTail || kPass == kSplit, kWeighs = kPass == kSums || kRemembers;
  using Item = ItemOf<T, kSeen>;
  using Store = Area<kThreads, T, kSeen>;
  Shared& s = shared();
  const Row<T, kSeen> row;
  const int lane = threadIdx.x % 32;
  Step<T, kSeen> next;
  next.read(row, row.begin);
  Seen seen;
  seen.reference = bounds.reference;
  if (kPass == kSums && isnan(seen.reference)) {
    float first = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) first = fmaxf(first, largest_of(next.vectors[i]));
    seen.reference = reference_of(warp_max(first), scale);
  }
  [[maybe_unused]] const float reference = seen.reference;
  [[maybe_unused]] const Hits<T, kSeen> hits_of(bounds);
  [[maybe_unused]] const uint32_t items = shared_address(Store::items());
  const T* from = row.x + row.index(row.begin + lane);
  [[maybe_unused]] const int capacity = problem<T>().capacity;
  const int in_slot = problem<T>().slot();
  const int last_whole = min(row.end, row.whole_end) - kStep;
  int first = row.begin;
#pragma unroll 1
  for (int slot = 0; first < row.end; ++slot) {
    const int stop = min(row.end, first + in_slot);
    float group = -INFINITY;
    // of the slot: two chains of additions, and what is above the upper bound
    [[maybe_unused]] float sums[2] = {}, above = 0.0f;
#pragma unroll 1
    for (; first < stop; first += kStep) {
      const Step<T, kSeen> in = next;
      from += kStep * N;
      if (!kSeen && first + kStep <= last_whole) {
        next.read_whole(from);
      } else if (first + kStep < row.end) {
        // rare where nothing is penalised: the row is then made anew rather than kept in registers
        if constexpr (kSeen)
          next.read(row, first + kStep);
        else
          next.read(Row<T, kSeen>(), first + kStep);
      }
      float top = -INFINITY;
      [[maybe_unused]] uint32_t hits = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        float x[N], here = -INFINITY;
        if constexpr (kWeighs || kSeen) {
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = in.vectors[i].value(j);
        }
        if constexpr (kSeen) {
          if (row.seen && in.marks[i].any()) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
              if (in.marks[i].at(j)) x[j] = row.penalised(row.clean(x[j]));
            }
          }
#pragma unroll
          for (int j = 0; j < N; ++j) here = fmaxf(here, x[j]);
        } else {
          here = largest_of(in.vectors[i]);
        }
        if constexpr (kPass == kBest) {
          here = row.clean(here);  // it is NaN where all of the vector is
          if (here > seen.own) {
            seen.own = here;
            int at = 0;
#pragma unroll
            for (int j = N - 1; j >= 0; --j) {
              float value;
              if constexpr (kSeen)
                value = x[j];
              else
                value = in.vectors[i].value(j);
              if (value >= here) at = j;  // above it is only infinity, which counts as equal
            }
            seen.best = static_cast<uint32_t>(row.index(first + 32 * i + lane) + at);
          }
        } else {
          top = fmaxf(top, here);
        }
        if constexpr (kWeighs) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const float w = rough_exp2(fmaf(x[j], scale, -reference));
            sums[j % 2] += w;
            if constexpr (kPass == kSplit) above += x[j] > bounds.high ? w : 0.0f;
          }
        }
        if constexpr (kRemembers) {
          // what is penalised lies in registers of its own: it is put before the next vector needs them
          hits |= hits_of.template of<kPass>(in.vectors[i], x, i);
          if constexpr (kSeen) {
            uint32_t to = room_for<Item>(hits, items, capacity, seen);
            if (to != 0) {
#pragma unroll
              for (int j = 0; j < N; ++j) put(x[j], hits, 1u << hits_of.bit_of(i, j), to);
            }
            hits = 0;
          }
        }
      }
      if constexpr (kRemembers && !kSeen) {
        uint32_t to = room_for<Item>(hits, items, capacity, seen);
        if (to != 0) {
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if constexpr (N == 8)
                put_pair(in.vectors[i].w[j], hits, 1u << hits_of.bit_of(i, 2 * j),
                         1u << hits_of.bit_of(i, 2 * j + 1), to);
              else
                put(in.vectors[i].value(j), hits, 1u << hits_of.bit_of(i, j), to);
            }
          }
        }
      }
      group = fmaxf(group, top);
    }
    if constexpr (kPass != kBest) {
      seen.own = fmaxf(seen.own, group);
      Store::groups()[slot * kThreads + threadIdx.x] = group;
    }
    if constexpr (kWeighs) {
      const double sum = warp_total(static_cast<double>(sums[0] + sums[1]));
      if (lane == 0) s.sums_of[threadIdx.x / 32][slot] = sum;
    }
    if constexpr (kPass == kSplit) {
      const double sum = warp_total(static_cast<double>(above));
      if (lane == 0) s.above_of[threadIdx.x / 32][slot] = sum;
    }
    if constexpr (kRemembers) {
      if (lane == 0) s.items_of[threadIdx.x / 32][slot] = seen.items;
    }
  }
  return seen;
}

}  // namespace sampling
}  // namespace halfbyte::cuda
