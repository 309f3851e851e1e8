// y = x w^T + bias + residual with a tiled 4-bit weight and many rows of x (65 and more), on sm_90a: the
// weight is the A operand of wgmma, decoded on the way from shared memory into registers; x is B. Bound by
// the tensor cores.
//
// A block makes 128 rows of the weight times 128 or 256 tokens: a producer warp and two consumer warpgroups
// of 64 rows each. One step is 64 k:
//
//   producer  a box of x [tokens][64 k], swizzled, codes and absmax of 8 row tiles, by the copy engine into a
//             ring
//   decode    a byte permute makes an address, a look-up makes two weights (table4.cuh), one product scales
//             them by absmax rounded to their type; done while the product of the step before runs
//   end       fp32 sums + bias + residual, rounded once, turned round in shared memory so that y is written
//             in lines
//
// Blocks stay and take items in turn, in bands of token tiles, so that what runs at once shares x and weights
// in L2. Items that do not fill the last round go to a cluster each, whose blocks divide K and exchange sums
// through shared memory, in a fixed order.
#include <algorithm>

#include "launch.cuh"
#include "output_sm90.cuh"
#include "table4.cuh"
#include "tma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 128, kThreads = 384;  // of a block: rows of the weight; consumers and the producer
constexpr int kCodes = kRows / kTileRows * 512, kAbsmax = kRows * 4;  // bytes of a step

/// Shared memory behind the table: a ring of x, of codes, of absmax, then results, then barriers.
template <int kTokens>
struct Space {
  static constexpr int kX = kTokens * 128, kStages = kTokens == 256 ? 4 : 7;
  static constexpr int kCodesAt = kTable4Bytes + kStages * kX, kAbsmaxAt = kCodesAt + kStages * kCodes;
  static constexpr int kStagingAt = kAbsmaxAt + kStages * kAbsmax;
  static constexpr int kBarriersAt = kStagingAt + 2 * kStaging;
  static constexpr int kBytes = kBarriersAt + kStages * 16;
  static_assert(kBytes <= 227 << 10);
};
struct Maps {
  CUtensorMap x, codes, absmax;
};

/// How the product is cut: tokens of a block, blocks that divide K of the last items.
struct Cut {
  int tokens, splits;
};

template <typename T>
struct Gemm4 {
  Tiled4 w;
  Output<T> out;
  Book4 book;
  int m, tiles;
  int row_groups, token_tiles, band;
  int whole, items;  // items of one block each; all of them
  int rounds;        // of whole items before the divided ones
  int splits, part;  // blocks that divide K of an item, and their k tiles
  bool whole_lines;  // the residual lies on 16 bytes
};

#if HALFBYTE_WGMMA

constexpr int kConsumers = 256;  // threads

/// What a lane holds of a tile: its codes, and the absmax of rows g and g + 8, or when they are nested that
/// of row g + 8 (lane % 2).
template <bool kNested>
struct Tile {
  uint4 codes;
  float2 scale;   // nested: x = the nested absmax
  uint32_t code;  // nested: its byte

  /// `block` is the number of the lane's nested absmax in the flat order.
  __device__ __forceinline__ void read(const char* code_bytes, const char* absmax_bytes, const float* nested,
                                       int64_t block) {
    codes = *reinterpret_cast<const uint4*>(code_bytes);
    if (kNested) {
      code = *reinterpret_cast<const uint8_t*>(absmax_bytes);
      scale.x = nested[block / kNestedBlocksize];
    } else {
      scale = *reinterpret_cast<const float2*>(absmax_bytes);
    }
  }
  __device__ __forceinline__ float2 absmax(const char* table, float offset, uint32_t lane4) const {
    if (!kNested) return scale;
    const float own = nested_value(map_value(table, code, lane4), scale.x, offset);
    return make_float2(__shfl_sync(0xffffffffu, own, 0, 2), __shfl_sync(0xffffffffu, own, 1, 2));
  }
};

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

/// The end of an item whose K is divided: each block writes its share of the tokens.
template <int kSplits, int kTokens, typename T>
__device__ __forceinline__ void write_divided(const Gemm4<T>& p, const float (&acc)[kTokens / 2], char* ring,
                                              char* staging, int group, int64_t first_row,
                                              int64_t first_token) {
  float total[kTokens / kSplits / 2];
  exchange_sums<kSplits, kConsumers>(total, acc, ring);
  write_sums<kTokens / kSplits>(p.out, p.m, p.whole_lines, total, staging, group, first_row,
                                first_token + cluster_rank() * (kTokens / kSplits));
}

#endif  // HALFBYTE_WGMMA

template <typename T, int kTokens, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_kernel(const __grid_constant__ Gemm4<T> p, const __grid_constant__ Maps maps) {
#if HALFBYTE_WGMMA
  using S = Space<kTokens>;
  constexpr int kStages = S::kStages;
  constexpr int kAbsmaxBytes = kNested ? kRows : kRows * 4;
  extern __shared__ __align__(1024) char table[];
  const uint32_t shared = shared_address(table);
  const uint32_t ring = shared + kTable4Bytes, full = shared + S::kBarriersAt, empty = full + kStages * 8;
  const int lane = threadIdx.x % 32, g = lane / 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const bool consumes = warp < kConsumers / 32;
  const uint32_t lane4 = lane * 4;
  let_next_start();

  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, kConsumers / 32);
    }
    publish_barriers();
  }
  // the producer's part of a step; the weight needs nothing of the kernels before
  const auto fetch_weight = [&](int stage, int row_tile, int kt) {
    arrive_expecting(full + stage * 8, S::kX + kCodes + kAbsmaxBytes);
    fetch_tile(shared + S::kCodesAt + stage * kCodes, maps.codes, row_tile, kt * 128, full + stage * 8);
    fetch_tile(shared + S::kAbsmaxAt + stage * kAbsmax, maps.absmax, row_tile, kt * (kNested ? 4 : 16),
               full + stage * 8);
  };
  int early = 0;  // steps whose weights were fetched before
  if (Work work; threadIdx.x == kConsumers && find_work(p, 0, &work)) {
    const int row_tile = place_of(p, work.item).rows * (kRows / kTileRows);
    for (; early < min(kStages, work.steps); ++early) fetch_weight(early, row_tile, work.first_tile + early);
  }
  fill_table4(table, p.book, kNested ? p.w.absmax.nested_code : nullptr);
  wait_for_results();
  __syncthreads();

  if (!consumes) {
    give_registers<40>();
    if (threadIdx.x == kConsumers) {
      int stage = 0;
      uint32_t parity = 1;
      Work work;
      for (int n = 0; find_work(p, n, &work); ++n) {
        const Place place = place_of(p, work.item);
        const int row_tile = place.rows * (kRows / kTileRows);
        for (int i = 0; i < work.steps; ++i) {
          const int kt = work.first_tile + i;
          wait_barrier(empty + stage * 8, parity);
          if (early > 0)
            --early;
          else
            fetch_weight(stage, row_tile, kt);
          fetch_tile(ring + stage * S::kX, maps.x, place.tokens * kTokens, kt * kTileK, full + stage * 8);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    if (Work work; p.splits > 1 && find_work(p, p.rounds, &work)) {
      cluster_meet();
      cluster_barrier();
    }
  } else {
    take_registers<232>();
    const int group = warp / 4;
    const float offset = kNested ? *p.w.absmax.offset : 0.0f;
    const char* const my_codes = table + S::kCodesAt + warp * 512 + lane * 16;
    const char* const my_absmax =
        table + S::kAbsmaxAt + (kNested ? warp * 16 + g * 2 + lane % 2 : warp * 64 + g * 8);
    int stage = 0;
    uint32_t parity = 0;
    Work work;
    for (int n = 0; find_work(p, n, &work); ++n) {
      const Place place = place_of(p, work.item);
      const int64_t first_row = static_cast<int64_t>(place.rows) * kRows;
      const int64_t first_token = static_cast<int64_t>(place.tokens) * kTokens;
      int kt = work.first_tile;
      const int64_t first_block =  // of a nested absmax
          (min(first_row + warp * kTileRows, p.w.n - kTileRows) + g + lane % 2 * 8) * p.tiles;
      Tile<kNested> tile;
      const auto read = [&] {  // the step at `stage`
        wait_barrier(full + stage * 8, parity);
        tile.read(my_codes + stage * kCodes, my_absmax + stage * kAbsmax, p.w.absmax.nested,
                  first_block + min(kt, p.tiles - 1));
      };
      const auto release = [&](int of) __attribute__((always_inline)) {
        if (lane == 0) arrive(empty + of * 8);
      };
      float acc[kTokens / 2];
      uint32_t a[2][4][4] = {};
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
      int before = stage;  // the step whose product runs
      read();
      for (int i = 0; i < work.steps; i += 2) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint32_t(&now)[4][4] = a[u];
          const uint32_t words[4] = {tile.codes.x, tile.codes.y, tile.codes.z, tile.codes.w};
          const float2 scale = tile.absmax(table, offset, lane4);
          const uint32_t low = pair_of<T>(scale.x, scale.x), high = pair_of<T>(scale.y, scale.y);
#pragma unroll
          for (int j = 0; j < 4; ++j) look_up(now[j], table, words[j], lane4);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) now[j][r] = scale_pair(now[j][r], r % 2 ? high : low, T{});
          }
          const uint64_t x_tile = describe_b(ring + stage * S::kX, 0);
          begin_group();
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_group(acc, now[j], x_tile + ((j * 32) >> 4), true, T{});
          commit_group();
          const int running = stage;
          if (++stage == kStages) stage = 0, parity ^= 1;
          if (i + u + 1 < work.steps) {
            ++kt;
            read();
          }
          wait_group<1>();
          hold_registers(a[1 - u]);
          if (i + u > 0) release(before);
          before = running;
        }
      }
      wait_group<0>();
      hold_registers(a[1]);
      hold_registers(acc);
      release(before);

      char* const staging = table + S::kStagingAt + group * kStaging;
      const int64_t row = first_row + group * 64;
      if (n != p.rounds) {
        write_sums<kTokens>(p.out, p.m, p.whole_lines, acc, staging, group, row, first_token);
        continue;
      }
      cluster_meet();  // nothing more comes, the rings of the cluster are free
      char* const free = table + kTable4Bytes;
      if (p.splits == 2)
        write_divided<2, kTokens>(p, acc, free, staging, group, row, first_token);
      else if (p.splits == 4)
        write_divided<4, kTokens>(p, acc, free, staging, group, row, first_token);
      else
        write_divided<8, kTokens>(p, acc, free, staging, group, row, first_token);
    }
  }
#endif
}

/// How many items fill rounds of whole ones, and how many are left to be divided.
struct Rounds {
  int64_t whole, divided, blocks;
};
Rounds rounds_of(const Launch& on, int64_t m, int64_t n, const Cut& cut) {
  const int64_t items = (n + kRows - 1) / kRows * ((m + cut.tokens - 1) / cut.tokens);
  const int64_t clusters = on.clusters_of(cut.splits), blocks = clusters * cut.splits;
  const int64_t left = cut.splits > 1 ? items % blocks : 0;
  if (left == 0 || left > clusters) return {items, 0, std::min(items, blocks)};
  return {items - left, left, items > left ? blocks : left * cut.splits};
}

template <typename T, int kTokens, bool kNested>
cudaError_t launch(const Launch& on, const Product4<T>& product, Cut cut) {
  Gemm4<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.row_groups = static_cast<int>((product.w.n + kRows - 1) / kRows);
  p.token_tiles = (p.m + kTokens - 1) / kTokens;
  p.band = std::min(p.token_tiles, 1024 / kTokens);
  const Rounds rounds = rounds_of(on, product.m, product.w.n, cut);
  if (rounds.divided == 0) cut.splits = 1;
  p.whole = static_cast<int>(rounds.whole);
  p.items = static_cast<int>(rounds.whole + rounds.divided);
  p.rounds = rounds.divided ? static_cast<int>(rounds.whole / rounds.blocks) : -1;
  p.splits = cut.splits;
  p.part = ((p.tiles + p.splits - 1) / p.splits + 1) / 2 * 2;
  p.whole_lines = is_aligned(product.out.residual, 16);
  Maps maps;
  const DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  const Absmax& absmax = p.w.absmax;
  const void* scales = kNested ? static_cast<const void*>(absmax.codes) : absmax.plain;
  constexpr int kTileWords = kNested ? 4 : 16, kRowTiles = kRows / kTileRows;
  const int64_t row_tiles = p.w.n / kTileRows;
  cudaError_t error = describe_tiles(&maps.x, dtype, product.x, product.m, product.w.k, kTokens);
  if (error == cudaSuccess)
    error = describe_words(&maps.codes, p.w.codes, row_tiles, p.tiles * int64_t{128}, kRowTiles, 128);
  if (error == cudaSuccess)
    error =
        describe_words(&maps.absmax, scales, row_tiles, p.tiles * int64_t{kTileWords}, kRowTiles, kTileWords);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(rounds.blocks));
  shape.block = dim3(kThreads);
  shape.shared = Space<kTokens>::kBytes;
  shape.cluster = static_cast<unsigned>(cut.splits);
  return launch_kernel(on, shape, gemm4_kernel<T, kTokens, kNested>, p, maps);
}

/// The cut that should end first. Costs are in steps of 256 tokens, as measured.
Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k) {
  Cut best = {256, 1};
  double least = 0.0;
  const int64_t steps = k / kTileK;
  for (const int tokens : {256, 128}) {
    const double step = tokens == 256 ? 1.0 : 0.6, end = tokens == 256 ? 2.0 : 1.0;
    for (const int splits : {1, 2, 4, 8}) {
      if (on.clusters_of(splits) == 0) continue;
      const Rounds rounds = rounds_of(on, m, n, {tokens, splits});
      if (splits > 1 && rounds.divided == 0) continue;
      const int64_t whole = (rounds.whole + rounds.blocks - 1) / rounds.blocks;
      double cost = whole * (steps * step + end);
      if (rounds.divided > 0) cost += (steps + splits - 1) / splits * step + end + 3.0;
      if (least != 0.0 && cost >= least) continue;
      least = cost;
      best = {tokens, splits};
    }
  }
  return best;
}

template <typename T, int kTokens>
cudaError_t launch(const Launch& on, const Product4<T>& product, const Cut& cut) {
  return product.w.absmax.plain ? launch<T, kTokens, false>(on, product, cut)
                                : launch<T, kTokens, true>(on, product, cut);
}

}  // namespace

template <typename T>
cudaError_t gemm4_sm90(const Launch& on, const Product4<T>& product) {
  const Absmax& absmax = product.w.absmax;
  const void* scales = absmax.plain ? static_cast<const void*>(absmax.plain) : absmax.codes;
  if (!is_aligned(scales, 16)) return skinny4_sm90(on, product, nullptr);  // the copy engine cannot read it
  const Cut cut = cut_of(on, product.m, product.w.n, product.w.k);
  return cut.tokens == 128 ? launch<T, 128>(on, product, cut) : launch<T, 256>(on, product, cut);
}

template cudaError_t gemm4_sm90(const Launch&, const Product4<half_t>&);
template cudaError_t gemm4_sm90(const Launch&, const Product4<bf16_t>&);

}  // namespace halfbyte::cuda
