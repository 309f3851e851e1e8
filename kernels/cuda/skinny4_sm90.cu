// y = x w^T + bias + residual with a tiled 4-bit weight and 5 to 128 rows of 16-bit x, on sm_90a: the weight
// is the A operand of wgmma, decoded on the way from memory into registers; x is B, from shared memory.
//
// An item is 128 rows of the weight times up to 64 tokens: a block of four warpgroups, two with 64 rows each
// and the other two at the same rows and other k. A step is 2 k tiles of a warpgroup. The steps of all items
// follow each other in one line, of which every block takes as many: an item that lies in several blocks is
// summed up by the last of them to come, so that every multiprocessor has as much work whatever N is.
//
//   codes   2 x 16 bytes a lane, straight into registers, two steps ahead, on into the next item
//   x       [tokens][64 k] a tile by the copy engine into a ring, swizzled as wgmma wants it; where all of a
//           block's part of x fits into the ring it is loaded once
//   decode  a byte permute makes an address, a look-up makes two weights (table4.cuh)
//   scale   up to 16 tokens absmax times the sums of a tile, in fp32; more: times the weights, a rounding
//           more, which lets the product of a tile run while the next one is decoded
//   reduce  warpgroups through shared memory, blocks through the workspace, both in a fixed order
//
// Bound by memory and decoding. More than 64 tokens are several items for the same rows, which decode the
// weight again: right where N is too small for gemm4_sm90.cu to fill the chip.
#include <algorithm>

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
constexpr int kUnit = 2;                // steps at a time
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
  float* partial;        // [blocks][2][kTokens][kRows]: a block's part of the items it shares with others
  uint32_t* arrivals;    // of the blocks that share an item, at the first of them
  int64_t total, share;  // steps of all items, of a block
  int m, tiles, steps;   // steps of an item
  int token_blocks;
  int stages;     // of the ring
  bool resident;  // x stays in it
  bool wide;      // y takes 4 elements at a time
};

#if HALFBYTE_WGMMA

constexpr int kGroup = kThreads / kDepth;  // threads that share a part of k

/// Where a lane reads of one row tile.
struct Lane {
  const uint8_t* codes;  // its 16 bytes of the first tile
  const char* absmax;    // plain: the pair of the first tile; nested: its byte of the first tile
  int64_t block;         // nested: number of that absmax in the flat order
};

/// What a lane holds of a step: its 16 bytes of each tile, and of the absmax of rows g and g + 8 both, or one
/// when they are nested: the four lanes of a row decode one each, of row g + 8 (t / 2) in tile t % 2.
template <bool kNested>
struct Step {
  uint4 codes[kPair];
  float2 scale[kNested ? 1 : kPair];  // nested: x = the nested absmax
  uint32_t code;                      // nested: its byte

  __device__ __forceinline__ void fetch(const Lane& at, const float* nested, int tile, int tiles, int t) {
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
      const int kt = min(tile + p, tiles - 1);
      codes[p] = __ldcs(reinterpret_cast<const uint4*>(at.codes + kt * 512));
      if (!kNested) scale[p] = *reinterpret_cast<const float2*>(at.absmax + kt * 64);
    }
    if (kNested) {
      const int kt = min(tile + t % kPair, tiles - 1);
      code = *reinterpret_cast<const uint8_t*>(at.absmax + kt * 16);
      scale[0].x = nested[(at.block + kt) / kNestedBlocksize];
    }
  }
  __device__ __forceinline__ void decode_absmax(const char* table, float offset, uint32_t lane4) {
    if (kNested) scale[0].x = nested_value(map_value(table, code, lane4), scale[0].x, offset);
  }
  /// After decode_absmax, of tile p.
  __device__ __forceinline__ float2 absmax(int p, int t) const {
    if (!kNested) return scale[p];
    return make_float2(__shfl_sync(0xffffffffu, scale[0].x, p, 4),
                       __shfl_sync(0xffffffffu, scale[0].x, p + 2, 4));
  }
};

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

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
  // steps of the weight that are on their way to the registers or into L2; with 64 tokens the products leave
  // the memory time enough
  constexpr int kAhead = kTokens == 64 ? kUnit : 2 * kUnit;
  extern __shared__ __align__(1024) char table[];
  float* const sums = reinterpret_cast<float*>(table + kTable4Bytes);  // [kTokens][kSumStride]
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const int depth = warp / (16 / kDepth), in_depth = threadIdx.x % kGroup;
  const int row_warp = warp % (16 / kDepth);  // the row tile of the item
  const uint32_t lane4 = lane * 4;
  const int stages = p.stages, ring_bytes = stages * kStage;
  const uint32_t ring = shared_address(table) + S::kFixed + depth * ring_bytes;
  // of each stage: x is there; all warps of the group have read it
  const uint32_t full = shared_address(table) + kTable4Bytes + S::kSumBytes + depth * (kMostStages * 16);
  const uint32_t empty = full + kMostStages * 8;
  let_next_start();

  const int64_t first_step = blockIdx.x * p.share;
  const int mine = static_cast<int>(min(p.share, p.total - first_step));
  const int64_t last_row_tile = p.w.n / kTileRows - 1;

  // a place in the line of steps; moved without divisions
  struct Cursor {
    int64_t rows;         // first row tile of the item
    int tokens, i, left;  // token block, step of the item, steps left in all
  };
  const auto advance = [&](Cursor& c) {
    --c.left;
    if (++c.i < p.steps) return;
    c.i = 0;
    if (++c.tokens < p.token_blocks) return;
    c.tokens = 0;
    c.rows += kRows / kTileRows;
  };
  const int64_t first_item = first_step / p.steps;
  Cursor weights = {first_item / p.token_blocks * (kRows / kTileRows),
                    static_cast<int>(first_item % p.token_blocks), static_cast<int>(first_step % p.steps),
                    mine};
  Cursor inputs = weights;
  const auto lane_at = [&](int64_t rows) {
    const int64_t tile = min(rows + row_warp, last_row_tile) * p.tiles;
    Lane at = {};
    at.codes = p.w.codes + tile * 512 + lane * 16;
    if (kNested) {
      at.absmax = reinterpret_cast<const char*>(p.w.absmax.codes + tile * 16 + 2 * g + t / 2);
      at.block = tile * kTileRows + static_cast<int64_t>(g + t / 2 * 8) * p.tiles;
    } else {
      at.absmax = reinterpret_cast<const char*>(p.w.absmax.plain + tile * 16 + 2 * g);
    }
    return at;
  };
  Lane at = lane_at(weights.rows);
  // two steps, each fetched again as soon as it is decoded
  Step<kNested> buffers[2];
  const auto fetch = [&](Step<kNested>& step) {
    step.fetch(at, p.w.absmax.nested, (weights.i * kDepth + depth) * kPair, p.tiles, t);
    advance(weights);
    if (weights.i == 0) at = lane_at(weights.rows);
  };
  // the unit `ahead` steps behind the next: one lane of the two warps asks for the codes of their row tile,
  // one for its absmax
  const auto fetch_ahead = [&](int ahead) {
    if (lane != 0 || ahead >= weights.left) return;
    int64_t tile = min(weights.rows + row_warp, last_row_tile) * p.tiles;
    int kt = (weights.i + ahead) * (kDepth * kPair);
    if (weights.i + ahead >= p.steps) {
      if (p.steps <= kAhead || weights.rows + kRows / kTileRows + row_warp > last_row_tile) return;
      tile += int64_t{kRows / kTileRows} * p.tiles;
      kt -= p.steps * (kDepth * kPair);
    }
    const int tiles = min(kUnit * kDepth * kPair, p.tiles - kt);
    if (depth == 0)
      bring_near(p.w.codes + (tile + kt) * 512, tiles * 512);
    else if (kNested)
      bring_near(p.w.absmax.codes + (tile + kt) * 16, tiles * 16);
    else
      bring_near(p.w.absmax.plain + (tile + kt) * 16, tiles * 64);
  };
#pragma unroll
  for (int i = kUnit; i < kAhead; i += kUnit) fetch_ahead(i);
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
    const int tile = (inputs.i * kDepth + depth) * kPair, row = inputs.tokens * kTokens;
    arrive_expecting(full + stage * 8, kStage);
#pragma unroll
    for (int q = 0; q < kPair; ++q) {
      fetch_tile(ring + stage * kStage + q * (kTokens * 128), x_tiles, row,
                 (tile + q) * static_cast<int>(kTileK), full + stage * 8);  // beyond the end of x: zeros
    }
    advance(inputs);
  };
  if (fetches) {
    for (int i = 0; i < (p.resident ? stages : stages - 1); ++i) fetch_x(i);
  }

  int stage = 0, last_stage = -1;        // of this step and the one before
  uint32_t parity = 0, last_parity = 0;  // of the round through the ring
  for (int done = 0, steps; done < mine; done += steps) {
    const int begin = static_cast<int>((first_step + done) % p.steps);  // in the item
    steps = min(p.steps - begin, mine - done);
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
      if (q == 0) step.decode_absmax(table, offset, lane4);
      scale[q] = step.absmax(q, t);
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
          if (fetches) fetch_x(stages - 1);
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
    for (int i = 0; i < steps; i += kUnit) {
      if (kAhead > kUnit) fetch_ahead(kAhead - kUnit);
      multiply_step(buffers[0]);
      multiply_step(buffers[1]);
    }
    if (!kExact) {
      wait_group<0>();
      finish(std::integral_constant<int, kPair - 1>{});
      hold_registers(acc);
    }

    const int64_t item = (first_step + done) / p.steps, item_begin = item * p.steps;
    const int64_t first_row = item / p.token_blocks * kRows;
    const int64_t first_token = item % p.token_blocks * kTokens;
    const int rows = static_cast<int>(min(int64_t{kRows}, p.w.n - first_row));
    const int tokens = static_cast<int>(min(int64_t{kTokens}, p.m - first_token));
    constexpr int kAllPieces = kTokens * kRows / 4;                  // of 4 rows
    constexpr int kPieces = (kAllPieces + kThreads - 1) / kThreads;  // of a thread
    const bool has_pieces = kAllPieces >= kThreads || threadIdx.x < kAllPieces;
    const auto piece_of = [](auto* data, int stride, int j) {
      const int i = (threadIdx.x + j * kThreads) * 4;
      using Float4 =
          std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const float4, float4>;
      return reinterpret_cast<Float4*>(data + i / kRows * stride + i % kRows);
    };
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
    __syncthreads();
    bool ends = true;           // this block writes y
    int64_t from = 0, to = -1;  // the blocks whose parts are in the workspace
    if (steps < p.steps) {
      // each of the item's blocks puts its part down; the last to come finds them all
      from = item_begin / p.share;
      to = (item_begin + p.steps - 1) / p.share;
      float* own = p.partial + (2 * int64_t{blockIdx.x} + (done > 0)) * (kTokens * kRows);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (has_pieces) *piece_of(own, kRows, j) = *piece_of(sums, kSumStride, j);
      }
      __syncthreads();
      float& last = sums[kRows];  // a place that no token uses
      if (threadIdx.x == 0)
        last = count_arrival(p.arrivals + from, static_cast<uint32_t>(to - from + 1)) ? 1.0f : 0.0f;
      __syncthreads();
      ends = last != 0.0f;
    }
    if (ends && has_pieces) {
      float4 total[kPieces] = {};
      if (to < from) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) total[j] = *piece_of(sums, kSumStride, j);
      }
#pragma unroll 2
      for (int64_t b = from; b <= to; ++b) {
        const bool second = b * p.share < item_begin;  // it began with another item
        const float* there = p.partial + (2 * b + second) * (kTokens * kRows);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) total[j] = sum_of(total[j], __ldcg(piece_of(there, kRows, j)));
      }
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int i = (threadIdx.x + j * kThreads) * 4, row = i % kRows, token = i / kRows;
        if (token < tokens && row < rows)
          p.out.store4(first_token + token, first_row + row, total[j], p.wide);
      }
    }
    __syncthreads();
  }
#endif
}

/// How the line of steps is cut.
struct Cut {
  int steps;             // of an item
  int64_t total, share;  // of all items; of a block, whole units

  int64_t blocks() const { return (total + share - 1) / share; }
};

Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k, int tokens) {
  constexpr int64_t kUnitTiles = kUnit * kDepth * kPair;
  constexpr double kWholeCost = 1.0, kPartCost = 2.25;  // the end of an item, in steps, as measured
  const int64_t units = (k / kTileK + kUnitTiles - 1) / kUnitTiles;
  const int64_t all = (n + kRows - 1) / kRows * ((m + tokens - 1) / tokens) * units;
  const int64_t least = (all + on.multiprocessors - 1) / on.multiprocessors;
  // as few units as every multiprocessor must take, or a few more where items are then cut less often
  int64_t share = least;
  double best = 0.0;
  for (int64_t candidate = least; candidate < least + units; ++candidate) {
    const bool whole = candidate % units == 0, one = units % candidate == 0;
    const int64_t parts = whole ? 0 : one ? 1 : 2, wholes = candidate / units;
    const double cost = candidate * kUnit + parts * kPartCost + wholes * kWholeCost;
    if (best != 0.0 && cost >= best) continue;
    best = cost;
    share = candidate;
  }
  return {static_cast<int>(units) * kUnit, all * kUnit, share * kUnit};
}

int tokens_of(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }

template <typename T, int kTokens, bool kNested>
cudaError_t launch(const Launch& on, const Product4<T>& product, void* workspace) {
  Skinny<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.x = product.x;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.token_blocks = (p.m + kTokens - 1) / kTokens;
  using S = Shape<kTokens>;
  const Cut cut = cut_of(on, product.m, product.w.n, product.w.k, kTokens);
  p.steps = cut.steps;
  p.total = cut.total;
  // without a workspace items stay whole
  p.share = workspace ? cut.share : (cut.share + cut.steps - 1) / cut.steps * cut.steps;
  p.partial = static_cast<float*>(workspace);
  p.arrivals = on.arrivals;
  // a block that has more than the steps of an item meets the same x again
  const int64_t distinct = std::min<int64_t>(p.share, p.steps);
  const int room = std::min(on.shared - 1024, 227 << 10) - S::kFixed;
  p.resident = (p.token_blocks == 1 || p.share <= p.steps) && distinct <= kMostStages &&
               distinct * kDepth * S::kStage <= room;
  p.wide = is_aligned(p.out.y, 4 * sizeof(T));
  p.stages = p.resident ? static_cast<int>(distinct) : kStages;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.total + p.share - 1) / p.share));
  shape.block = dim3(kThreads);
  shape.shared = static_cast<size_t>(S::kFixed + p.stages * kDepth * S::kStage);
  CUtensorMap x_tiles;
  constexpr DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  const cudaError_t error = describe_tiles(&x_tiles, dtype, p.x, p.m, product.w.k, kTokens);
  if (error != cudaSuccess) return error;
  return launch_kernel(on, shape, skinny_kernel<T, kTokens, kNested>, p, x_tiles);
}

template <typename T, int kTokens>
cudaError_t launch(const Launch& on, const Product4<T>& product, void* workspace) {
  return product.w.absmax.plain ? launch<T, kTokens, false>(on, product, workspace)
                                : launch<T, kTokens, true>(on, product, workspace);
}

}  // namespace

size_t skinny4_sm90_workspace(const Launch& on, int64_t m, int64_t n, int64_t k) {
  const int tokens = tokens_of(m);
  const Cut cut = cut_of(on, m, n, k, tokens);
  if (cut.share % cut.steps == 0) return 0;
  return static_cast<size_t>(cut.blocks()) * 2 * tokens * kRows * sizeof(float);
}

template <typename T>
cudaError_t skinny4_sm90(const Launch& on, const Product4<T>& product, void* workspace) {
  switch (tokens_of(product.m)) {
    case 8:
      return launch<T, 8>(on, product, workspace);
    case 16:
      return launch<T, 16>(on, product, workspace);
    case 32:
      return launch<T, 32>(on, product, workspace);
    default:
      return launch<T, 64>(on, product, workspace);
  }
}

template cudaError_t skinny4_sm90(const Launch&, const Product4<half_t>&, void*);
template cudaError_t skinny4_sm90(const Launch&, const Product4<bf16_t>&, void*);

}  // namespace halfbyte::cuda
