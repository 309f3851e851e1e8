// y = x w^T + bias + residual with a tiled 4-bit weight and 9 to 128 rows of 16-bit x, on sm_90a: the weight
// is the A operand of wgmma, decoded on the way from memory into registers; x is B, from shared memory.
//
// A block of four warpgroups makes an item: 128 rows of the weight times up to 64 tokens, two warpgroups with
// 64 rows each and the other two at the same rows and other k. The blocks of a cluster divide K further, so
// that every multiprocessor has work whatever N is. A step is 2 k tiles of a warpgroup:
//
//   codes   2 x 16 bytes a lane, straight into registers, two steps ahead, on into the next item
//   x       [tokens][64 k] a tile by the copy engine into a ring, swizzled as wgmma wants it; where all of a
//           block's part of x fits into the ring it is loaded once
//   decode  a byte permute makes an address, a look-up makes two weights (table4.cuh)
//   scale   up to 16 tokens absmax times the sums of a tile, in fp32; more: times the weights, a rounding
//           more, which lets the product of a tile run while the next one is decoded
//   reduce  warpgroups and blocks of the cluster through shared memory, in a fixed order
//
// Bound by memory and decoding. More than 64 tokens are several items for the same rows, which decode the
// weight again: right where N is too small for gemm4_sm90.cu to fill the chip.
#include <algorithm>

#include "cluster.cuh"
#include "launch.cuh"
#include "table4.cuh"
#include "tma_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 512, kPair = 2;  // kPair: tiles of a step
constexpr int kMostStages = 32;           // of the ring, where x stays

constexpr int kDepth = 2, kRows = 128;  // groups of warps along k; rows of an item
constexpr int kStages = 4;              // of the ring, where x passes through it
constexpr int kSumStride = kRows + 4;   // floats between tokens of the sums

/// Shared memory behind the table: sums, barriers, then a ring for each of the kDepth groups.
template <int kTokens>
struct Shape {
  static constexpr int kSumBytes = (kTokens * kSumStride * 4 + 1023) / 1024 * 1024;
  static constexpr int kFixed = kTable4Bytes + kSumBytes + 1024;  // the last for barriers
  static constexpr int kStage = kPair * kTokens * 128;
};

template <typename T>
struct Skinny {
  Tiled4 w;
  Output<T> out;
  const T* x;
  Book4 book;
  int64_t each, rest;  // items of a cluster; the first `rest` clusters have one more
  int m, tiles;
  int share, steps;  // k tiles of a block; steps of a warpgroup in them, an even number
  int token_blocks;
  bool resident;  // x stays in the ring
};

#if HALFBYTE_WGMMA

constexpr int kGroup = kThreads / kDepth;  // threads that share a part of k

/// Where a lane reads of one row tile.
struct Lane {
  const uint8_t* codes;  // its 16 bytes of the first tile
  const char* absmax;    // the pair of the first tile
  const float* nested;
  int64_t block;  // number of the absmax of its row g, in the flat order
};

/// What a lane holds of a step: its 16 bytes of each tile, the absmax of rows g and g + 8.
template <bool kNested>
struct Step {
  uint4 codes[kPair];
  float2 scale[kPair];   // nested: their nested absmax
  uint32_t code[kPair];  // nested: two bytes

  __device__ __forceinline__ void fetch(const Lane& at, int tile, int tiles) {
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
      const int kt = min(tile + p, tiles - 1);
      codes[p] = __ldcs(reinterpret_cast<const uint4*>(at.codes + kt * 512));
      if (kNested) {
        code[p] = *reinterpret_cast<const uint16_t*>(at.absmax + kt * 16);
        const int64_t block = at.block + kt;
        scale[p].x = at.nested[block / kNestedBlocksize];
        scale[p].y = at.nested[(block + int64_t{8} * tiles) / kNestedBlocksize];
      } else {
        scale[p] = *reinterpret_cast<const float2*>(at.absmax + kt * 64);
      }
    }
  }
  __device__ __forceinline__ float2 absmax(int p, const char* table, float offset, uint32_t lane4) const {
    return kNested ? nested_pair(table, code[p], scale[p], offset, lane4) : scale[p];
  }
};

#endif  // HALFBYTE_WGMMA

template <typename T, int kTokens, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    skinny_kernel(const __grid_constant__ Skinny<T> p, const __grid_constant__ CUtensorMap x_tiles) {
#if HALFBYTE_WGMMA
  using S = Shape<kTokens>;
  constexpr int kStage = S::kStage;
  static_assert(kPair == 2 && kDepth == 2 && kStages >= 3);
  constexpr bool kExact = kTokens <= 16;
  constexpr int kSums = kTokens / 2;
  extern __shared__ __align__(1024) char table[];
  float* const sums = reinterpret_cast<float*>(table + kTable4Bytes);  // [kTokens][kSumStride]
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const int depth = warp / (16 / kDepth), in_depth = threadIdx.x % kGroup;
  const int row_warp = warp % (16 / kDepth);  // the row tile of the item
  const uint32_t lane4 = lane * 4;
  const int stages = p.resident ? p.steps : kStages, ring_bytes = stages * kStage;
  const uint32_t ring = shared_address(table) + S::kFixed + depth * ring_bytes;
  // of each stage: x is there; all warps of the group have read it
  const uint32_t full = shared_address(table) + kTable4Bytes + S::kSumBytes + depth * (kMostStages * 16);
  const uint32_t empty = full + kMostStages * 8;
  let_next_start();

  const int splits = cluster_size(), rank = cluster_rank();
  const int64_t cluster = blockIdx.x / splits;
  const int64_t first_item = cluster * p.each + min(cluster, p.rest);
  const int64_t items = p.each + (cluster < p.rest ? 1 : 0);
  const int first_tile = rank * p.share + depth * kPair;
  const int end_tile = min((rank + 1) * p.share, p.tiles);
  const int64_t last_row_tile = p.w.n / kTileRows - 1;

  // the step that is fetched next, for weights and for x; stepped without divisions
  struct Cursor {
    int64_t rows;         // first row tile of the item
    int tokens, i, left;  // token block, step, items left
  };
  const auto advance = [&](Cursor& c) {
    if (++c.i < p.steps) return;
    c.i = 0;
    --c.left;
    if (++c.tokens < p.token_blocks) return;
    c.tokens = 0;
    c.rows += kRows / kTileRows;
  };
  Cursor weights = {first_item / p.token_blocks * (kRows / kTileRows),
                    static_cast<int>(first_item % p.token_blocks), 0, static_cast<int>(items)};
  Cursor inputs = weights, here_now = weights;
  const auto lane_at = [&](int64_t rows) {
    const int64_t tile = min(rows + row_warp, last_row_tile) * p.tiles;
    Lane at;
    at.codes = p.w.codes + tile * 512 + lane * 16;
    at.absmax = kNested ? reinterpret_cast<const char*>(p.w.absmax.codes + tile * 16 + 2 * g)
                        : reinterpret_cast<const char*>(p.w.absmax.plain + tile * 16 + 2 * g);
    at.nested = p.w.absmax.nested;
    at.block = tile * kTileRows + static_cast<int64_t>(g) * p.tiles;
    return at;
  };
  Lane at = lane_at(weights.rows);
  // two steps, each fetched again as soon as it is decoded
  Step<kNested> buffers[2];
  const auto fetch = [&](Step<kNested>& step) {
    step.fetch(at, first_tile + weights.i * kDepth * kPair, p.tiles);
    advance(weights);
    if (weights.i == 0) at = lane_at(weights.rows);
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) fetch(buffers[i]);
  fill_table4(table, p.book, kNested ? p.w.absmax.nested_code : nullptr);
  const float offset = kNested ? *p.w.absmax.offset : 0.0f;
  const bool fetches = in_depth == 0;  // the thread that asks for x
  if (fetches) {
    for (int i = 0; i < stages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, kGroup / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_results();

  const auto fetch_x = [&](int stage) {  // 2 tiles of all tokens of the item at `inputs`
    if (inputs.left <= 0) return;
    const int tile = first_tile + inputs.i * kDepth * kPair, row = inputs.tokens * kTokens;
    arrive_expecting(full + stage * 8, kStage);
#pragma unroll
    for (int q = 0; q < kPair; ++q) {
      const int kt = tile + q < end_tile ? tile + q : p.tiles;  // beyond the end of x: zeros
      fetch_tile(ring + stage * kStage + q * (kTokens * 128), x_tiles, row, kt * static_cast<int>(kTileK),
                 full + stage * 8);
    }
    advance(inputs);
  };
  if (fetches) {
    for (int i = 0; i < (p.resident ? p.steps : kStages - 1); ++i) fetch_x(i);
  }

  int stage = 0, last_stage = -1;        // of this step and the one before
  uint32_t parity = 0, last_parity = 0;  // of the round through the ring
  for (int64_t item = 0; item < items; ++item) {
    float acc[kSums], part[kPair][kExact ? kSums : 1];
    uint32_t a[kPair][4][4] = {};
    float2 scale[kPair] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0.0f;
    // the product of tile q of a step is done: its registers are ours again
    const auto finish = [&](auto number) __attribute__((always_inline)) {
      constexpr int q = decltype(number)::value;
      hold_registers(a[q]);
      if constexpr (kExact) {
        hold_registers(part[q]);
#pragma unroll
        for (int e = 0; e < kSums; ++e)
          acc[e] = fmaf(part[q][e], e % 4 < 2 ? scale[q].x : scale[q].y, acc[e]);
      }
    };
    // Tile after tile: decode, start the product, then finish that of the tile before, which has run
    // meanwhile. Beyond 16 tokens that goes on from step to step.
    const auto multiply_tile = [&](Step<kNested> & step, auto number) __attribute__((always_inline)) {
      constexpr int q = decltype(number)::value;
      const uint4 c = step.codes[q];
      const uint32_t words[4] = {c.x, c.y, c.z, c.w};
      scale[q] = step.absmax(q, table, offset, lane4);
#pragma unroll
      for (int j = 0; j < 4; ++j) look_up(a[q][j], table, words[j], lane4);
      if (q == kPair - 1) fetch(step);
      if (!kExact) {
        const uint32_t low = pair_of<T>(scale[q].x, scale[q].x), high = pair_of<T>(scale[q].y, scale[q].y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[q][j][r] = scale_pair(a[q][j][r], r % 2 ? high : low, T{});
        }
      }
      const uint64_t x_tile = describe_b(ring + stage * kStage + q * (kTokens * 128), 0);
      begin_group();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t x_step = x_tile + ((j * 32) >> 4);
        if constexpr (kExact)
          multiply_group(part[q], a[q][j], x_step, j > 0, T{});
        else
          multiply_group(acc, a[q][j], x_step, true, T{});
      }
      commit_group();
      if constexpr (!kExact || q == 1) {  // sums of their own must not be under way at the end of a step
        wait_group<1>();
        finish(std::integral_constant<int, 1 - q>{});
      }
      if constexpr (kExact && q == 1) {
        wait_group<0>();
        finish(std::integral_constant<int, 1>{});
      }
    };
    const auto multiply_step = [&](Step<kNested> & step) __attribute__((always_inline)) {
      wait_barrier(full + stage * 8, parity);
      multiply_tile(step, std::integral_constant<int, 0>{});
      if (!p.resident) {
        if (last_stage < 0) {
          if (fetches) fetch_x(kStages - 1);
        } else {  // the products of the step before are done: its place in the ring is free
          if (lane == 0) arrive(empty + last_stage * 8);
          if (fetches) {
            wait_barrier(empty + last_stage * 8, last_parity);
            fetch_x(last_stage);
          }
        }
        __syncwarp();
        last_stage = stage;
        last_parity = parity;
      }
      multiply_tile(step, std::integral_constant<int, 1>{});
      if (++stage == stages) {
        stage = 0;
        parity ^= p.resident ? 0 : 1;
      }
    };
    for (int i = 0; i < p.steps; i += 2) {
      multiply_step(buffers[0]);
      multiply_step(buffers[1]);
    }
    if (!kExact) {
      wait_group<0>();
      finish(std::integral_constant<int, kPair - 1>{});
      hold_registers(acc);
    }

    const int64_t first_row = here_now.rows * kTileRows, first_token = here_now.tokens * int64_t{kTokens};
    const int rows = static_cast<int>(min(int64_t{kRows}, p.w.n - first_row));
    const int tokens = static_cast<int>(min(int64_t{kTokens}, p.m - first_token));
    // the second group of warps hands its sums to the first
#pragma unroll
    for (int turn = 1; turn >= 0; --turn) {
      if (depth == turn) {
#pragma unroll
        for (int e = 0; e < kSums; ++e) {
          const int row = row_warp * kTileRows + g + e % 4 / 2 * 8, token = e / 4 * 8 + 2 * t + e % 2;
          float& sum = sums[token * kSumStride + row];
          sum = turn == 1 ? acc[e] : sum + acc[e];
        }
      }
      if (turn == 1) __syncthreads();
    }
    const auto together = [&] {
      if (splits > 1)
        cluster_barrier();
      else
        __syncthreads();
    };
    together();
    for (int i = threadIdx.x + rank * kThreads; i < tokens * kRows; i += splits * kThreads) {
      const int row = i % kRows, token = i / kRows;
      if (row >= rows) continue;
      const float* own = sums + token * kSumStride + row;
      float total = 0.0f;
      for (int r = 0; r < splits; ++r) total += splits > 1 ? cluster_value(own, r) : *own;
      p.out.store(first_token + token, first_row + row, total);
    }
    together();
    here_now.i = p.steps - 1;
    advance(here_now);
  }
#endif
}

template <typename T, int kTokens, bool kNested>
cudaError_t launch(const Launch& on, const Product4<T>& product) {
  Skinny<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.x = product.x;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.token_blocks = (p.m + kTokens - 1) / kTokens;
  using S = Shape<kTokens>;
  const int64_t items = (product.w.n + kRows - 1) / kRows * p.token_blocks;
  // the cluster size that ends first; what an item costs besides its steps is counted in steps, as measured
  const auto steps_of = [&](int blocks) {
    const int share = (p.tiles + blocks - 1) / blocks;
    return (share + 2 * kDepth * kPair - 1) / (2 * kDepth * kPair) * 2;
  };
  int splits = 1;
  double least = 0.0;
  for (const int candidate : {1, 2, 4, 8}) {
    const int64_t clusters = on.clusters_of(candidate);
    if (clusters == 0) continue;
    const int64_t rounds = (items + clusters - 1) / clusters;
    const int64_t steps = steps_of(candidate);
    const double cost = static_cast<double>(rounds) * (steps + (candidate > 1 ? 2.5 : 1.0)) + 3.0;
    if (least != 0.0 && cost >= least) continue;
    least = cost;
    splits = candidate;
  }
  const int64_t clusters = std::min<int64_t>(items, on.clusters_of(splits));
  p.each = items / clusters;
  p.rest = items % clusters;
  p.share = (p.tiles + splits - 1) / splits;
  p.steps = steps_of(splits);
  const int room = std::min(on.shared - 1024, 227 << 10) - S::kFixed;
  p.resident = p.token_blocks == 1 && p.steps <= kMostStages && p.steps * kDepth * S::kStage <= room;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(clusters * splits));
  shape.block = dim3(kThreads);
  shape.shared = static_cast<size_t>(S::kFixed + (p.resident ? p.steps : kStages) * kDepth * S::kStage);
  shape.cluster = static_cast<unsigned>(splits);
  CUtensorMap x_tiles;
  constexpr DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  const cudaError_t error = describe_tiles(&x_tiles, dtype, p.x, p.m, product.w.k, kTokens);
  if (error != cudaSuccess) return error;
  return launch_kernel(on, shape, skinny_kernel<T, kTokens, kNested>, p, x_tiles);
}

template <typename T, int kTokens>
cudaError_t launch(const Launch& on, const Product4<T>& product) {
  return product.w.absmax.plain ? launch<T, kTokens, false>(on, product)
                                : launch<T, kTokens, true>(on, product);
}

}  // namespace

template <typename T>
cudaError_t skinny4_sm90(const Launch& on, const Product4<T>& product) {
  if (product.m <= 16) return launch<T, 16>(on, product);
  if (product.m <= 32) return launch<T, 32>(on, product);
  return launch<T, 64>(on, product);
}

template cudaError_t skinny4_sm90(const Launch&, const Product4<half_t>&);
template cudaError_t skinny4_sm90(const Launch&, const Product4<bf16_t>&);

}  // namespace halfbyte::cuda
