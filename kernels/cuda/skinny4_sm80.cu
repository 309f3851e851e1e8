// y = x w^T + bias + residual with a tiled 4-bit weight and 9 to some hundred rows of 16-bit x, by mma.sync
// (sm_80 and up): the weight is the A operand, decoded on the way from memory into registers.
//
// An item is 128 rows of the weight times up to 64 tokens; a warp has two row tiles and every kGroups-th
// share of a step of K. The steps of all items follow each other in one line, of which every block takes as
// many: an item that lies in several blocks is summed up by the last of them to come, so that every
// multiprocessor has as much work whatever N is.
//
//   codes   16 bytes a lane and tile, straight into registers, kDepth steps ahead, on into the next item
//   x       [tokens][64 k] a tile by asynchronous copies into a ring; the eight 16-byte pieces of a token are
//           exchanged by token % 8, so that neither the copies nor ldmatrix meet in a bank
//   decode  a byte permute makes an address, a look-up two weights (table4.cuh), scaled by absmax rounded to
//           their type
//   reduce  groups of warps through shared memory, blocks through the workspace, both in a fixed order
//
// More than 64 tokens are several items for the same rows, which decode the weight again: right where the
// items of gemm4_sm80.cu do not divide by the multiprocessors.
#include "gemm_sm80.cuh"
#include "launch.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 128, kWarpTiles = 2;  // rows of an item; row tiles of a warp
constexpr int kPieces = kRows / 4;          // of four rows of a token
constexpr int kSumStride = kRows + 4;       // floats between tokens of the sums

/// How a block is cut: tokens of an item, groups of four warps along K, tiles of a group in a step, steps of
/// the weight under way, stages of the ring.
template <int kTokens_, int kGroups_, int kPair_, int kDepth_, int kStages_>
struct Shape {
  static constexpr int kTokens = kTokens_, kGroups = kGroups_, kPair = kPair_, kDepth = kDepth_,
                       kStages = kStages_;
  static constexpr int kThreads = kGroups * 128, kTiles = kGroups * kPair;  // of a step
  static constexpr int kTileBytes = kTokens * 128, kStage = kTiles * kTileBytes;
  static constexpr int kSharedBytes = kTable4Bytes + kStages * kStage;
  static constexpr int kEndTokens = kTokens < 32 ? kTokens : 32;  // whose sums are in shared memory at a time
  static constexpr int kCopies = kTiles * kTokens * 8 / kThreads;
  static_assert(kTokens % 16 == 0 && kEndTokens * kSumStride * 4 <= kStages * kStage);
  static_assert(kCopies * kThreads == kTiles * kTokens * 8);
};

template <typename T>
struct Skinny {
  Tiled4 w;
  Output<T> out;
  const T* x;
  Book4 book;
  float* partial;       // [blocks][2][kTokens][kRows]: a block's part of the items it shares with others
  uint32_t* arrivals;   // of the blocks that share an item, at the first of them
  int total, share;     // steps of all items, of a block
  int m, tiles, steps;  // rows of x, k tiles, steps of an item
  int token_blocks;
};

/// Where a lane reads of one row tile.
struct TileSource {
  const uint8_t* codes;  // its 16 bytes of the first k tile
  const char* absmax;    // those of rows g and g + 8 there, or their codes
  const float* nested;
  int64_t block;  // nested: number of the first of them in the flat order
  int tiles;

  /// `row_tile` may lie beyond the end: what comes of it is not kept.
  __device__ __forceinline__ TileSource(const Tiled4& w, int64_t row_tile, int lane)
      : nested(w.absmax.nested), tiles(static_cast<int>(w.k / kTileK)) {
    const int64_t tile = min(row_tile, w.n / kTileRows - 1) * tiles;
    const int g = lane / 4;
    codes = w.codes + tile * 512 + lane * 16;
    absmax = w.absmax.plain ? reinterpret_cast<const char*>(w.absmax.plain + tile * 16 + 2 * g)
                            : reinterpret_cast<const char*>(w.absmax.codes + tile * 16 + 2 * g);
    block = tile * kTileRows + int64_t{g} * tiles;
  }
};

/// Its 16 bytes of a tile, the absmax of rows g and g + 8: themselves, or two codes and what those were
/// divided by.
template <bool kNested>
struct LaneTile {
  uint4 codes;
  float2 scale;
  uint32_t pair;

  /// The last tile where `kt` lies beyond it.
  __device__ __forceinline__ void fetch(const TileSource& from, int kt) {
    kt = min(kt, from.tiles - 1);
    codes = __ldcs(reinterpret_cast<const uint4*>(from.codes + kt * 512));
    if (kNested) {
      pair = *reinterpret_cast<const uint16_t*>(from.absmax + kt * 16);
      scale.x = from.nested[(from.block + kt) / kNestedBlocksize];
      scale.y = from.nested[(from.block + kt + int64_t{8} * from.tiles) / kNestedBlocksize];
    } else {
      scale = *reinterpret_cast<const float2*>(from.absmax + kt * 64);
    }
  }
  __device__ __forceinline__ float2 absmax(const char* table, float offset, uint32_t lane4) const {
    if (!kNested) return scale;
    return make_float2(nested_value(map_value(table, pair & 255, lane4), scale.x, offset),
                       nested_value(map_value(table, pair >> 8, lane4), scale.y, offset));
  }
  /// The A fragment of its step j of 16 k, not yet scaled.
  __device__ __forceinline__ void look_up(uint32_t (&a)[4], int j, const char* table, uint32_t lane4) const {
    halfbyte::cuda::look_up(a, table,
                            j == 0   ? codes.x
                            : j == 1 ? codes.y
                            : j == 2 ? codes.z
                                     : codes.w,
                            lane4);
  }
};

/// absmax of two rows, in both halves of a register each.
template <typename T>
struct ScalePair {
  uint32_t low, high;

  __device__ __forceinline__ void set(float2 scale) {
    low = pair_of<T>(scale.x, scale.x);
    high = pair_of<T>(scale.y, scale.y);
  }
  __device__ __forceinline__ void apply(uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = scale_pair(a[r], r % 2 ? high : low, T{});
  }
};

template <typename T, typename S, bool kNested>
__global__ void __launch_bounds__(S::kThreads, 1) skinny_kernel(const Skinny<T> p) {
  constexpr int kTokens = S::kTokens, kStages = S::kStages;
  extern __shared__ __align__(1024) char table[];
  const uint32_t ring = shared_address(table) + kTable4Bytes;
  float* const sums = reinterpret_cast<float*>(table + kTable4Bytes);  // [kEndTokens][kSumStride], over it
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int row_warp = warp % 4, group = warp / 4;
  const uint32_t lane4 = lane * 4;
  let_next_start();

  const int first_step = blockIdx.x * p.share, mine = min(p.share, p.total - first_step);
  // where the weight is fetched next: an item's first row tile, its token block, the step
  const int first_item = first_step / p.steps;
  int at_rows = first_item / p.token_blocks * (kRows / kTileRows), at_tokens = first_item % p.token_blocks,
      at_step = first_step % p.steps;
  const auto source = [&](int r) { return TileSource(p.w, at_rows + row_warp * kWarpTiles + r, lane); };
  static_assert(kWarpTiles == 2);
  TileSource at[kWarpTiles] = {source(0), source(1)};
  LaneTile<kNested> buffers[S::kDepth][S::kPair][kWarpTiles];
  const auto fetch = [&](LaneTile<kNested>(&to)[S::kPair][kWarpTiles]) __attribute__((always_inline)) {
#pragma unroll
    for (int q = 0; q < S::kPair; ++q) {
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) to[q][r].fetch(at[r], at_step * S::kTiles + group * S::kPair + q);
    }
    if (++at_step < p.steps) return;
    at_step = 0;
    if (++at_tokens == p.token_blocks) {
      at_tokens = 0;
      at_rows += kRows / kTileRows;
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) at[r] = source(r);
    }
  };
#pragma unroll
  for (int i = 0; i < S::kDepth; ++i) fetch(buffers[i]);
  fill_table4(table, p.book, kNested ? p.w.absmax.nested_code : nullptr);
  const float offset = kNested ? *p.w.absmax.offset : 0.0f;
  wait_for_results();

  // of the matrices this lane addresses: a token, half of 16 k
  const int token = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
  for (int done = 0, steps; done < mine; done += steps) {
    const int item = (first_step + done) / p.steps, item_begin = item * p.steps;
    const int begin = first_step + done - item_begin;  // in the item
    steps = min(p.steps - begin, mine - done);
    const int first_row = item / p.token_blocks * kRows, first_token = item % p.token_blocks * kTokens;

    const auto fetch_x = [&](int i) __attribute__((always_inline)) {
      if (i < steps) {
        const uint32_t stage = ring + i % kStages * S::kStage;
#pragma unroll
        for (int c = 0; c < S::kCopies; ++c) {
          const int piece = threadIdx.x + c * S::kThreads, row = piece / 8 % kTokens;
          const int kt = (begin + i) * S::kTiles + piece / (8 * kTokens);
          const bool there = kt < p.tiles && first_token + row < p.m;
          const T* from = p.x;
          if (there)
            from += static_cast<int64_t>(first_token + row) * p.w.k + int64_t{kt} * kTileK + piece % 8 * 8;
          copy_async(stage + piece / 8 * 128 + ((piece ^ row) & 7) * 16, from, there ? 16 : 0);
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch_x(s);

    float acc[kWarpTiles][kTokens / 8][4] = {};
    for (int i = 0; i < steps; i += S::kDepth) {
#pragma unroll
      for (int d = 0; d < S::kDepth; ++d) {
        wait_copies<kStages - 2>();
        __syncthreads();
        fetch_x(i + d + kStages - 1);
        LaneTile<kNested> tiles[S::kPair][kWarpTiles];
#pragma unroll
        for (int q = 0; q < S::kPair; ++q) {
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) tiles[q][r] = buffers[d][q][r];
        }
        fetch(buffers[d]);
        // 16 k at a time; the fragments of the next are made while those of the last are multiplied
        const uint32_t stage =
            ring + (i + d) % kStages * S::kStage + group * S::kPair * S::kTileBytes + token * 128;
        uint32_t a[2][kWarpTiles][4], b[2][kTokens / 16][4];
        ScalePair<T> scales[kWarpTiles];
        const auto look = [&](int slot, int part) __attribute__((always_inline)) {
          const int q = part / 4, j = part % 4;
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) tiles[q][r].look_up(a[slot][r], j, table, lane4);
#pragma unroll
          for (int n = 0; n < kTokens / 16; ++n)
            load_matrices(b[slot][n],
                          stage + q * S::kTileBytes + n * 16 * 128 + (((j * 2 + half) ^ (token & 7)) * 16));
        };
        const auto scale = [&](int slot, int part) __attribute__((always_inline)) {
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) {
            if (part % 4 == 0) scales[r].set(tiles[part / 4][r].absmax(table, offset, lane4));
            scales[r].apply(a[slot][r]);
          }
        };
        constexpr int kParts = 4 * S::kPair;
        look(0, 0);
        scale(0, 0);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (part + 1 < kParts) look((part + 1) % 2, part + 1);
#pragma unroll
          for (int n = 0; n < kTokens / 16; ++n) {
#pragma unroll
            for (int r = 0; r < kWarpTiles; ++r) {
              multiply(acc[r][n * 2], a[part % 2][r], b[part % 2][n][0], b[part % 2][n][1], T{});
              multiply(acc[r][n * 2 + 1], a[part % 2][r], b[part % 2][n][2], b[part % 2][n][3], T{});
            }
          }
          if (part + 1 < kParts) scale((part + 1) % 2, part + 1);
        }
      }
    }
    wait_copies<0>();

    // some tokens at a time: one group of warps after the other adds its sums, then all put them down
    const bool whole = steps == p.steps;
    const int row = threadIdx.x % kPieces * 4;
    const TileOutput<T> y(p.out, p.m, first_token, first_row + row, nullptr, 1.0f);
    float* const own = p.partial + (2 * int64_t{blockIdx.x} + (done > 0)) * (kTokens * kRows);
#pragma unroll
    for (int part = 0; part < kTokens / S::kEndTokens; ++part) {
      __syncthreads();
#pragma unroll
      for (int turn = 0; turn < S::kGroups; ++turn) {
        if (group == turn) {
#pragma unroll
          for (int n = 0; n < S::kEndTokens / 8; ++n) {
#pragma unroll
            for (int r = 0; r < kWarpTiles; ++r) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float& sum = sums[(n * 8 + t * 2 + e % 2) * kSumStride +
                                  (row_warp * kWarpTiles + r) * kTileRows + g + e / 2 * 8];
                const float value = acc[r][part * (S::kEndTokens / 8) + n][e];
                sum = turn == 0 ? value : sum + value;
              }
            }
          }
        }
        __syncthreads();
      }
      for (int i = threadIdx.x / kPieces; i < S::kEndTokens; i += S::kThreads / kPieces) {
        const int m = part * S::kEndTokens + i;
        const auto four = *reinterpret_cast<const Vec<float, 4>*>(sums + i * kSumStride + row);
        if (whole)
          y.put(m, four);
        else
          *reinterpret_cast<Vec<float, 4>*>(own + m * kRows + row) = four;
      }
    }
    __syncthreads();
    if (whole) continue;

    // the last block of an item to come finds the parts of all
    const int from = item_begin / p.share, to = (item_begin + p.steps - 1) / p.share;
    if (threadIdx.x == 0)
      sums[0] = count_arrival(p.arrivals + from, static_cast<uint32_t>(to - from + 1)) ? 1.0f : 0.0f;
    __syncthreads();
    const bool ends = sums[0] != 0.0f;
    __syncthreads();
    if (!ends) continue;
#pragma unroll 1
    for (int m = threadIdx.x / kPieces; m < kTokens; m += S::kThreads / kPieces) {
      Vec<float, 4> total = {};
#pragma unroll 4
      for (int b = from; b <= to; ++b) {
        const bool second = b * p.share < item_begin;  // it began with another item
        const float4 more = __ldcg(reinterpret_cast<const float4*>(
            p.partial + (2 * int64_t{b} + second) * (kTokens * kRows) + m * kRows + row));
        total.v[0] += more.x;
        total.v[1] += more.y;
        total.v[2] += more.z;
        total.v[3] += more.w;
      }
      y.put(m, total);
    }
  }
}

/// How the line of steps is cut.
struct Cut {
  int steps;             // of an item
  int64_t total, share;  // of all items; of a block, whole units

  int64_t blocks() const { return (total + share - 1) / share; }
};

/// tiles: of a step; unit: steps that are taken together.
Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k, int tokens, int tiles, int unit) {
  constexpr double kWholeCost = 1.0, kPartCost = 2.25;  // the end of an item, in steps
  const int64_t units = (k / kTileK + tiles * unit - 1) / (tiles * unit);
  const int64_t all = (n + kRows - 1) / kRows * ((m + tokens - 1) / tokens) * units;
  const int64_t least = (all + on.multiprocessors - 1) / on.multiprocessors;
  // as few units as every multiprocessor must take, or a few more where items are then cut less often
  int64_t share = least;
  double best = 0.0;
  for (int64_t candidate = least; candidate < least + units; ++candidate) {
    const bool even = candidate % units == 0, one = units % candidate == 0;
    const int64_t parts = even ? 0 : one ? 1 : 2, wholes = candidate / units;
    const double cost = static_cast<double>(candidate * unit) + static_cast<double>(parts) * kPartCost +
                        static_cast<double>(wholes) * kWholeCost;
    if (best != 0.0 && cost >= best) continue;
    best = cost;
    share = candidate;
  }
  return {static_cast<int>(units) * unit, all * unit, share * unit};
}

template <typename T, typename S>
cudaError_t launch(const Launch& on, const Product4<T>& product, void* workspace) {
  Skinny<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.x = product.x;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.token_blocks = (p.m + S::kTokens - 1) / S::kTokens;
  const Cut cut = cut_of(on, product.m, product.w.n, product.w.k, S::kTokens, S::kTiles, S::kDepth);
  p.steps = cut.steps;
  p.total = static_cast<int>(cut.total);
  // without a workspace items stay whole
  p.share = static_cast<int>(workspace ? cut.share : (cut.share + cut.steps - 1) / cut.steps * cut.steps);
  p.partial = static_cast<float*>(workspace);
  p.arrivals = on.arrivals;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.total + p.share - 1) / p.share));
  shape.block = dim3(S::kThreads);
  shape.shared = S::kSharedBytes;
  const auto kernel = product.w.absmax.plain ? skinny_kernel<T, S, false> : skinny_kernel<T, S, true>;
  return launch_kernel(on, shape, kernel, p);
}

/// Calls body with the shape for so many rows of x: with less shared memory x has fewer stages.
template <typename Body>
auto with_shape(const Launch& on, int64_t m, const Body& body) {
  const bool roomy = on.block_shared >= (112 << 10);
  if (m <= 16) return body(Shape<16, 2, 2, 2, 4>{});
  if (m <= 32) return roomy ? body(Shape<32, 2, 2, 2, 3>{}) : body(Shape<32, 2, 1, 2, 4>{});
  return roomy ? body(Shape<64, 2, 1, 2, 3>{}) : body(Shape<64, 2, 1, 2, 2>{});
}

}  // namespace

size_t skinny4_sm80_workspace(const Launch& on, int64_t m, int64_t n, int64_t k) {
  return with_shape(on, m, [&](auto shape) -> size_t {
    using S = decltype(shape);
    const Cut cut = cut_of(on, m, n, k, S::kTokens, S::kTiles, S::kDepth);
    if (cut.share % cut.steps == 0) return 0;
    return static_cast<size_t>(cut.blocks()) * 2 * S::kTokens * kRows * sizeof(float);
  });
}

template <typename T>
cudaError_t skinny4_sm80(const Launch& on, const Product4<T>& product, void* workspace) {
  return with_shape(on, product.m,
                    [&](auto shape) { return launch<T, decltype(shape)>(on, product, workspace); });
}

template cudaError_t skinny4_sm80(const Launch&, const Product4<half_t>&, void*);
template cudaError_t skinny4_sm80(const Launch&, const Product4<bf16_t>&, void*);

}  // namespace halfbyte::cuda
