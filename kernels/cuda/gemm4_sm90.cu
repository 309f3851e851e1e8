// y = x w^T + bias + residual with a tiled 4-bit weight and many rows of x (65 and more), on sm_90a: the
// weight is the A operand of wgmma, decoded on the way from shared memory into registers; x is B. 256 tokens
// at a time are bound by the tensor cores, 128 by the instructions that decode.
//
// A block makes 128 rows of the weight times 256 tokens, or 64, 128 or 192 rows times 128: a producer warp
// and a consumer warpgroup for every 64 rows. One step is 64 k:
//
//   producer  a box of x [tokens][64 k], swizzled, codes and absmax of the row tiles, by the copy engine
//             into a ring. Boxes of the last tile hold no more tokens than there are, as the engine takes
//             three times as long for one that is not there; what lies in their place makes sums that
//             nobody stores
//   decode    a byte permute makes an address, a look-up makes two weights (table4.cuh), one product scales
//             them by absmax rounded to their type; done while the product of the step before runs, of
//             which 128 tokens issue each half as soon as it is decoded
//   end       after the steps of an item each warpgroup is lent a stage of the ring: the residual comes into
//             it, fp32 sums + bias + residual are rounded once and turned round in it, the copy engine writes
//             it to y while the next item is made. Without the engine (y or the residual not on 16 bytes)
//             results go through a place of their own
//
// Blocks stay and take items in turn, in bands of token tiles, so that what runs at once shares x and weights
// in L2. Items that do not fill the last round go to a cluster each, whose blocks divide K and send each
// other sums, which are added in a fixed order.
#include <algorithm>

#include "launch.cuh"
#include "output_sm90.cuh"
#include "table4.cuh"
#include "tma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

/// What a block makes: 64 rows of the weight for each of kGroups consumer warpgroups, times kTokens tokens.
/// Shared memory behind the table: a ring of x, of codes, of absmax, then results that do not go by the copy
/// engine, then barriers: two for each stage, and one for what other blocks of a cluster send.
template <int kTokens_, int kGroups_>
struct Shape {
  static constexpr int kTokens = kTokens_, kGroups = kGroups_;
  static constexpr int kRows = kGroups * 64, kConsumers = kGroups * 128, kThreads = kConsumers + 128;
  static constexpr int kX = kTokens * 128, kCodes = kRows / kTileRows * 512,
                       kAbsmax = kRows * 4;  // of a step
  static constexpr int kStages =
      ((227 << 10) - kTable4Bytes - kGroups * kStaging - 256) / (kX + kCodes + kAbsmax);
  static constexpr int kCodesAt = kTable4Bytes + kStages * kX, kAbsmaxAt = kCodesAt + kStages * kCodes;
  static constexpr int kStagingAt = kAbsmaxAt + kStages * kAbsmax;
  static constexpr int kBarriersAt = kStagingAt + kGroups * kStaging,
                       kArrivedAt = kBarriersAt + kStages * 16 + 8;
  static constexpr int kBytes = kArrivedAt + 8;
  static_assert(kStages >= kGroups + 2 && kBytes <= 227 << 10);

  /// Where the ring was when an item is divided: what other blocks send, then results.
  static HALFBYTE_ANYWHERE constexpr int received(int splits) {
    return (splits - 1) * (kTokens / splits) * kRows * 4;
  }
  static HALFBYTE_ANYWHERE constexpr bool fits(int splits) {
    return received(splits) + kGroups * (kTokens / splits) * 128 <= kStages * kX;
  }
};
struct Maps {
  CUtensorMap x, last_x, codes, absmax, y, residual;  // last_x: of the last tile of tokens
};

/// How the product is cut: tokens and warpgroups of a block, blocks that divide K of the last items.
struct Cut {
  int tokens, groups, splits;
};

template <typename T>
struct Gemm4 {
  Tiled4 w;
  Output<T> out;
  Book4 book;
  int m, tiles;
  int row_groups, token_tiles, band;
  int last_bytes;    // of x in a step of the last tile of tokens
  int whole, items;  // items of one block each; all of them
  int rounds;        // of whole items before the divided ones
  int splits, part;  // blocks that divide K of an item, and their k tiles
  bool whole_lines;  // see write_sums()
  bool engine;       // y is written, and the residual read, by the copy engine
  int box;           // in boxes of so many tokens x 64 columns
};

#if HALFBYTE_WGMMA

/// What a lane holds of a tile: its codes, and the absmax of rows g and g + 8, or when they are nested that
/// of row g + 8 (lane % 2).
template <bool kNested>
struct Tile {
  uint4 codes;
  float2 scale;
  uint32_t code;        // nested: its byte,
  float nested = 0.0f;  // and what multiplies its value

  __device__ __forceinline__ void read(const char* code_bytes, const char* absmax_bytes) {
    codes = *reinterpret_cast<const uint4*>(code_bytes);
    if (kNested)
      code = *reinterpret_cast<const uint8_t*>(absmax_bytes);
    else
      scale = *reinterpret_cast<const float2*>(absmax_bytes);
  }
  /// Nested: what its byte stands for.
  __device__ __forceinline__ float value(const char* table, uint32_t lane4) const {
    return kNested ? map_value(table, code, lane4) : 0.0f;
  }
  __device__ __forceinline__ float2 absmax(float own, float offset) const {
    if (!kNested) return scale;
    own = nested_value(own, nested, offset);
    return make_float2(__shfl_sync(0xffffffffu, own, 0, 2), __shfl_sync(0xffffffffu, own, 1, 2));
  }
};

/// arrive() for each warp of a warpgroup.
__device__ __forceinline__ void arrive_for_group(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 4;\n" ::"r"(barrier) : "memory");
}

/// An item of a block: which, and its k tiles.
struct Work {
  int item, first_tile, steps;
};
/// The n-th of this block; false when there is none.
template <typename T>
__device__ __forceinline__ bool find_work(const Gemm4<T>& p, int n, Work* work) {
  const int item = n * gridDim.x + blockIdx.x;
  if (item < p.whole) {
    *work = {item, 0, (p.tiles + 1) / 2 * 2};
    return true;
  }
  if (n != p.rounds) return false;
  *work = {p.whole + static_cast<int>(blockIdx.x) / p.splits,
           static_cast<int>(blockIdx.x) % p.splits * p.part, p.part};
  return work->item < p.items;
}

/// The place of an item: its rows in groups of kRows, its tokens in tiles.
struct Place {
  int rows, tokens;
};
template <typename T>
__device__ __forceinline__ Place place_of(const Gemm4<T>& p, int item) {
  const int per_band = p.band * p.row_groups, band = item / per_band, in_band = item % per_band;
  const int width = min(p.band, p.token_tiles - band * p.band);
  return {in_band / width, band * p.band + in_band % width};
}

/// fill_table4() by kThreads threads, while another one asks for tiles; all of their reads of the map are
/// under way together, and while the pairs are written.
template <int kThreads>
__device__ __forceinline__ void fill_table(char* table, const Book4& book, const float* map, int thread) {
  constexpr int kPieces = 256 * 8, kEach = (kPieces + kThreads - 1) / kThreads;
  float value[kEach] = {};
  if (map) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) value[i] = map[min(thread + i * kThreads, kPieces - 1) / 8];
  }
  const auto each_piece = [&](const auto& write) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread + i * kThreads;
      if (at < kPieces) write(i, at / 8, table + at / 8 * 256 + at % 8 * 16);
    }
  };
  each_piece([&](int, int byte, char* to) {
    const uint32_t pair = book.bits[byte >> 4] | static_cast<uint32_t>(book.bits[byte & 15]) << 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(pair, pair, pair, pair);
  });
  if (!map) return;
  each_piece([&](int i, int, char* to) {
    *reinterpret_cast<float4*>(to + 128) = make_float4(value[i], value[i], value[i], value[i]);
  });
}

/// Turns a warpgroup's sums of kTokens tokens round into `results` [kTokens][128 bytes], swizzled, for the
/// copy engine, with the bias and the residual, which is there already.
template <int kTokens, typename T>
__device__ __forceinline__ void turn_sums(const Output<T>& out, const float (&acc)[kTokens / 2],
                                          uint32_t results, bool residual, int64_t first_row) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  float bias[2] = {};
  if (out.bias) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      bias[h] = out.bias_at(min(first_row + warp * 16 + lane / 4 + h * 8, out.n - 1));
  }
  const int token = lane / 16 * 8 + lane % 8, rows8 = warp * 2 + lane / 8 % 2;
  const uint32_t matrices = results + token * 128 + ((rows8 ^ (token & 7)) * 16);
#pragma unroll
  for (int j = 0; j < kTokens / 16; ++j) {
    uint32_t r[4] = {};
    if (residual) load_transposed(r, matrices + j * 16 * 128);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low = acc[j * 8 + i * 2] + bias[i % 2], high = acc[j * 8 + i * 2 + 1] + bias[i % 2];
      if (residual) {
        const float2 add = floats_of(r[i], T{});
        low += add.x, high += add.y;
      }
      r[i] = pair_of<T>(low, high);
    }
    store_transposed(matrices + j * 16 * 128, r);
  }
  publish_shared();
}

/// The end of an item whose K is divided: each block writes its share of the tokens.
template <int kSplits, typename S, typename T>
__device__ __forceinline__ void finish_divided(const Gemm4<T>& p, const CUtensorMap& y,
                                               const float (&acc)[S::kTokens / 2], char* table, int group,
                                               int64_t first_row, int64_t first_token) {
  static_assert(S::fits(kSplits));
  constexpr int kShare = S::kTokens / kSplits;
  char* const ring = table + kTable4Bytes;
  float total[kShare / 2];
  exchange_sums<kSplits, S::kConsumers>(total, acc, ring, shared_address(table) + S::kArrivedAt);
  first_token += cluster_rank() * kShare;
  if (!p.engine || p.out.residual) {
    write_sums<kShare>(p.out, p.m, p.whole_lines, total, table + S::kStagingAt + group * kStaging, group,
                       first_row, first_token);
    return;
  }
  const uint32_t results = shared_address(ring) + S::received(kSplits) + group * (kShare * 128);
  turn_sums<kShare>(p.out, total, results, false, first_row);
  group_barrier(group);
  if (threadIdx.x % kGroup == 0)
    store_tile(y, results, static_cast<int>(first_token), static_cast<int>(first_row));
}

#endif  // HALFBYTE_WGMMA

template <typename T, typename S, bool kNested>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm4_kernel(const __grid_constant__ Gemm4<T> p, const __grid_constant__ Maps maps) {
#if HALFBYTE_WGMMA
  constexpr int kTokens = S::kTokens, kRows = S::kRows, kConsumers = S::kConsumers, kStages = S::kStages;
  constexpr int kAbsmaxBytes = kNested ? kRows : kRows * 4;
  // Whether the codes of a step are read two steps before its product, not one; needs stages for that while
  // those that are lent for y are not free yet.
  constexpr bool kAhead = kStages >= S::kGroups + 3;
  // Tiles of x that are asked for at once when a block begins: few, so that they come in their order, but for
  // one warpgroup and plain absmax, which the arrival of x limits later, too.
  constexpr int kFirst = S::kGroups == 1 && !kNested ? kStages : 2;
  extern __shared__ __align__(1024) char table[];
  const uint32_t shared = shared_address(table);
  const uint32_t ring = shared + kTable4Bytes, full = shared + S::kBarriersAt, empty = full + kStages * 8;
  const int lane = threadIdx.x % 32, g = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const bool consumes = warp < kConsumers / 32;
  uint32_t lane4 = lane * 4;
  asm volatile("" : "+r"(lane4));  // kept, not made again in every step
  let_next_start();

  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, kConsumers / 32);
    }
    init_barrier(empty + kStages * 8, 1);  // nobody waits for it
    init_barrier(shared + S::kArrivedAt, 1);
    arrive_expecting(shared + S::kArrivedAt, S::received(p.splits));
    publish_barriers();
  }
  // the producer's part of a step; the weight needs nothing of the kernels before
  const auto fetch_weight = [&](int stage, const Place& place, int kt) {
    const int row_tile = place.rows * (kRows / kTileRows);
    const int x_bytes = place.tokens == p.token_tiles - 1 ? p.last_bytes : S::kX;
    arrive_expecting(full + stage * 8, x_bytes + S::kCodes + kAbsmaxBytes);
    fetch_tile(shared + S::kCodesAt + stage * S::kCodes, maps.codes, row_tile, kt * 128, full + stage * 8);
    fetch_tile(shared + S::kAbsmaxAt + stage * S::kAbsmax, maps.absmax, row_tile, kt * (kNested ? 4 : 16),
               full + stage * 8);
  };
  const auto fetch_x = [&](int stage, const Place& place, int kt) {
    fetch_tile(ring + stage * S::kX, place.tokens == p.token_tiles - 1 ? maps.last_x : maps.x,
               place.tokens * kTokens, kt * kTileK, full + stage * 8);
  };
  int early = 0;  // steps that are asked for before the table is there
  if (Work work; threadIdx.x == kConsumers && find_work(p, 0, &work)) {
    const Place place = place_of(p, work.item);
    for (; early < min(kStages, work.steps); ++early) fetch_weight(early, place, work.first_tile + early);
    wait_for_results();
    for (int i = 0; i < min(early, kFirst); ++i) fetch_x(i, place, work.first_tile + i);
  }
  if (warp != kConsumers / 32)
    fill_table<S::kThreads - 32>(table, p.book, kNested ? p.w.absmax.nested_code : nullptr,
                                 consumes ? threadIdx.x : threadIdx.x - 32);
  wait_for_results();
  __syncthreads();

  if (!consumes) {
    // one group of consumers has all the registers that it can name from the beginning
    if constexpr (S::kGroups > 1) give_registers<S::kGroups == 2 ? 40 : 32>();
    if (threadIdx.x == kConsumers) {
      int stage = 0;
      uint32_t parity = 1;
      Work work;
      for (int n = 0; find_work(p, n, &work); ++n) {
        const Place place = place_of(p, work.item);
        for (int i = 0; i < work.steps; ++i) {
          const int kt = work.first_tile + i;
          if (early > 0) {  // without a look at `empty`, which consumers may have brought to its next phase
            --early;
            if (i >= kFirst) {
              wait_barrier(full + (i - kFirst) * 8, 0);
              fetch_x(stage, place, kt);
            }
          } else {
            wait_barrier(empty + stage * 8, parity);
            fetch_weight(stage, place, kt);
            fetch_x(stage, place, kt);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
        for (int i = 0; p.engine && n != p.rounds && i < S::kGroups; ++i) {  // stages for y
          wait_barrier(empty + stage * 8, parity);
          if (p.out.residual) {
            arrive_expecting(full + stage * 8, S::kX);
            for (int t = 0; t < kTokens; t += p.box)
              fetch_tile(ring + stage * S::kX + t * 128, maps.residual, place.tokens * kTokens + t,
                         place.rows * kRows + i * 64, full + stage * 8);
          } else {
            arrive(full + stage * 8);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    if (Work work; p.splits > 1 && find_work(p, p.rounds, &work)) cluster_meet();
  } else {
    if constexpr (S::kGroups > 1) take_registers<S::kGroups == 2 ? 232 : 160>();
    const int group = warp / 4;
    const float offset = kNested ? *p.w.absmax.offset : 0.0f;
    const char* const my_codes = table + S::kCodesAt + warp * 512 + lane * 16;
    const char* const my_absmax =
        table + S::kAbsmaxAt + (kNested ? warp * 16 + g * 2 + lane % 2 : warp * 64 + g * 8);
    const uint64_t x_ring = describe_b(ring, 0);
    int stage = 0, lent = -1;  // of the product; the one from which the copy engine writes y
    uint32_t parity = 0;       // with which the stage is there that is read next
    Work work;
    for (int n = 0; find_work(p, n, &work); ++n) {
      const Place place = place_of(p, work.item);
      const int64_t first_row = static_cast<int64_t>(place.rows) * kRows;
      const int64_t first_token = static_cast<int64_t>(place.tokens) * kTokens;
      int ahead = stage;                     // to be read next
      int kt = work.first_tile, renew = kt;  // its tile, and that at which nested absmax are read
      const int64_t first_block =            // of a nested absmax
          (min(first_row + warp * kTileRows, p.w.n - kTileRows) + g + lane % 2 * 8) * p.tiles;
      Tile<kNested> tile;
      const auto read = [&]() __attribute__((always_inline)) {
        if (kNested && kt == renew) {
          const int64_t block = first_block + min(kt, p.tiles - 1);
          tile.nested = p.w.absmax.nested[block / kNestedBlocksize];
          const int left = kNestedBlocksize - static_cast<int>(block % kNestedBlocksize);
          renew += __reduce_min_sync(0xffffffffu, left);
        }
        wait_barrier(full + ahead * 8, parity);
        tile.read(my_codes + ahead * S::kCodes, my_absmax + ahead * S::kAbsmax);
        ++kt;
        if (++ahead == kStages) ahead = 0, parity ^= 1;
      };
      const auto release = [&](int of) __attribute__((always_inline)) {
        if (lane == 0) arrive(empty + of * 8);
      };
      const auto give_back = [&]() __attribute__((always_inline)) {  // the stage of y of the item before
        if (lent < 0) return;
        if (threadIdx.x % kGroup == 0) {
          wait_stores<0>();
          arrive_for_group(empty + lent * 8);
        }
        lent = -1;
        __syncwarp();
      };
      const auto scale_fragment = [&](uint32_t(&to)[4], const uint32_t(&pairs)[4], uint32_t low,
                                      uint32_t high) __attribute__((always_inline)) {
#pragma unroll
        for (int r = 0; r < 4; ++r) to[r] = scale_pair(pairs[r], r % 2 ? high : low, T{});
      };
      float acc[kTokens / 2];
      uint32_t a[2][4][4] = {};
      int before = kStages;  // the step whose product runs, here none
      // to the next stage
      const auto pass = [&]() __attribute__((always_inline)) {
        release(before);
        before = stage;
        if (++stage == kStages) stage = 0;
      };
      // The product of the step in `now`, and the next one decoded into `next` meanwhile; `more`: there are
      // codes to be read, `second`: of a pair of steps. 128 tokens keep the tensor cores at work for so
      // short a time that it goes in halves, and each starts as soon as half is decoded.
      const auto step = [&](const uint32_t(&now)[4][4], uint32_t(&next)[4][4], bool more, auto second)
          __attribute__((always_inline)) {
        constexpr int kParts = kAhead ? 2 : 1, kEach = 4 / kParts;
        // a sum of 32 bits costs half as much: the upper half is the same for every stage
        const uint32_t x_low = static_cast<uint32_t>(x_ring) + stage * (S::kX >> 4);
        uint32_t low, high;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int first = part * kEach;
          begin_group();
#pragma unroll
          for (int j = first; j < first + kEach; ++j)
            multiply_group(acc, now[j], x_ring >> 32 << 32 | (x_low + j * 2), true, T{});
          commit_group();
          if (!kAhead) {
            if (second.value) give_back();
            if (more) read();
            wait_group<1>();
            pass();
          }
          const float own = part == 0 ? tile.value(table, lane4) : 0.0f;
          const uint32_t words[4] = {tile.codes.x, tile.codes.y, tile.codes.z, tile.codes.w};
          uint32_t pairs[kEach][4];
#pragma unroll
          for (int j = 0; j < kEach; ++j) look_up(pairs[j], table, words[first + j], lane4);
          if (kAhead) wait_group<2>();  // the products that read what is written now are over
          if (part == 0) {
            const float2 scale = tile.absmax(own, offset);
            low = pair_of<T>(scale.x, scale.x), high = pair_of<T>(scale.y, scale.y);
          }
          if (kAhead && part == 1) {
            pass();
            if (more) read();
          }
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            hold_registers(next[first + j]);
            scale_fragment(next[first + j], pairs[j], low, high);
          }
        }
      };
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
      read();
      {
        const float2 scale = tile.absmax(tile.value(table, lane4), offset);
        const uint32_t low = pair_of<T>(scale.x, scale.x), high = pair_of<T>(scale.y, scale.y);
        const uint32_t words[4] = {tile.codes.x, tile.codes.y, tile.codes.z, tile.codes.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          look_up(a[0][j], table, words[j], lane4);
          scale_fragment(a[0][j], a[0][j], low, high);
        }
      }
      if (kAhead) read();
      int i = 0;
      do {  // what is decoded beside the last product is not used
        const bool more = i + 2 < work.steps;
        step(a[0], a[1], more || !kAhead, std::false_type{});
        if (kAhead) give_back();
        step(a[1], a[0], more, std::true_type{});
        i += 2;
      } while (i < work.steps);
      wait_group<0>();
      hold_registers(acc);
      release(before);

      const int64_t row = first_row + group * 64;
      if (n == p.rounds) {
        cluster_meet();  // nothing more comes, the rings of the cluster are free
        if (p.splits == 2)
          finish_divided<2, S>(p, maps.y, acc, table, group, row, first_token);
        else if (p.splits == 4)
          finish_divided<4, S>(p, maps.y, acc, table, group, row, first_token);
        else
          finish_divided<8, S>(p, maps.y, acc, table, group, row, first_token);
      } else if (p.engine) {
#pragma unroll
        for (int i = 0; i < S::kGroups; ++i) {
          wait_barrier(full + stage * 8, parity);
          if (i == group)
            lent = stage;
          else
            release(stage);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
        const uint32_t results = ring + lent * S::kX;
        turn_sums<kTokens>(p.out, acc, results, p.out.residual != nullptr, row);
        group_barrier(group);
        for (int t = 0; t < kTokens && threadIdx.x % kGroup == 0; t += p.box)
          store_tile(maps.y, results + t * 128, static_cast<int>(first_token) + t, static_cast<int>(row));
      } else {
        write_sums<kTokens>(p.out, p.m, p.whole_lines, acc, table + S::kStagingAt + group * kStaging, group,
                            row, first_token);
      }
    }
    if (threadIdx.x % kGroup == 0) wait_stores<0>();
  }
#endif
}

/// How many items fill rounds of whole ones, and how many are left to be divided.
struct Rounds {
  int64_t whole, divided, blocks;
};
Rounds rounds_of(const Launch& on, int64_t m, int64_t n, const Cut& cut) {
  const int64_t rows = cut.groups * 64;
  const int64_t items = (n + rows - 1) / rows * ((m + cut.tokens - 1) / cut.tokens);
  const int64_t clusters = on.clusters_of(cut.splits), blocks = clusters * cut.splits;
  const int64_t left = cut.splits > 1 ? items % blocks : 0;
  if (left == 0 || left > clusters) return {items, 0, std::min(items, blocks)};
  return {items - left, left, items > left ? blocks : left * cut.splits};
}

template <typename T, typename S, bool kNested>
cudaError_t launch(const Launch& on, const Product4<T>& product, Cut cut) {
  Gemm4<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.row_groups = static_cast<int>((product.w.n + S::kRows - 1) / S::kRows);
  p.token_tiles = (p.m + S::kTokens - 1) / S::kTokens;
  p.band = std::min(p.token_tiles, 1024 / S::kTokens);
  const int last_tokens = (p.m - (p.token_tiles - 1) * S::kTokens + 7) / 8 * 8;
  p.last_bytes = last_tokens * 128;
  const Rounds rounds = rounds_of(on, product.m, product.w.n, cut);
  if (rounds.divided == 0) cut.splits = 1;
  p.whole = static_cast<int>(rounds.whole);
  p.items = static_cast<int>(rounds.whole + rounds.divided);
  p.rounds = rounds.divided ? static_cast<int>(rounds.whole / rounds.blocks) : -1;
  p.splits = cut.splits;
  p.part = ((p.tiles + p.splits - 1) / p.splits + 1) / 2 * 2;
  p.box = S::kTokens / p.splits;
  p.whole_lines = p.engine = is_aligned(product.out.y, 16) && is_aligned(product.out.residual, 16);
  Maps maps = {};
  const DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  const Absmax& absmax = p.w.absmax;
  const void* scales = kNested ? static_cast<const void*>(absmax.codes) : absmax.plain;
  constexpr int kTileWords = kNested ? 4 : 16, kRowTiles = S::kRows / kTileRows;
  const int64_t row_tiles = p.w.n / kTileRows;
  cudaError_t error = describe_tiles(&maps.x, dtype, product.x, product.m, product.w.k, S::kTokens);
  if (error == cudaSuccess)
    error = describe_tiles(&maps.last_x, dtype, product.x, product.m, product.w.k, last_tokens);
  if (error == cudaSuccess)
    error = describe_words(&maps.codes, p.w.codes, row_tiles, p.tiles * int64_t{128}, kRowTiles, 128);
  if (error == cudaSuccess)
    error =
        describe_words(&maps.absmax, scales, row_tiles, p.tiles * int64_t{kTileWords}, kRowTiles, kTileWords);
  if (error == cudaSuccess && p.engine)
    error = describe_tiles(&maps.y, dtype, product.out.y, product.m, product.out.n, p.box);
  if (error == cudaSuccess && p.engine && product.out.residual)
    error = describe_tiles(&maps.residual, dtype, product.out.residual, product.m, product.out.n, p.box);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(rounds.blocks));
  shape.block = dim3(S::kThreads);
  shape.shared = S::kBytes;
  shape.cluster = static_cast<unsigned>(cut.splits);
  return launch_kernel(on, shape, gemm4_kernel<T, S, kNested>, p, maps);
}

/// Clocks of a step, and of the end of an item, as measured: the product of 256 tokens is bound by the tensor
/// cores, those of 128 by what else their warps issue, a warpgroup alone by the arrival of x.
struct Cost {
  int tokens, groups;
  double step, end;
};
constexpr Cost kCosts[] = {{256, 2, 1033, 1100}, {128, 3, 842, 900}, {128, 2, 582, 900}, {128, 1, 420, 900}};
constexpr double kSent = 11.0;  // bytes a clock between blocks of a cluster

/// The cut that should end first.
Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k) {
  Cut best = {256, 2, 1};
  double least = 0.0;
  const int64_t steps = k / kTileK;
  for (const Cost& cost : kCosts) {
    for (const int splits : {1, 2, 4, 8}) {
      if (on.clusters_of(splits) == 0 || (cost.tokens == 256 && splits > 2)) continue;
      const Cut cut = {cost.tokens, cost.groups, splits};
      const Rounds rounds = rounds_of(on, m, n, cut);
      if (splits > 1 && rounds.divided == 0) continue;
      const int64_t whole = (rounds.whole + rounds.blocks - 1) / rounds.blocks;
      double clocks = whole * (steps * cost.step + cost.end);
      if (rounds.divided > 0) {
        const int sent = (splits - 1) * (cost.tokens / splits) * cost.groups * 64 * 4;
        clocks += (steps + splits - 1) / splits * cost.step + cost.end + sent / kSent;
      }
      if (least != 0.0 && clocks >= least) continue;
      least = clocks;
      best = cut;
    }
  }
  return best;
}

template <typename T, typename S>
cudaError_t launch(const Launch& on, const Product4<T>& product, const Cut& cut) {
  return product.w.absmax.plain ? launch<T, S, false>(on, product, cut)
                                : launch<T, S, true>(on, product, cut);
}
template <typename T>
cudaError_t launch(const Launch& on, const Product4<T>& product, const Cut& cut) {
  if (cut.tokens == 256) return launch<T, Shape<256, 2>>(on, product, cut);
  if (cut.groups == 3) return launch<T, Shape<128, 3>>(on, product, cut);
  if (cut.groups == 2) return launch<T, Shape<128, 2>>(on, product, cut);
  return launch<T, Shape<128, 1>>(on, product, cut);
}

}  // namespace

template <typename T>
cudaError_t gemm4_sm90(const Launch& on, const Product4<T>& product) {
  const Absmax& absmax = product.w.absmax;
  const void* scales = absmax.plain ? static_cast<const void*>(absmax.plain) : absmax.codes;
  if (!is_aligned(scales, 16)) return skinny4_sm90(on, product, nullptr);  // the copy engine cannot read it
  return launch(on, product, cut_of(on, product.m, product.w.n, product.w.k));
}

template cudaError_t gemm4_sm90(const Launch&, const Product4<half_t>&);
template cudaError_t gemm4_sm90(const Launch&, const Product4<bf16_t>&);

}  // namespace halfbyte::cuda
