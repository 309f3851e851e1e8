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
  kSplit    // and what those above a bound weigh; those between two bounds are remembered
};

/// What a thread has seen.
struct Seen {
  float own = -INFINITY;  // the largest, before the temperature
  uint32_t best = 0;      // kBest: its index
  float reference = 0.0f;
  double sum = 0.0, above = 0.0;  // of weights of 2^(logit * scale - reference); of those above a bound
  int items = 0;
  bool full = false;  // there was no room for an item
};

/// Between what the cut of top-p lies, before the temperature.
struct Bounds {
  float low, high;
  float reference;
};

/// Where the threads keep what they have seen, each in a column.
template <typename T, bool kSeen>
struct Store {
  using Item = std::conditional_t<kSeen, float, T>;
  float* groups;
  Item* items;
  int capacity;  // items of a thread
  int fold;      // 2^fold steps make a group
};

/// A reference that weights of up to `value` can have.
__device__ __forceinline__ float reference_of(float value, float scale) {
  return value > -INFINITY ? ceilf(value * scale) : 0.0f;
}

template <typename T, int N>
__device__ __forceinline__ float largest_of(const Vec<T, N>& vector) {
  float most = -INFINITY;
  if constexpr (N == 8) {
    using Pair = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
    const Pair* pairs = reinterpret_cast<const Pair*>(&vector);
    const Pair two = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    most = fmaxf(fmaxf(most, to_float(two.x)), to_float(two.y));
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) most = fmaxf(most, vector.v[j]);
  }
  return most;
}

/// above += w where x is above `high`; where it is from `low` to there, x is put at `to`, and `to` goes on to
/// the thread's next place. Written out, so that nothing is a branch.
template <typename Item, typename T>
__device__ __forceinline__ void split(float x, T raw, float w, float low, float high, float& above,
                                      uint32_t& to) {
  if constexpr (sizeof(Item) == 2) {
    asm volatile(
        "{\n.reg .pred p, q;\n"
        "setp.gt.f32 q, %2, %5;\n"
        "setp.ge.and.f32 p, %2, %4, !q;\n"
        "@q add.f32 %0, %0, %3;\n"
        "@p st.shared.u16 [%1], %6;\n"
        "@p add.u32 %1, %1, %7;\n}\n"
        : "+f"(above), "+r"(to)
        : "f"(x), "f"(w), "f"(low), "f"(high), "h"(*reinterpret_cast<const uint16_t*>(&raw)),
          "n"(kThreads * sizeof(Item))
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p, q;\n"
        "setp.gt.f32 q, %2, %5;\n"
        "setp.ge.and.f32 p, %2, %4, !q;\n"
        "@q add.f32 %0, %0, %3;\n"
        "@p st.shared.f32 [%1], %2;\n"
        "@p add.u32 %1, %1, %6;\n}\n"
        : "+f"(above), "+r"(to)
        : "f"(x), "f"(w), "f"(low), "f"(high), "n"(kThreads * sizeof(Item))
        : "memory");
  }
}

/// The first steps of a pass are under way before it is known what for.
template <typename T, bool kSeen>
struct Step {
  Vec<T, 16 / sizeof(T)> vectors[kLoads];
  typename Row<T, kSeen>::Bytes marks[kLoads];

  __device__ __forceinline__ void read(const Row<T, kSeen>& row, int first) {
    row.read_step(vectors, first, row.end);
    if constexpr (kSeen) {
      if (row.seen) row.read_marks(marks, first, row.end);
    }
  }
};

/// This warp's run, the first step of which is in `next`. A NaN for the reference of kSums: one that the
/// first step asks for.
template <Pass kPass, typename T, bool kSeen>
__device__ __forceinline__ void scan_run(Seen& seen, const Row<T, kSeen>& row, const Store<T, kSeen>& store,
                                         float scale, const Bounds& bounds, Step<T, kSeen>& next) {
  constexpr int N = 16 / sizeof(T);
  constexpr bool kWeighs = kPass == kSums || kPass == kSplit;
  using Item = typename Store<T, kSeen>::Item;
  const int lane = threadIdx.x % 32;
  float reference = bounds.reference;
  if (kPass == kSums && isnan(reference)) {
    float first = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) first = fmaxf(first, largest_of(next.vectors[i]));
    reference = reference_of(warp_max(first), scale);
  }
  [[maybe_unused]] const uint32_t items = shared_address(store.items + threadIdx.x);
  [[maybe_unused]] const uint32_t last = items + (store.capacity - N) * kThreads * sizeof(Item);
  [[maybe_unused]] uint32_t to = items;
  [[maybe_unused]] float group = -INFINITY;
  int step = 0;
#pragma unroll 1
  for (int first = row.begin; first < row.end; first += kStep, ++step) {
    const Step<T, kSeen> in = next;
    if (first + kStep < row.end) next.read(row, first + kStep);
    float top = -INFINITY, sums[2] = {}, above = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float x[N], here = -INFINITY;
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = to_float(in.vectors[i].v[j]);
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
        here = fminf(here, kLargest);
        if (here > seen.own) {
          seen.own = here;
          int at = 0;
#pragma unroll
          for (int j = N - 1; j >= 0; --j) {
            if (fminf(x[j], kLargest) == here) at = j;
          }
          seen.best = static_cast<uint32_t>(row.index(first + 32 * i + lane) + at);
        }
      } else {
        top = fmaxf(top, here);
      }
      if constexpr (kPass == kSplit) {
        if (to > last) {
          seen.full = true;
          to = last;
        }
      }
      if constexpr (kWeighs) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float w = rough_exp2(fmaf(x[j], scale, -reference));
          sums[j % 2] += w;
          if constexpr (kPass == kSplit)
            split<Item>(x[j], in.vectors[i].v[j], w, bounds.low, bounds.high, above, to);
        }
      }
    }
    if constexpr (kWeighs) seen.sum += static_cast<double>(sums[0] + sums[1]);
    if constexpr (kPass == kSplit) seen.above += static_cast<double>(above);
    if constexpr (kPass != kBest) {
      seen.own = fmaxf(seen.own, top);
      const int slot = step >> store.fold;
      group = step == slot << store.fold ? top : fmaxf(group, top);
      store.groups[slot * kThreads + threadIdx.x] = group;
    }
  }
  if constexpr (kPass == kSplit) seen.items = static_cast<int>((to - items) / (kThreads * sizeof(Item)));
  seen.reference = reference;
}

}  // namespace sampling
}  // namespace halfbyte::cuda
