// Products of many tokens with the 4-bit experts that each has chosen, by mma.sync (sm_80 and up). Pairs of a
// token and an expert are sorted by expert first; a block makes 256 rows of an expert's weight (128 of gate
// and of up) times up to kTokens of its pairs. A step is 64 k:
//
//   x       [kTokens][64 k] by asynchronous copies into a ring, from wherever the pairs' rows lie; the eight
//           16-byte pieces of row r are exchanged by r % 8, so that neither the copies nor ldmatrix meet in a
//           bank
//   codes   16 bytes a lane and row tile, kAhead steps ahead
//   decode  a byte permute makes an address, a look-up two weights (table4.cuh), scaled by absmax rounded to
//           their type
//   end     fp32 sums, or act(gate) * up of them, through shared memory, so that y is written in lines
//
// Nobody knows how many tiles of pairs there will be: the grid has room for the most, what is too much ends
// at once. The order of an expert's pairs is left to chance; no result depends on it.
#include <algorithm>

#include "activation.cuh"
#include "experts.cuh"
#include "mma.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kWarpTiles = 2, kStages = 3;
constexpr int kSortThreads = 1024, kMostExperts = kMostPlaces;

/// Pairs first ... first + count - 1 of the order, all of one expert (or of none), and its weights: the only
/// one, or gate's and up's.
struct PairTile {
  int first, count;
  bool none;
  ExpertPlace at[2];
};

struct Sorted {
  int32_t* order;   // [pairs]
  PairTile* tiles;  // [most_tiles]
  int32_t* count;   // of tiles
};

int64_t most_tiles(int64_t pairs, int64_t experts, int tokens) {
  // each expert has one that is not full, and there are not more than pairs
  return std::min(pairs, pairs / tokens + experts + 1);
}

Sorted sorted_in(void* workspace, int64_t pairs) {
  char* const base = static_cast<char*>(workspace);
  return {reinterpret_cast<int32_t*>(base + 256),
          reinterpret_cast<PairTile*>(base + 256 + round_up(static_cast<size_t>(pairs) * 4)),
          reinterpret_cast<int32_t*>(base)};
}

template <int kPlaces>
__global__ void __launch_bounds__(kSortThreads)
    sort_pairs_kernel(const __grid_constant__ ExpertTable<kPlaces> table, const Sorted to,
                      const int32_t* __restrict__ ids, int pairs, int experts, bool gated, int tokens) {
  __shared__ int count[kMostExperts + 1], place[kMostExperts + 1];
  let_next_start();
  for (int e = threadIdx.x; e <= experts; e += kSortThreads) count[e] = 0;
  __syncthreads();
  wait_for_results();
  const auto bin = [&](int p) {
    const int id = ids[p];
    return id >= 0 && id < experts ? id : experts;
  };
  for (int p = threadIdx.x; p < pairs; p += kSortThreads) atomicAdd(count + bin(p), 1);
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += kSortThreads) {
    int first = 0, tile = 0;
    for (int i = 0; i < e; ++i) {
      first += count[i];
      tile += (count[i] + tokens - 1) / tokens;
    }
    place[e] = first;
    for (int i = 0; i < count[e]; i += tokens, ++tile) {
      PairTile& made = to.tiles[tile];
      made.first = first + i;
      made.count = min(tokens, count[e] - i);
      made.none = e == experts;
      if (made.none) continue;
      made.at[0] = table.at[e];
      if (gated) made.at[1] = table.at[experts + e];
    }
    if (e == experts) *to.count = tile;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += kSortThreads) to.order[atomicAdd(place + bin(p), 1)] = p;
}

template <typename T>
struct Run {
  ExpertProduct<T> product;
  Sorted sorted;
  int tiles, row_blocks;
  bool aligned;  // rows of x, for copies of 16 bytes
};

/// What a lane holds of a tile: its codes, the absmax of rows g and g + 8.
struct Tile {
  uint4 codes;
  float2 scale;
};

template <typename T, int kTokens, bool kNested, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) experts_gemm_kernel(const __grid_constant__ Run<T> p) {
#if !HALFBYTE_SM75  // which has no tiled weights
  constexpr int kAhead = 2;
  constexpr int kBlockTiles = kWarps * (kGated ? 1 : kWarpTiles), kRows = kBlockTiles * kTileRows;
  constexpr int kStage = kTokens * kTileK * 2, kSumStride = kRows + 4;
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t pairs[kTokens];
  const uint32_t ring = shared_address(shared) + kTable4Bytes;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const uint32_t lane4 = lane * 4;
  const ExpertProduct<T>& product = p.product;
  let_next_start();
  fill_table4(shared, product.book, nullptr);
  wait_for_results();

  const int tile_index = blockIdx.x / p.row_blocks;
  if (tile_index >= *p.sorted.count) return;
  const PairTile& tile = p.sorted.tiles[tile_index];
  const int count = tile.count;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.x % p.row_blocks) * kBlockTiles;
  const int64_t first_row = first_tile * kTileRows, row_tiles = product.n / kTileRows;
  if (threadIdx.x < kTokens)
    pairs[threadIdx.x] =
        static_cast<int>(threadIdx.x) < count ? p.sorted.order[tile.first + threadIdx.x] : -1;
  __syncthreads();
  if (tile.none) {
    for (int i = threadIdx.x; i < count * kRows; i += kThreads) {
      const int64_t row = first_row + i % kRows;
      if (row < product.n) product.y[pairs[i / kRows] * product.n + row] = from_float<T>(NAN);
    }
    return;
  }

  // row tiles of this warp: two of the weight, or one of gate and the same of up
  const uint8_t* codes[kWarpTiles];
  Absmax absmax[kWarpTiles];
  int64_t at[kWarpTiles];  // number of the row tile's first tile; what is beyond the end is not kept
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    const ExpertPlace& place = tile.at[kGated ? i : 0];
    at[i] = min(first_tile + (kGated ? warp : warp * kWarpTiles + i), row_tiles - 1) * p.tiles;
    codes[i] = place.codes + at[i] * 512 + lane * 16;
    if (kNested)
      absmax[i] = {nullptr, static_cast<const uint8_t*>(place.absmax), place.nested, place.nested_code,
                   place.offset};
    else
      absmax[i] = {static_cast<const float*>(place.absmax), nullptr, nullptr, nullptr, nullptr};
  }
  const auto fetch = [&](Tile & to, int i, int step) __attribute__((always_inline)) {
    to.codes = __ldg(reinterpret_cast<const uint4*>(codes[i] + step * 512));
    const int64_t where = (at[i] + step) * kTileRows + g * 2;
    if (!kNested) {
      to.scale = *reinterpret_cast<const float2*>(absmax[i].plain + where);
    } else {
      const int64_t block = at[i] * kTileRows + static_cast<int64_t>(g) * p.tiles + step;
      to.scale.x = absmax[i].value(where, block);
      to.scale.y = absmax[i].value(where + 1, block + int64_t{8} * p.tiles);
    }
  };
  Tile ahead[kAhead][kWarpTiles];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) fetch(ahead[s][i], i, min(s, p.tiles - 1));
  }

  constexpr int kCopies = kTokens * 8 / kThreads;
  const int piece = threadIdx.x % 8;
  const T* rows[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int pair = pairs[threadIdx.x / 8 + i * (kThreads / 8)];
    rows[i] =
        pair < 0 ? nullptr : product.x + static_cast<int64_t>(pair / product.each) * product.k + piece * 8;
  }
  const auto copy_x = [&](int step) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = threadIdx.x / 8 + i * (kThreads / 8);
      const int to = step % kStages * kStage + row * 128 + ((piece ^ (row & 7)) * 16);
      const bool there = rows[i] && step < p.tiles;
      const T* const from = there ? rows[i] + static_cast<int64_t>(step) * kTileK : product.x;
      if (p.aligned) {
        copy_async(ring + to, from, there ? 16 : 0);
      } else {
        Vec<T, 8> some = {};
        if (there) {
          for (int j = 0; j < 8; ++j) some.v[j] = from[j];
        }
        *reinterpret_cast<Vec<T, 8>*>(shared + kTable4Bytes + to) = some;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy_x(s);

  // of the matrices this lane addresses: a token, half of 16 k
  const int token = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
  float acc[kWarpTiles][kTokens / 8][4] = {};
  const auto multiply_step = [&](int step, Tile(&tiles)[kWarpTiles]) __attribute__((always_inline)) {
    wait_copies<kStages - 2>();
    __syncthreads();
    copy_x(step + kStages - 1);
    uint32_t low[kWarpTiles], high[kWarpTiles];
    uint4 held[kWarpTiles];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      low[i] = pair_of<T>(tiles[i].scale.x, tiles[i].scale.x);
      high[i] = pair_of<T>(tiles[i].scale.y, tiles[i].scale.y);
      held[i] = tiles[i].codes;
      fetch(tiles[i], i, min(step + kAhead, p.tiles - 1));
    }
    const uint32_t stage = ring + step % kStages * kStage + token * 128;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[kWarpTiles][4];
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const uint4 c = held[i];
        look_up(a[i], shared, j == 0 ? c.x : j == 1 ? c.y : j == 2 ? c.z : c.w, lane4);
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = scale_pair(a[i][r], r % 2 ? high[i] : low[i], T{});
      }
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, stage + n * 16 * 128 + (((j * 2 + half) ^ (token & 7)) * 16));
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          multiply(acc[i][n * 2], a[i], b[0], b[1], T{});
          multiply(acc[i][n * 2 + 1], a[i], b[2], b[3], T{});
        }
      }
    }
  };
  for (int step = 0; step < p.tiles; step += kAhead) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (step + s < p.tiles) multiply_step(step + s, ahead[s]);
    }
  }

  wait_copies<0>();
  const void* const bias[2] = {tile.at[0].bias, kGated ? tile.at[1].bias : nullptr};
  const auto bias_of = [&](int part, int64_t row) {
    return bias_value(bias[part], product.bias_dtype[part], row);
  };
  float* const sums = reinterpret_cast<float*>(shared);  // [kTokens][kSumStride], over table and ring
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < (kGated ? 1 : kWarpTiles); ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = (kGated ? warp : warp * kWarpTiles + i) * kTileRows + g + e / 2 * 8;
        const int64_t column = min(first_row + row, product.n - 1);
        float value = acc[i][n][e] + bias_of(0, column);
        if (kGated)
          value = activate<true>(product.act, value) * (acc[kWarpTiles - 1][n][e] + bias_of(1, column));
        sums[(n * 8 + t * 2 + e % 2) * kSumStride + row] = value;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRows / 2; i += kThreads) {
    const int pair = pairs[i / (kRows / 2)], row = i % (kRows / 2) * 2;
    if (pair < 0 || first_row + row >= product.n) continue;
    const float* const from = sums + i / (kRows / 2) * kSumStride + row;
    T* const to = product.y + static_cast<int64_t>(pair) * product.n + first_row + row;
    if (is_aligned(product.y, 4)) {
      *reinterpret_cast<uint32_t*>(to) = pair_of<T>(from[0], from[1]);
    } else {
      to[0] = from_float<T>(from[0]);
      to[1] = from_float<T>(from[1]);
    }
  }
#endif
}

template <typename T, int kTokens, bool kNested, bool kGated>
cudaError_t launch(const Launch& on, const ExpertProduct<T>& product, const Sorted& sorted) {
  constexpr int kRows = kWarps * (kGated ? 1 : kWarpTiles) * static_cast<int>(kTileRows);
  constexpr int kRing = kStages * kTokens * static_cast<int>(kTileK) * 2;
  static_assert(kTokens * (kRows + 4) * 4 <= kTable4Bytes + kRing);
  Run<T> run = {};
  run.product = product;
  run.sorted = sorted;
  run.tiles = static_cast<int>(product.k / kTileK);
  run.row_blocks = static_cast<int>((product.n + kRows - 1) / kRows);
  run.aligned = is_aligned(product.x, 16);
  const int64_t tiles = most_tiles(product.pairs, product.experts, kTokens);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(tiles * run.row_blocks));
  shape.block = dim3(kThreads);
  shape.shared = kTable4Bytes + kRing;
  return launch_kernel(on, shape, experts_gemm_kernel<T, kTokens, kNested, kGated>, run);
}

template <typename T, int kTokens>
cudaError_t launch(Launch on, const ExpertProduct<T>& product, const ExpertPlaces& places,
                   const Sorted& sorted) {
  const cudaError_t error = with_table(places, [&](const auto& table) {
    constexpr int kPlaces = std::remove_reference_t<decltype(table)>::kPlaces;
    LaunchShape shape;
    shape.grid = dim3(1);
    shape.block = dim3(kSortThreads);
    return launch_kernel(on, shape, sort_pairs_kernel<kPlaces>, table, sorted, product.ids, product.pairs,
                         product.experts, product.gated, kTokens);
  });
  if (error != cudaSuccess) return error;
  on.early = on.arch >= 90;
  if (product.gated)
    return product.nested ? launch<T, kTokens, true, true>(on, product, sorted)
                          : launch<T, kTokens, false, true>(on, product, sorted);
  return product.nested ? launch<T, kTokens, true, false>(on, product, sorted)
                        : launch<T, kTokens, false, false>(on, product, sorted);
}

}  // namespace

size_t experts_gemm4_workspace(int64_t pairs, int64_t experts) {
  const size_t tiles = static_cast<size_t>(most_tiles(pairs, experts, 32));
  return 256 + round_up(static_cast<size_t>(pairs) * 4) + tiles * sizeof(PairTile);
}

template <typename T>
cudaError_t experts_gemm4(const Launch& on, const ExpertProduct<T>& product, const ExpertPlaces& places,
                          void* workspace) {
  const Sorted sorted = sorted_in(workspace, product.pairs);
  const int64_t each = product.pairs / product.experts;  // pairs of an expert, if all are as good
  return each <= 32 ? launch<T, 32>(on, product, places, sorted) : launch<T, 64>(on, product, places, sorted);
}

template cudaError_t experts_gemm4(const Launch&, const ExpertProduct<half_t>&, const ExpertPlaces&, void*);
template cudaError_t experts_gemm4(const Launch&, const ExpertProduct<bf16_t>&, const ExpertPlaces&, void*);

}  // namespace halfbyte::cuda
