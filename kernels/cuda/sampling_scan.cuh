// The one pass of `sample` over a row.
#pragma once

#include "../random.h"
#include "sampling_tally.cuh"

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

/// What a thread has seen.
struct Seen {
  float own = -INFINITY;  // its largest, before the temperature
  uint32_t best = 0;      // kBest: its index
  float reference = 0.0f;
  int items = 0;      // that it remembers
  bool full = false;  // there was no room for an item of its warp
};

/// Dynamic shared memory: the largest values of a thread's groups, in a column; how many items a thread has
/// up to the end of each slot; then the items. Tokens that are ranked later lie where they were.
template <int kThreads, typename T, bool kSeen>
struct Area {
  using Item = ItemOf<T, kSeen>;
  using Group = Item;
  static constexpr int kGroups = sizeof(Group) * kSlots * kThreads;
  static constexpr int kEnds = kSlots * kThreads;
  // what a step may write beyond a full column
  static constexpr int kSpare = kLoads * 16 / sizeof(T) * sizeof(Item);
  static constexpr int kFixed = kGroups + kEnds + kSpare;

  static __device__ __forceinline__ Group* groups() { return reinterpret_cast<Group*>(dynamic_area); }
  static __device__ __forceinline__ uint8_t* ends() {
    return reinterpret_cast<uint8_t*>(dynamic_area + kGroups);
  }
  static __device__ __forceinline__ Item* items() { return reinterpret_cast<Item*>(dynamic_area + kFixed); }
  static __device__ __forceinline__ List& listed() { return *reinterpret_cast<List*>(dynamic_area + kFixed); }
  static __device__ __forceinline__ Ranked& ranked() {
    return *reinterpret_cast<Ranked*>(dynamic_area + kFixed + sizeof(List));
  }
};

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

/// Adds w to a sum where x is above a bound.
__device__ __forceinline__ void add_above(float& sum, float x, float bound, float w) {
  asm("{\n.reg .pred p;\n"
      "setp.gt.f32 p, %1, %2;\n"
      "@p add.f32 %0, %0, %3;\n}\n"
      : "+f"(sum)
      : "f"(x), "f"(bound), "f"(w));
}
/// Puts x at `to`, which goes on by `step` bytes, where it is from `low` to `high` (kTail: from `low` up).
/// Written out, so that nothing is a branch.
template <Pass kPass>
__device__ __forceinline__ void put(float x, const Bounds& bounds, uint32_t& to, int step) {
  if constexpr (kPass == kSplit) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ge.f32 p, %2, %3;\n"
        "setp.le.and.f32 p, %2, %4, p;\n"
        "@p st.shared.f32 [%0], %2;\n"
        "@p add.s32 %0, %0, %1;\n}\n"
        : "+r"(to)
        : "r"(step), "f"(x), "f"(bounds.low), "f"(bounds.high)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ge.f32 p, %2, %3;\n"
        "@p st.shared.f32 [%0], %2;\n"
        "@p add.s32 %0, %0, %1;\n}\n"
        : "+r"(to)
        : "r"(step), "f"(x), "f"(bounds.low)
        : "memory");
  }
}
/// The same of the two halves of a word, x and y as floats. `lows` and `highs` have the bounds twice.
template <Pass kPass, typename T>
__device__ __forceinline__ void put_pair(uint32_t word, float x, float y, const Bounds& bounds, uint32_t lows,
                                         uint32_t highs, uint32_t& to, int step) {
#define HALFBYTE_PUT_BOTH                  \
  "@p st.shared.u16 [%0], one;\n"          \
  "@p add.s32 %0, %0, %1;\n"               \
  "@q st.shared.u16 [%0], two;\n"          \
  "@q add.s32 %0, %0, %1;\n}\n" : "+r"(to) \
      : "r"(step), "r"(word)
#define HALFBYTE_PUT_PAIR(type)                              \
  if constexpr (kPass == kSplit) {                           \
    asm volatile(                                            \
        "{\n.reg .pred p, q, r, s;\n.reg .b16 one, two;\n"   \
        "mov.b32 {one, two}, %2;\n"                          \
        "setp.ge." type                                      \
        " p|q, %2, %3;\n"                                    \
        "setp.le." type                                      \
        " r|s, %2, %4;\n"                                    \
        "and.pred p, p, r;\n"                                \
        "and.pred q, q, s;\n" HALFBYTE_PUT_BOTH,             \
        "r"(lows), "r"(highs)                                \
        : "memory");                                         \
  } else {                                                   \
    asm volatile(                                            \
        "{\n.reg .pred p, q;\n.reg .b16 one, two;\n"         \
        "mov.b32 {one, two}, %2;\n"                          \
        "setp.ge." type " p|q, %2, %3;\n" HALFBYTE_PUT_BOTH, \
        "r"(lows)                                            \
        : "memory");                                         \
  }
  if constexpr (std::is_same_v<T, half_t>) {
    HALFBYTE_PUT_PAIR("f16x2")
  } else {
#if __CUDA_ARCH__ >= 900
    HALFBYTE_PUT_PAIR("bf16x2")
#else
    const uint32_t is_low = x >= bounds.low && (kPass == kTail || x <= bounds.high);
    const uint32_t is_high = y >= bounds.low && (kPass == kTail || y <= bounds.high);
    asm volatile(
        "{\n.reg .pred p, q;\n.reg .b16 one, two;\n"
        "mov.b32 {one, two}, %2;\n"
        "setp.ne.u32 p, %3, 0;\n"
        "setp.ne.u32 q, %4, 0;\n" HALFBYTE_PUT_BOTH,
        "r"(is_low), "r"(is_high)
        : "memory");
#endif
  }
#undef HALFBYTE_PUT_PAIR
#undef HALFBYTE_PUT_BOTH
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
  /// Vector i of a step that lies inside the row; this lane's first vector is at `from`, and its marks, if
  /// there are any, at `marks_from`, aligned.
  __device__ __forceinline__ void read_whole(int i, const T* from, const uint8_t* marks_from) {
    constexpr int N = 16 / static_cast<int>(sizeof(T));
    vectors[i] = Words<T>::load_once(from + 32 * i * N);
    if constexpr (kSeen) {
      if (marks_from) {
        if constexpr (N == 8)
          *reinterpret_cast<uint2*>(&marks[i]) = *reinterpret_cast<const uint2*>(marks_from + 32 * i * N);
        else
          marks[i].words[0] = *reinterpret_cast<const uint32_t*>(marks_from + 32 * i * N);
      }
    }
  }
  /// Vector i of a step anywhere. This is rare: the row is made anew rather than kept in registers.
  __device__ __forceinline__ void read_slowly(int i, int first) {
    const Row<T, kSeen> row;
    const int v = first + 32 * i + static_cast<int>(threadIdx.x % 32);
    vectors[i] = v < row.end ? row.read(v) : Words<T>::nothing();
    if constexpr (kSeen) {
      if (row.seen) marks[i] = v < row.end ? row.read_marks(v) : typename Row<T, kSeen>::Bytes{};
    }
  }
  __device__ __forceinline__ void read_marks(const Row<T, kSeen>& row, int first) {
    if constexpr (kSeen) {
      if (row.seen) row.read_marks(marks, first, row.end);
    }
  }
};

/// Has the first kilobytes of this warp's run brought to L2, by the lane that is told to.
template <typename T, bool kSeen>
__device__ __forceinline__ void prefetch_run(const Row<T, kSeen>& row, bool by_this_lane) {
  const int first = max(row.begin, row.whole), stop = min(min(row.end, row.whole_end), row.begin + kAhead);
#if __CUDA_ARCH__ >= 900
  if (by_this_lane && first < stop) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row.x + row.index(first)),
                 "r"((stop - first) * 16)
                 : "memory");
  }
#endif
}

/// The pass over this warp's run, with weights of 2^(logit * scale - reference). Sums and items of slots go
/// to Shared, groups and items to Area. A NaN for the reference of kSums: one that the first step asks for.
template <Pass kPass, int kThreads, typename T, bool kSeen>
__device__ __forceinline__ Seen scan_run(float scale, const Bounds& bounds) {
  constexpr int N = 16 / sizeof(T);
  constexpr bool kRemembers = kPass == kTail || kPass == kSplit, kWeighs = kPass == kSums || kRemembers;
  constexpr bool kPairs = N == 8 && !kSeen && kPass != kBest;  // maxima are taken two at once
  using Item = ItemOf<T, kSeen>;
  using Store = Area<kThreads, T, kSeen>;
  Shared& s = shared();
  const Row<T, kSeen> row;
  const int lane = threadIdx.x % 32;
  if constexpr (kPass == kSums) prefetch_run(row, lane == 0);
  Step<T, kSeen> step;
  step.read(row, row.begin);
  // while these are on their way; not by the first thread, which has had other things to do
  if (kPass != kBest && threadIdx.x == kThreads - 32) {
    const Problem<T>& p = problem<T>();
    const int64_t* const rng = p.rng + 2 * p.row();
    s.uniform = uniform(rng[0], rng[1]);
  }
  Seen seen;
  seen.reference = bounds.reference;
  if (kPass == kSums && isnan(seen.reference)) {
    float first = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) first = fmaxf(first, largest_of(step.vectors[i]));
    seen.reference = reference_of(warp_max(first), scale);
  }
  [[maybe_unused]] const float reference = seen.reference;
  const T* from = row.x + row.index(row.begin + lane);
  [[maybe_unused]] const bool aligned = !row.seen || is_aligned(row.seen + row.offset, N);
  // where the next item goes
  [[maybe_unused]] uint32_t to = 0, to_first = 0;
  [[maybe_unused]] int to_step = 0;
  [[maybe_unused]] uint32_t lows = 0, highs = 0;
  if constexpr (kRemembers) {
    const Column<Item> column(Store::items(), static_cast<int>(threadIdx.x), problem<T>().capacity);
    to = to_first = shared_address(column.first);
    to_step = column.step * static_cast<int>(sizeof(Item));
    if constexpr (sizeof(Item) == 2) {
      lows = bits_twice<T>(bounds.low);
      highs = bits_twice<T>(bounds.high);
    }
  }
  const int in_slot = problem<T>().slot();
  const int last_whole = min(row.end, row.whole_end) - kStep;
  int first = row.begin;
#pragma unroll 1
  for (int slot = 0; first < row.end; ++slot) {
    const int stop = min(row.end, first + in_slot);
    float group = -INFINITY;
    [[maybe_unused]] PairOf<T> groups;
    *reinterpret_cast<uint32_t*>(&groups) = Words<T>::nothing().w[0];
    // of the slot: two chains of additions, and what is above the upper bound
    [[maybe_unused]] float sums[2] = {}, above = 0.0f;
#pragma unroll 1
    for (; first < stop; first += kStep) {
      from += kStep * N;
      const bool quick = first + kStep <= last_whole && (!kSeen || aligned);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        [[maybe_unused]] float x[N], here = -INFINITY;
        if constexpr (kWeighs || kSeen) {
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = step.vectors[i].value(j);
        }
        if constexpr (kSeen) {
          if (row.seen && step.marks[i].any()) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
              if (step.marks[i].at(j)) x[j] = row.penalised(row.clean(x[j]));
            }
          }
#pragma unroll
          for (int j = 0; j < N; ++j) here = fmaxf(here, x[j]);
        } else if constexpr (kPairs) {
          const PairOf<T>* pairs = reinterpret_cast<const PairOf<T>*>(&step.vectors[i]);
          groups = __hmax2(groups, __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3])));
        } else {
          here = largest_of(step.vectors[i]);
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
                value = step.vectors[i].value(j);
              if (value >= here) at = j;  // above it is only infinity, which counts as equal
            }
            seen.best = static_cast<uint32_t>(row.index(first + 32 * i + lane) + at);
          }
        } else if constexpr (!kPairs) {
          group = fmaxf(group, here);
        }
        // the weights are on their way while items are put
        [[maybe_unused]] float w[N];
        if constexpr (kWeighs) {
#pragma unroll
          for (int j = 0; j < N; ++j) w[j] = rough_exp2(fmaf(x[j], scale, -reference));
        }
        if constexpr (kRemembers) {
          if constexpr (sizeof(Item) == 2) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              put_pair<kPass, T>(step.vectors[i].w[j], x[2 * j], x[2 * j + 1], bounds, lows, highs, to,
                                 to_step);
          } else {
#pragma unroll
            for (int j = 0; j < N; ++j) put<kPass>(x[j], bounds, to, to_step);
          }
        }
        if constexpr (kWeighs) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            sums[j % 2] += w[j];
            if constexpr (kPass == kSplit) add_above(above, x[j], bounds.high, w[j]);
          }
        }
        // what was seen makes room for the same vector of the next step
        if (quick) {
          step.read_whole(i, from, row.seen ? row.seen + (from - row.x) : nullptr);
        } else if (first + kStep < row.end) {
          step.read_slowly(i, first + kStep);
        }
      }
      if constexpr (kRemembers) {
        const int apart = static_cast<int>(to - __shfl_xor_sync(0xffffffffu, to, 16));
        if (__any_sync(0xffffffffu, apart * to_step > static_cast<int>(sizeof(Item) * sizeof(Item)))) {
          // two lanes have met: from now on what is put is lost
          seen.full = true;
          to = to_first;
          to_step = 0;
        }
      }
    }
    if constexpr (kPairs) group = fmaxf(to_float(groups.x), to_float(groups.y));
    if constexpr (kPass != kBest) {
      seen.own = fmaxf(seen.own, group);
      Store::groups()[slot * kThreads + threadIdx.x] = from_float<typename Store::Group>(group);
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
      seen.items = static_cast<int>((to_step > 0 ? to - to_first : to_first - to) / sizeof(Item));
      Store::ends()[slot * kThreads + threadIdx.x] = static_cast<uint8_t>(seen.items);
    }
  }
  return seen;
}

}  // namespace sampling
}  // namespace halfbyte::cuda
