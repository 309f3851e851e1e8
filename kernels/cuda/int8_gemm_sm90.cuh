// What the int8 product on sm_90a (int8_gemm_sm90.cu) is made of beside its loop: how blocks, shared memory
// and items are laid out, and how warps bring the outlier columns of an item into shared memory: those of x
// from memory, [tokens][64 slots] of 16 bits, swizzled, at once or by way of rows of them that all blocks
// make, those of b from the stages of the ring while they pass.
#pragma once

#include <algorithm>

#include "int8_output_sm90.cuh"
#include "int8_product.cuh"
#include "launch.cuh"
#include "output_sm90.cuh"
#include "tma_sm90.cuh"

namespace halfbyte::cuda::int8_sm90 {

constexpr int kRows = 128;                // of b, of a block
constexpr int kStep = 128;                // bytes of a row in a step
constexpr int kRowBytes = kRows * kStep;  // of b in a step
constexpr int64_t kKeptBytes = 44 << 20;  // of x, its codes and y that may stay in L2 while b passes
constexpr int kFewestSteps = 3;           // of an item; steps beyond K are zeros

constexpr int64_t steps_of(int64_t k) { return std::max<int64_t>((k + kStep - 1) / kStep, kFewestSteps); }

/// The warps of a block: two warpgroups of consumers, a producer, and for outlier columns some that pick b's
/// from the ring and some that read x.
template <int kTokens>
struct Warps {
  static constexpr int kPickers = kTokens > 128 ? 2 : 4, kReaders = kTokens > 128 ? 1 : 3;
  static constexpr int kThreads = (9 + kPickers + kReaders) * 32;
};

/// Shared memory: the ring, results, token scales, barriers (two for each stage, five for outlier
/// columns and one for sums), counts of outlier columns, and for each warp that brings them their list.
template <int kTokens>
struct Space {
  static constexpr int kStage = kRowBytes + kTokens * kStep;
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 8;  // as many of each picker
  static constexpr int kStagingAt = kStages * kStage;
  static constexpr int kScalesAt = kStagingAt + 4 * kStaging;
  static constexpr int kBarriersAt = kScalesAt + 2 * kTokens * 4;
  static constexpr int kSlotsAt = kBarriersAt + kStages * 16 + 48, kColumnsAt = kSlotsAt + 16;
  static constexpr int kBytes =
      kColumnsAt + (Warps<kTokens>::kPickers + Warps<kTokens>::kReaders) * kRoundSlots * 4;
  static_assert(kBytes <= 227 << 10);
};
struct Maps {
  CUtensorMap a, b, y, rest;
};

/// How the product is cut: tokens of a block, blocks that divide K of the last items, whether blocks go in
/// pairs, token tiles of a band.
struct Cut {
  int tokens, splits;
  bool pair;
  int band;
};

template <typename T>
struct Gemm8 {
  Output<T> out;
  const float* row_absmax;
  const float* scb;
  const int8_t* b;
  const T* x;
  ColumnMarks* marks;  // null without a threshold
  float threshold;
  typename OutlierType<T>::type* rest;  // see Product8
  uint32_t* gathered;                   // warps that have made their share of it
  int64_t k;
  int m, steps;
  int row_groups, token_tiles, band;  // groups of the rows of a block, or of a pair
  int whole, items;                   // items of one block (or pair) each; all of them
  int rounds;                         // of whole items before the divided ones
  int splits, part;                   // blocks that divide K of an item, and their steps
  bool whole_lines;                   // see write_sums()
  bool once;                          // codes of a and b are the first to leave L2
  bool engine;                        // y is written by the copy engine
};

#if HALFBYTE_WGMMA

constexpr int kConsumers = 256;  // threads

/// An item: which, and its steps.
struct Work {
  int item, first_step, steps;
};
/// The n-th of this block; false when there is none.
template <bool kPair, typename T>
__device__ __forceinline__ bool find_work(const Gemm8<T>& p, int n, Work* work) {
  const int workers = kPair ? gridDim.x / 2 : gridDim.x, worker = kPair ? blockIdx.x / 2 : blockIdx.x;
  const int item = n * workers + worker;
  if (item < p.whole) {
    *work = {item, 0, p.steps};
    return true;
  }
  if (kPair || n != p.rounds) return false;
  *work = {p.whole + static_cast<int>(blockIdx.x) / p.splits,
           static_cast<int>(blockIdx.x) % p.splits * p.part, p.part};
  return work->item < p.items;
}

/// The place of an item: its rows in groups, its tokens in tiles.
struct Place {
  int rows, tokens;
};
template <typename T>
__device__ __forceinline__ Place place_of(const Gemm8<T>& p, int item) {
  const int per_band = p.band * p.row_groups, band = item / per_band, in_band = item % per_band;
  const int width = min(p.band, p.token_tiles - band * p.band);
  return {in_band / width, band * p.band + in_band % width};
}

/// After a thread has written memory that the copy engine reads, and before a thread asks it to.
__device__ __forceinline__ void publish_memory() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

/// 16 bytes of a row of a stage: 8 slots.
__device__ __forceinline__ char* piece_at(char* stage, int row, int piece) {
  return stage + row * kStep + ((piece ^ (row & 7)) * 16);
}

/// By a warp: what it has written is there for who reads the count, and for the copy engine.
__device__ __forceinline__ void count_warp(uint32_t* count) {
  publish_memory();
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(count) : "memory");
}
/// By a thread, until that many have counted, or it has looked `looks` times, each about a microsecond; the
/// count.
__device__ __forceinline__ uint32_t wait_for_count(const uint32_t* count, uint32_t most, int looks) {
  uint32_t now;
  for (; (now = *static_cast<const volatile uint32_t*>(count)) != most && looks > 0; --looks) __nanosleep(64);
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(now) : "l"(count) : "memory");
  publish_memory();
  return now;
}

/// A barrier of the consumers.
__device__ __forceinline__ void consumer_barrier() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(3), "n"(kConsumers) : "memory");
}

/// What a warp knows of the outlier columns of a round, and how it brings them into shared memory.
template <int kTokens, typename T>
struct Gatherer {
  using Half = typename OutlierType<T>::type;
  static constexpr int kPieces = OutlierType<T>::kPieces;
  static constexpr int kPickers = Warps<kTokens>::kPickers, kReaders = Warps<kTokens>::kReaders;
  static constexpr int kOwnRows = kRows / kPickers;        // of a picker
  static constexpr int kTogether = kTokens > 128 ? 1 : 3;  // loads of 32 tokens x 8 slots under way
  const Gemm8<T>& p;
  char* const rows;  // [kRows][kRoundSlots] of b
  int* const columns;
  int here;  // columns of this round

  /// By reader `reader`: [kTokens][kRoundSlots] of x.
  __device__ __forceinline__ void fetch_tokens(char* tokens, int64_t first_token, int reader) const {
    constexpr int kGroups = kTokens / 32;
    const int lane = threadIdx.x % 32, slots = here * kPieces, units = (slots + 7) / 8 * kGroups;
#pragma unroll 1
    for (int from = reader; from < units; from += kTogether * kReaders) {
      EightSlots<T> eight[kTogether];
      float most[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int unit = from + i * kReaders;
        if (unit >= units) continue;
        const int64_t token = min(first_token + unit % kGroups * 32 + lane, int64_t{p.m} - 1);
        most[i] = p.row_absmax[token];
        eight[i].fetch(p.x + token * p.k, columns, here, unit / kGroups * 8);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int unit = from + i * kReaders;
        if (unit >= units) continue;
        *reinterpret_cast<Vec<Half, 8>*>(piece_at(tokens, unit % kGroups * 32 + lane, unit / kGroups)) =
            eight[i].rest(Rest<T>(most[i], p.threshold), here, unit / kGroups * 8);
      }
    }
#pragma unroll 1
    for (int unit = units + reader; unit < filled_slots(slots) / 8 * kGroups; unit += kReaders)
      *reinterpret_cast<uint4*>(piece_at(tokens, unit % kGroups * 32 + lane, unit / kGroups)) =
          make_uint4(0, 0, 0, 0);
  }
  /// Of what all columns hold of x, as far as there is room in p.rest, the share `share` of `shares`. Returns
  /// how many columns there are.
  __device__ __forceinline__ int gather_share(const uint32_t* set, uint4 bits, int share, int shares) {
    constexpr int kColumns = kRoundColumns<T>;
    const int lane = threadIdx.x % 32, groups = (p.m + 31) / 32;
    const int end = static_cast<int>((p.k + kStep - 1) / kStep) * kStep;
    int all = 0, from = 0;
#pragma unroll 1
    do {
      if (from > 0) bits = fetch_marks(set, 0, end / kMarkedTogether);
      all = list_columns(set, bits, 0, end, from, kColumns, columns);
      here = min(all - from, kColumns);
      const int parts = filled_slots(here * kPieces) / 8;
#pragma unroll 1
      for (int unit = share; unit < parts * groups; unit += shares) {
        const int64_t token = unit / parts * 32 + lane;
        if (token >= p.m) continue;
        const int first = unit % parts * 8;
        const float most = p.row_absmax[token];
        EightSlots<T> eight;
        eight.fetch(p.x + token * p.k, columns, here, first);
        *reinterpret_cast<Vec<Half, 8>*>(p.rest + token * (kRestRounds * kRoundSlots) +
                                         from / kColumns * kRoundSlots + first) =
            eight.rest(Rest<T>(most, p.threshold), here, first);
      }
      __syncwarp();
      from += kColumns;
    } while (from < min(all, kRestRounds * kColumns));
    return all;
  }
  /// Of the rows of picker `picker`: what `columns` of a round leave of its slots.
  __device__ __forceinline__ void clear_rest(int picker, int columns) const {
    const int slots = columns * kPieces;
#pragma unroll
    for (int i = 0; i < kOwnRows / 32; ++i) {
      const int row = picker * kOwnRows + i * 32 + threadIdx.x % 32;
      int slot = slots;
#pragma unroll 1
      for (; slot % 8 != 0; ++slot)
        *reinterpret_cast<uint16_t*>(piece_at(rows, row, slot / 8) + slot % 8 * 2) = 0;
#pragma unroll 1
      for (; slot < filled_slots(slots); slot += 8)
        *reinterpret_cast<uint4*>(piece_at(rows, row, slot / 8)) = make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void put(int row, int column, int8_t code) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int slot = column * kPieces + piece;
      *reinterpret_cast<Half*>(piece_at(rows, row, slot / 8) + slot % 8 * 2) = from_float<Half>(code);
    }
  }
  /// Of all rows, columns `from` to `to` of the list, which are in this stage.
  __device__ __forceinline__ void pick(const char* stage, int from, int to) const {
    const unsigned lane = threadIdx.x % 32, turned = lane % 8 * 16;
    const uint8_t* const in = reinterpret_cast<const uint8_t*>(stage) + lane * kStep;
    char* const out = rows + lane * kStep;
#pragma unroll 1
    for (int column = from; column < to;) {
      const bool pair = kPieces == 1 && column % 2 == 0 && column + 1 < to;  // their slots are one word
      const uint8_t* const first = in + ((columns[column] % unsigned{kStep}) ^ turned);
      uint8_t codes[2][kRows / 32];
#pragma unroll
      for (int i = 0; i < kRows / 32; ++i) codes[0][i] = first[i * 32 * kStep];
      if (pair) {
        const uint8_t* const second = in + ((columns[column + 1] % unsigned{kStep}) ^ turned);
#pragma unroll
        for (int i = 0; i < kRows / 32; ++i) codes[1][i] = second[i * 32 * kStep];
        char* const word = out + ((column * 2u) ^ turned);
#pragma unroll
        for (int i = 0; i < kRows / 32; ++i)
          *reinterpret_cast<uint32_t*>(word + i * 32 * kStep) =
              pair_of<Half>(static_cast<int8_t>(codes[0][i]), static_cast<int8_t>(codes[1][i]));
        column += 2;
      } else {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          char* const half = out + (((column * kPieces + piece) * 2u) ^ turned);
#pragma unroll
          for (int i = 0; i < kRows / 32; ++i)
            *reinterpret_cast<Half*>(half + i * 32 * kStep) =
                from_float<Half>(static_cast<int8_t>(codes[0][i]));
        }
        ++column;
      }
    }
  }
  /// By picker `picker`, from memory.
  __device__ __forceinline__ void fetch_rows(int64_t first_row, int picker) const {
#pragma unroll 1
    for (int i = 0; i < kOwnRows / 32; ++i) {
      const int row = picker * kOwnRows + i * 32 + threadIdx.x % 32;
      const int8_t* const b = p.b + min(first_row + row, p.out.n - 1) * p.k;
#pragma unroll 1
      for (int from = 0; from < here; from += 8) {
        int8_t in[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) in[j] = b[columns[min(from + j, here - 1)]];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (from + j < here) put(row, from + j, in[j]);
        }
      }
    }
  }
};

#endif  // HALFBYTE_WGMMA

}  // namespace halfbyte::cuda::int8_sm90
