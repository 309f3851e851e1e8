// y = x w^T + bias + residual with a tiled 4-bit weight and many rows of x (65 and more), on sm_90a: the
// weight is the A operand of wgmma, decoded on the way from memory into registers; x is B, brought into
// shared memory by the copy engine. Bound by the tensor cores.
//
// A block makes 128 rows of the weight times 128 or 256 tokens: a producer warp and two consumer warpgroups
// of 64 rows each. One step is 64 k:
//
//   producer  a box of x [tokens][64 k], swizzled, into a ring; the blocks of a cluster that work on the same
//             tokens bring a part each and hand it to all of them
//   codes     16 bytes a lane and tile, straight into registers, kAhead steps ahead, on into the next item
//   decode    a byte permute makes an address, a look-up makes two weights (table4.cuh), one product scales
//             them by absmax rounded to their type; done while the product of the step before runs
//   end       fp32 sums + bias + residual, rounded once, turned round in shared memory so that y is written
//             in lines; where K is divided over the blocks of a cluster, sums go through its shared memory
//             in a fixed order
//
// Blocks stay and take items in turn, in bands of token tiles, so that what runs at once shares x and weights
// in L2.
#include <algorithm>

#include "cluster.cuh"
#include "launch.cuh"
#include "table4.cuh"
#include "tma_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 128, kThreads = 384;  // of a block: rows of the weight; consumers and the producer
constexpr int kRing = 128 << 10;
constexpr int kStaged = 128;                // tokens whose results are turned round at a time
constexpr int kStaging = kStaged * 64 * 2;  // bytes of a warpgroup for that
constexpr int kBarriers = kTable4Bytes + kRing + 2 * kStaging, kShared = kBarriers + 256;

/// How the product is cut: tokens of a block, blocks of a cluster that share x, and that divide K.
struct Cut {
  int tokens, sharing, splits;
};

template <typename T>
struct Gemm4 {
  Tiled4 w;
  Output<T> out;
  Book4 book;
  int m, tiles;
  int sharing, splits;
  int steps;  // k tiles of a block, a multiple of kAhead
  int row_groups, token_tiles, band, items;
  bool whole_lines;  // the residual may be read 16 bytes at a time
};

#if HALFBYTE_WGMMA

constexpr int kConsumers = 256, kGroup = 128;  // threads
constexpr int kSumStride = kRows + 4;  // floats between tokens of the sums of a divided K, in the ring

template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}
/// A barrier of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(kGroup) : "memory");
}

/// Four 8x8 matrices between the fragments of C, transposed, and rows of 16 bytes; lane l gives the address
/// of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ float2 floats_of(uint32_t pair, half_t) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
__device__ __forceinline__ float2 floats_of(uint32_t pair, bf16_t) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
}
__device__ __forceinline__ float4 cluster_values(const float* own, int rank) {
  float4 v;
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

/// Where a lane reads of one row tile.
struct Lane {
  const uint8_t* codes;  // its 16 bytes of the first k tile
  const char* absmax;    // the pair of the first k tile
  int64_t block;         // nested: number of the absmax of its row g, in the flat order
};

/// What a lane holds of a tile: its codes, the absmax of rows g and g + 8.
template <bool kNested>
struct Tile {
  uint4 codes;
  float2 scale;   // nested: their nested absmax
  uint32_t code;  // nested: two bytes

  __device__ __forceinline__ void fetch(const Lane& at, const float* nested, int kt, int tiles) {
    const uint8_t* from = at.codes + static_cast<int64_t>(kt) * 512;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(codes.x), "=r"(codes.y), "=r"(codes.z), "=r"(codes.w)
                 : "l"(from));
    if (kNested) {
      code = *reinterpret_cast<const uint16_t*>(at.absmax + kt * 16);
      const int64_t block = at.block + kt;
      scale.x = nested[block / kNestedBlocksize];
      scale.y = nested[(block + int64_t{8} * tiles) / kNestedBlocksize];
    } else {
      scale = *reinterpret_cast<const float2*>(at.absmax + kt * 64);
    }
  }
  __device__ __forceinline__ float2 absmax(const char* table, float offset, uint32_t lane4) const {
    if (!kNested) return scale;
    return make_float2(__fadd_rn(__fmul_rn(map_value(table, code & 255, lane4), scale.x), offset),
                       __fadd_rn(__fmul_rn(map_value(table, code >> 8, lane4), scale.y), offset));
  }
};

/// The place of an item: its rows in groups of kRows * sharing, its tokens.
struct Place {
  int rows, tokens;
};
template <typename T>
__device__ __forceinline__ Place place_of(const Gemm4<T>& p, int item) {
  const int per_band = p.band * p.row_groups, band = item / per_band, in_band = item % per_band;
  const int width = min(p.band, p.token_tiles - band * p.band);
  return {in_band / width, band * p.band + in_band % width};
}

/// Writes a warpgroup's sums: 64 rows from `first_row`, kTokens tokens from `first_token`.
template <int kTokens, typename T>
__device__ __forceinline__ void write_sums(const Gemm4<T>& p, const float (&acc)[kTokens / 2], char* staging,
                                           int group, int64_t first_row, int64_t first_token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, in_group = threadIdx.x % kGroup;
  float bias[2] = {};
  if (p.out.bias) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      bias[h] = p.out.bias_at(min(first_row + warp * 16 + lane / 4 + h * 8, p.w.n - 1));
  }
  // of the matrices this lane addresses: a token, 8 rows
  const int token = lane / 16 * 8 + lane % 8, rows8 = warp * 2 + lane / 8 % 2;
  const uint32_t matrices = shared_address(staging) + token * 128 + ((rows8 ^ (token & 7)) * 16);
  const int64_t row = first_row + in_group % 8 * 8;  // of the 16 bytes this lane reads and writes
#pragma unroll
  for (int part = 0; part < kTokens / kStaged; ++part) {
    const int64_t from = first_token + part * kStaged;
    const auto each_piece = [&](const auto& body) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < kStaged * 8 / kGroup; ++i) {
        const int at = in_group / 8 + i * (kGroup / 8);
        const int64_t m = from + at;
        if (m < p.m && row < p.w.n)
          body(m * p.out.n + row,
               reinterpret_cast<uint4*>(staging + at * 128 + ((in_group % 8 ^ (at & 7)) * 16)));
      }
    };
    if (p.out.residual) {
      each_piece([&](int64_t at, uint4* piece) {
        if (p.whole_lines) {
          *piece = *reinterpret_cast<const uint4*>(p.out.residual + at);
        } else {
          for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(piece)[i] = p.out.residual[at + i];
        }
      });
      group_barrier(group);
    }
#pragma unroll
    for (int j = 0; j < kStaged / 16; ++j) {
      uint32_t r[4] = {};
      if (p.out.residual) load_transposed(r, matrices + j * 16 * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = part * (kStaged / 2) + j * 8 + i * 2;
        float low = acc[e], high = acc[e + 1];
        if (p.out.bias) low += bias[i % 2], high += bias[i % 2];
        if (p.out.residual) {
          const float2 add = floats_of(r[i], T{});
          low += add.x, high += add.y;
        }
        r[i] = pair_of<T>(low, high);
      }
      store_transposed(matrices + j * 16 * 128, r);
    }
    group_barrier(group);
    each_piece([&](int64_t at, const uint4* piece) { *reinterpret_cast<uint4*>(p.out.y + at) = *piece; });
    group_barrier(group);
  }
}

#endif  // HALFBYTE_WGMMA

template <typename T, int kTokens, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    gemm4_kernel(const __grid_constant__ Gemm4<T> p, const __grid_constant__ CUtensorMap x_map) {
#if HALFBYTE_WGMMA
  constexpr int kAhead = kTokens == 256 ? 2 : 4;
  constexpr int kStage = kTokens * 128, kStages = kRing / kStage;
  extern __shared__ __align__(1024) char table[];
  char* const ring_bytes = table + kTable4Bytes;
  const uint32_t ring = shared_address(ring_bytes), barriers = shared_address(table) + kBarriers;
  const auto full = [&](int stage) { return barriers + stage * 8; };
  const auto empty = [&](int stage) { return barriers + (kStages + stage) * 8; };
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const bool consumes = warp < kConsumers / 32;
  const uint32_t lane4 = lane * 4;
  let_next_start();

  const int blocks = p.sharing * p.splits, rank = blocks > 1 ? cluster_rank() : 0;
  const int peer = rank % p.sharing, split = rank / p.sharing;
  const int clusters = gridDim.x / blocks, first_item = blockIdx.x / blocks;
  const int first_tile = split * p.steps;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), kConsumers / 32 * p.sharing);
    }
    publish_barriers();
  }

  const int64_t last_row_tile = p.w.n / kTileRows - 1;
  Tile<kNested> ahead[kAhead];
  Lane at;
  int next_item = first_item, next_step = 0;
  const auto begin_rows = [&] {
    const int rows = place_of(p, min(next_item, p.items - 1)).rows * p.sharing + peer;
    const int64_t tile = min(int64_t{rows} * (kRows / kTileRows) + warp % 8, last_row_tile) * p.tiles;
    at.codes = p.w.codes + tile * 512 + lane * 16;
    at.absmax = kNested ? reinterpret_cast<const char*>(p.w.absmax.codes + tile * 16 + 2 * g)
                        : reinterpret_cast<const char*>(p.w.absmax.plain + tile * 16 + 2 * g);
    at.block = tile * kTileRows + static_cast<int64_t>(g) * p.tiles;
  };
  const auto fetch = [&](Tile<kNested> & tile) __attribute__((always_inline)) {
    tile.fetch(at, p.w.absmax.nested, min(first_tile + next_step, p.tiles - 1), p.tiles);
    if (++next_step < p.steps) return;
    next_step = 0;
    next_item += clusters;
    begin_rows();
  };
  if (consumes) {
    begin_rows();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(ahead[i]);
  }
  fill_table4(table, p.book, kNested ? p.w.absmax.nested_code : nullptr);
  wait_for_results();
  if (blocks > 1)
    cluster_barrier();
  else
    __syncthreads();

  if (!consumes) {
    give_registers<40>();
    if (warp == kConsumers / 32 && lane == 0) {
      const int part = kTokens / p.sharing;
      const uint32_t part_at = peer * part * 128;
      const uint16_t everyone = static_cast<uint16_t>(((1 << p.sharing) - 1) << (split * p.sharing));
      uint32_t count = 0;
      for (int item = first_item; item < p.items; item += clusters) {
        const int row = place_of(p, item).tokens * kTokens + peer * part;
        for (int i = 0; i < p.steps; ++i, ++count) {
          const int stage = count % kStages;
          wait_barrier(empty(stage), (count / kStages & 1) ^ 1);
          arrive_expecting(full(stage), kStage);
          const uint32_t to = ring + stage * kStage + part_at;
          const int column = (first_tile + i) * kTileK;
          if (p.sharing > 1)
            fetch_tile(to, x_map, row, column, full(stage), everyone);
          else
            fetch_tile(to, x_map, row, column, full(stage));
        }
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    const int group = warp / 4;
    const float offset = kNested ? *p.w.absmax.offset : 0.0f;
    uint32_t count = 0;
    for (int item = first_item; item < p.items; item += clusters) {
      float acc[kTokens / 2];
      uint32_t a[2][4][4] = {};
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
      const auto release = [&](uint32_t number) __attribute__((always_inline)) {
        if (p.sharing == 1) {
          if (lane == 0) arrive(empty(number % kStages));
        } else if (lane < p.sharing) {
          arrive_at(empty(number % kStages), split * p.sharing + lane);
        }
      };
      for (int i = 0; i < p.steps; i += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u, ++count) {
          uint32_t(&now)[4][4] = a[u % 2];
          const uint4 codes = ahead[u].codes;
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
          const float2 scale = ahead[u].absmax(table, offset, lane4);
          const uint32_t low = pair_of<T>(scale.x, scale.x), high = pair_of<T>(scale.y, scale.y);
#pragma unroll
          for (int j = 0; j < 4; ++j) look_up(now[j], table, words[j], lane4);
          fetch(ahead[u]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) now[j][r] = scale_pair(now[j][r], r % 2 ? high : low, T{});
          }
          const int stage = count % kStages;
          wait_barrier(full(stage), count / kStages & 1);
          const uint64_t x_tile = describe_b(ring + stage * kStage, 0);
          begin_group();
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_group(acc, now[j], x_tile + ((j * 32) >> 4), true, T{});
          commit_group();
          wait_group<1>();
          hold_registers(a[(u + 1) % 2]);
          if (u > 0 || i > 0) release(count - 1);
        }
      }
      wait_group<0>();
      hold_registers(a[1]);
      hold_registers(acc);
      release(count - 1);

      const Place place = place_of(p, item);
      const int64_t first_row = (static_cast<int64_t>(place.rows) * p.sharing + peer) * kRows;
      const int64_t first_token = static_cast<int64_t>(place.tokens) * kTokens;
      if (p.splits == 1) {
        write_sums<kTokens>(p, acc, ring_bytes + kRing + group * kStaging, group, first_row + group * 64,
                            first_token);
        continue;
      }
      // K divided: the only item of this block, so the ring is free
      if constexpr (kTokens == 128) {
        float* const sums = reinterpret_cast<float*>(ring_bytes);
        asm volatile("bar.sync 3, %0;\n" ::"n"(kConsumers) : "memory");  // both have read their last stage
#pragma unroll
        for (int e = 0; e < kTokens / 2; ++e)
          sums[(e / 4 * 8 + 2 * t + e % 2) * kSumStride + warp * 16 + g + e % 4 / 2 * 8] = acc[e];
      }
    }
  }
  if (p.splits > 1) {
    cluster_barrier();
    if (consumes && first_item < p.items) {
      const Place place = place_of(p, first_item);
      const int64_t first_row = (static_cast<int64_t>(place.rows) * p.sharing + peer) * kRows;
      const int64_t first_token = static_cast<int64_t>(place.tokens) * kTokens;
      const float* sums = reinterpret_cast<const float*>(ring_bytes);
      const int tokens = kTokens / p.splits;
      for (int i = threadIdx.x; i < tokens * (kRows / 4); i += kConsumers) {
        const int token = split * tokens + i / (kRows / 4), four = i % (kRows / 4) * 4;
        const int64_t m = first_token + token, row = first_row + four;
        if (m >= p.m || row >= p.w.n) continue;
        float total[4] = {};
        for (int s = 0; s < p.splits; ++s) {
          const float4 v = cluster_values(sums + token * kSumStride + four, s * p.sharing + peer);
          total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        Vec<T, 4> result;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (p.out.bias) total[e] += p.out.bias_at(row + e);
          if (p.out.residual) total[e] += to_float(p.out.residual[m * p.out.n + row + e]);
          result.v[e] = from_float<T>(total[e]);
        }
        *reinterpret_cast<Vec<T, 4>*>(p.out.y + m * p.out.n + row) = result;
      }
    }
  }
  if (blocks > 1) cluster_barrier();  // others may still read here, or write
#endif
}

template <typename T, int kTokens, bool kNested>
cudaError_t launch(const Launch& on, const Product4<T>& product, const Cut& cut) {
  constexpr int kAhead = kTokens == 256 ? 2 : 4;
  Gemm4<T> p = {};
  p.w = product.w;
  p.out = product.out;
  p.book = book_of<T>(product.w.type);
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(product.w.k / kTileK);
  p.sharing = cut.sharing;
  p.splits = cut.splits;
  p.steps = ((p.tiles + p.splits - 1) / p.splits + kAhead - 1) / kAhead * kAhead;
  p.row_groups = static_cast<int>((product.w.n + kRows * p.sharing - 1) / (kRows * p.sharing));
  p.token_tiles = (p.m + kTokens - 1) / kTokens;
  p.band = std::min(p.token_tiles, 1024 / kTokens);
  p.items = p.row_groups * p.token_tiles;
  p.whole_lines = is_aligned(product.out.residual, 16);
  CUtensorMap x_map;
  const DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  if (const cudaError_t error =
          describe_tiles(&x_map, dtype, product.x, product.m, product.w.k, kTokens / p.sharing);
      error != cudaSuccess)
    return error;
  const int blocks = p.sharing * p.splits;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min(p.items, on.clusters_of(blocks)) * blocks));
  shape.block = dim3(kThreads);
  shape.shared = kShared;
  shape.cluster = static_cast<unsigned>(blocks);
  return launch_kernel(on, shape, gemm4_kernel<T, kTokens, kNested>, p, x_map);
}

/// The cut that should end first. Costs are clocks of a multiprocessor.
Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k) {
  Cut best = {128, 1, 1};
  double least = 0.0;
  for (const int tokens : {128, 256}) {
    for (const int sharing : {1, 2, 4}) {
      for (int splits = 1; sharing * splits <= 8; splits *= 2) {
        const int64_t clusters = on.clusters_of(sharing * splits);
        const int64_t items = (n + kRows * sharing - 1) / (kRows * sharing) * ((m + tokens - 1) / tokens);
        if (clusters == 0 || (splits > 1 && (tokens != 128 || items > clusters))) continue;
        const int64_t rounds = (items + clusters - 1) / clusters;
        const int64_t steps = (k / kTileK + splits - 1) / splits;
        const double step = tokens == 256 ? (sharing > 1 ? 1060 : 1150) : (sharing > 1 ? 580 : 680);
        const double cost = rounds * (steps * step + tokens * 12 + (splits > 1 ? 3000 : 0)) + 3000;
        if (least != 0.0 && cost >= least) continue;
        least = cost;
        best = {tokens, sharing, splits};
      }
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
  const Cut cut = cut_of(on, product.m, product.w.n, product.w.k);
  return cut.tokens == 128 ? launch<T, 128>(on, product, cut) : launch<T, 256>(on, product, cut);
}

template cudaError_t gemm4_sm90(const Launch&, const Product4<half_t>&);
template cudaError_t gemm4_sm90(const Launch&, const Product4<bf16_t>&);

}  // namespace halfbyte::cuda
