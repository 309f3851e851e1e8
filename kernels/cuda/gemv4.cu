// y = x w^T + bias + residual with a tiled 4-bit weight and up to 8 rows of 16-bit x: the weight is read
// once, at the rate of the memory. Also several weights that share x in one launch (q, k, v), and
// act(gate) * up.
//
// A block takes a run of row tiles; its warps divide K. A unit is 4 tiles, 256 k; warp w has the units w,
// w + warps, ... of every row tile, so a block reads one contiguous stream, and x, whose part a warp meets
// again and again, stays in its registers from beginning to end:
//
//   codes   4 x 16 bytes a lane and unit, straight into registers, a unit or two ahead
//   decode  a byte permute makes an address, a look-up makes two weights (table4.cuh): the A fragment
//   mma     m16n8k16. Its 8 columns are kTokens rows of x for each of 8 / kTokens tiles: column c holds x of
//           the group's tile c / kTokens, so of the products with tile q only those columns count, and each
//           lane keeps x of one tile only. The lane that accumulates a column also scales it.
//   scale   sums of a tile's 64 k times absmax, in fp32
//   reduce  over the columns' tiles by shuffles; over warps, and over the blocks of a cluster where K is
//           divided among them, through shared memory after several row tiles at once; in a fixed order
//
// Fast where K / 256 divides among 8 to 16 warps without a rest and there are 132 row tiles or more.
#include <algorithm>
#include <utility>

#include "activation.cuh"
#include "cluster.cuh"
#include "gemv4.cuh"
#include "launch.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kMaxWarps = 16;

template <typename T>
struct Gemv {
  Tiled4 w[kMaxGroup];
  Output<T> out[kMaxGroup];
  int64_t before[kMaxGroup + 1];  // row tiles of the weights before
  int64_t each, rest;  // row tiles (pairs, when gated) of a cluster; the first `rest` have one more
  Book4 book;
  int count;
  bool gated;  // two weights whose row tiles alternate
  Activation act;
  const T* x;
  int m, tiles;  // rows of x; k tiles
  int units;     // of a block's share of K
  int chunk;     // row tiles between two reductions
};

template <typename T>
__device__ __forceinline__ RowTile locate(const Gemv<T>& p, int64_t row_tile, bool nested) {
  int part = 0;
  int64_t local = row_tile;
  if (p.gated) {
    part = static_cast<int>(row_tile % 2);
    local = row_tile / 2;
  } else {
    while (part + 1 < p.count && row_tile >= p.before[part + 1]) ++part;
    local -= p.before[part];
  }
  const Absmax& absmax = p.w[part].absmax;
  const void* const scales = nested ? static_cast<const void*>(absmax.codes) : absmax.plain;
  return row_tile_of(p.w[part].codes, scales, absmax.nested, nested, local * p.tiles, part);
}

/// Words of 32 k that lanes of a quad hold four each, in order, to those that each needs: lane t gets t,
/// 4 + t, ...
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4], int t) {
  const bool odd = t & 1, high = t & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
    (odd ? r[i] : r[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? r[i] : r[i + 2], 2);
    (high ? r[i] : r[i + 2]) = other;
  }
}

/// body(0), body(1), ... with compile-time numbers: loops whose registers the compiler would else put into
/// memory.
template <typename Body, int... i>
__device__ __forceinline__ void for_each(std::integer_sequence<int, i...>, const Body& body) {
  (body(std::integral_constant<int, i>{}), ...);
}

/// kTokens rows of x in the columns of a product, kUnits units of a warp in every row tile.
template <typename T, int kTokens, int kUnits, bool kNested>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) gemv_kernel(const __grid_constant__ Gemv<T> p) {
  constexpr int kGroup = 8 / kTokens, kPasses = kUnit / kGroup;  // tiles in the columns; groups of a unit
  extern __shared__ __align__(1024) char table[];
  float* const partial = reinterpret_cast<float*>(table + kTable4Bytes);  // [chunk][warps][16][kTokens]
  let_next_start();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int own = 2 * t / kTokens;  // the tile of a group whose columns this lane accumulates
  const uint32_t lane4 = lane * 4;
  const int splits = cluster_size(), rank = cluster_rank();
  const int first_unit = rank * p.units + warp;
  const int last_tiles = p.tiles - kUnit;  // a unit that would reach beyond the end begins here
  const auto first_tile = [&](int i) { return min((first_unit + i * warps) * kUnit, last_tiles); };

  const int64_t cluster = blockIdx.x / splits, step = p.gated ? 2 : 1;
  const int64_t begin = (cluster * p.each + min(cluster, p.rest)) * step;
  const int64_t end = begin + (p.each + (cluster < p.rest ? 1 : 0)) * step;
  const auto place = [&](int64_t row_tile) { return locate(p, min(row_tile, end - 1), kNested); };

  // of two buffers each is filled again as soon as it is decoded; an odd number of units moves one into the
  // other
  constexpr bool kEven = kUnits % 2 == 0;
  Unit<kNested> buffers[2];
  RowTile here = place(begin);
  buffers[0].fetch(here, first_tile(0), p.tiles, lane);
  if (kEven) buffers[1].fetch(here, first_tile(1), p.tiles, lane);
  fill_table4(table, p.book, kNested ? p.w[0].absmax.nested_code : nullptr);
  float offset[kMaxGroup] = {};
  bool same_map = true;  // the maps of all weights are that in the table
  if (kNested) {
#pragma unroll
    for (int part = 0; part < kMaxGroup; ++part) {
      if (part >= p.count) break;
      offset[part] = *p.w[part].absmax.offset;
      if (part == 0) continue;
      for (int i = threadIdx.x; i < 256; i += blockDim.x)
        same_map &= p.w[part].absmax.nested_code[i] == p.w[0].absmax.nested_code[i];
    }
  }
  same_map = __syncthreads_and(same_map);

  wait_for_results();
  uint32_t x[kUnits][kPasses][8];
  for_each(
      std::make_integer_sequence<int, kUnits>{}, [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value;
        const int unit = first_unit + i * warps, token = g % kTokens;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          const int tile = first_tile(i) + pass * kGroup + g / kTokens;
          const bool there = token < p.m && tile >= unit * kUnit && unit < (rank + 1) * p.units;
          const T* from = p.x + (static_cast<int64_t>(token) * p.tiles + tile) * kTileK + t * 8;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint4 piece = make_uint4(0, 0, 0, 0);
            if (there) piece = *reinterpret_cast<const uint4*>(from + half * 32);
            uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
            transpose_quad(words, t);
#pragma unroll
            for (int w = 0; w < 4; ++w) x[i][pass][half * 4 + w] = words[w];
          }
        }
      });

  int slot = 0;
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    const RowTile next = place(row_tile + 1);
    float acc[4] = {};
    for_each(
        std::make_integer_sequence<int, kUnits>{}, [&](auto index) __attribute__((always_inline)) {
          constexpr int i = decltype(index)::value;
          Unit<kNested>& unit = buffers[kEven ? i % 2 : 0];
          if (!kEven)
            buffers[1].fetch(i + 1 < kUnits ? here : next, first_tile((i + 1) % kUnits), p.tiles, lane);
          float2 scales = unit.scale;
          if (kNested) {
            const uint32_t low = unit.code & 255, high = unit.code >> 8;
            const float* map = p.w[here.part].absmax.nested_code;
            const float a = same_map ? map_value(table, low, lane4) : map[low];
            const float b = same_map ? map_value(table, high, lane4) : map[high];
            const float mean = here.part == 0 ? offset[0] : here.part == 1 ? offset[1] : offset[2];
            scales = make_float2(nested_value(a, scales.x, mean), nested_value(b, scales.y, mean));
          }
#pragma unroll
          for (int pass = 0; pass < kPasses; ++pass) {
            float sums[kGroup][4];
#pragma unroll
            for (int q = 0; q < kGroup; ++q) {
              const uint4 c = unit.codes[pass * kGroup + q];
              const uint32_t words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                uint32_t a[4];
                look_up(a, table, words[j], lane4);
                if (j == 0)
                  multiply_first(sums[q], a, x[i][pass][0], x[i][pass][1], T{});
                else
                  multiply(sums[q], a, x[i][pass][2 * j], x[i][pass][2 * j + 1], T{});
              }
            }
            float2 scale = scales;
            if (kPasses > 1) {  // lane t has the absmax of tile t
              scale.x = __shfl_sync(0xffffffffu, scales.x, pass * kGroup + own, 4);
              scale.y = __shfl_sync(0xffffffffu, scales.y, pass * kGroup + own, 4);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float sum = sums[0][e];
#pragma unroll
              for (int q = 1; q < kGroup; ++q) sum = own == q ? sums[q][e] : sum;
              acc[e] = fmaf(sum, e < 2 ? scale.x : scale.y, acc[e]);
            }
          }
          if (kEven)
            unit.fetch(i + 2 < kUnits ? here : next, first_tile((i + 2) % kUnits), p.tiles, lane);
          else
            unit = buffers[1];
        });
    here = next;

    // rows g and g + 8, tokens 2 t % kTokens and the next
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int between = 2; between >= kTokens / 2; between /= 2)
        acc[e] += __shfl_xor_sync(0xffffffffu, acc[e], between);
    }
    if (t < kTokens / 2) {
      float* to = partial + ((slot * warps + warp) * kTileRows + g) * kTokens + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(acc[0], acc[1]);
      *reinterpret_cast<float2*>(to + 8 * kTokens) = make_float2(acc[2], acc[3]);
    }
    if (++slot < p.chunk && row_tile + 1 < end) continue;

    __syncthreads();
    constexpr int kSums = kTileRows * kTokens;  // of a row tile
    const auto sum_of = [&](int slot, int at) {
      float sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) sum += partial[(slot * warps + w) * kSums + at];
      return sum;
    };
    if (splits > 1) {  // each block's sums in the place of its first warp's, then all blocks together
      for (int i = threadIdx.x; i < slot * kSums; i += blockDim.x)
        partial[i / kSums * warps * kSums + i % kSums] = sum_of(i / kSums, i % kSums);
      cluster_barrier();
    }
    const auto total_of = [&](int slot, int at) {
      if (splits == 1) return sum_of(slot, at);
      float sum = 0.0f;
      for (int r = 0; r < splits; ++r) sum += cluster_value(partial + slot * warps * kSums + at, r);
      return sum;
    };
    const int64_t first = row_tile + 1 - slot;
    const int results = slot / static_cast<int>(step) * kSums;
    for (int i = threadIdx.x + rank * blockDim.x; i < results; i += splits * blockDim.x) {
      const int at = i / kSums * static_cast<int>(step), row = i % kTileRows, token = i % kSums / kTileRows;
      if (token >= p.m) continue;
      const float total = total_of(at, row * kTokens + token);
      if (p.gated) {
        const int64_t column = (first + at) / 2 * kTileRows + row;
        float gate = total, up = total_of(at + 1, row * kTokens + token);
        if (p.out[0].bias) gate += p.out[0].bias_at(column);
        if (p.out[1].bias) up += p.out[1].bias_at(column);
        p.out[0].y[token * p.out[0].n + column] = from_float<T>(activate<true>(p.act, gate) * up);
      } else {
        int part = 0;
        while (part + 1 < p.count && first + at >= p.before[part + 1]) ++part;
        p.out[part].store(token, (first + at - p.before[part]) * kTileRows + row, total);
      }
    }
    slot = 0;
    if (splits > 1)
      cluster_barrier();
    else
      __syncthreads();
  }
}

struct Plan {
  int tokens, units, warps, splits, blocks_per_sm;
};

/// How K is divided; tokens = 0 where this kernel cannot. `row_tiles`: of a multiprocessor.
Plan plan_for(int arch, int64_t m, int64_t tiles, int64_t row_tiles) {
  Plan plan = {m <= 2 ? 2 : m <= 4 ? 4 : 8, 0, 0, 1, 1};
  // units whose x a warp has registers for; where K can be divided among blocks, those that leave room to
  // fetch ahead
  const int most = plan.tokens == 8 || arch >= 90 ? 2 : 4;
  const int64_t units = (tiles + kUnit - 1) / kUnit;
  if (m > 8 || tiles < kUnit) return {};
  while ((units + plan.splits - 1) / plan.splits > most * kMaxWarps) plan.splits *= 2;
  if (plan.splits > (arch >= 90 ? 8 : 1)) return {};
  // few idle places and many warps on a multiprocessor; of equals the one with fewer units a warp, but two
  // where there is much to stream
  const int share = static_cast<int>((units + plan.splits - 1) / plan.splits);
  double best = 0.0;
  for (int candidate = 1; candidate <= most; ++candidate) {
    const int warps = (share + candidate - 1) / candidate;
    if (warps > kMaxWarps) continue;
    const int blocks = plan.splits == 1 ? std::min(kMaxWarps / warps, 2) : 1;
    const double used = static_cast<double>(share) / (warps * candidate);
    double score = used * std::min(1.0, warps * blocks / 14.0);
    if (candidate == 2 && plan.tokens < 8 && row_tiles >= 8) score *= 1.01;
    if (score <= best) continue;
    best = score;
    plan.units = candidate;
    plan.warps = warps;
    plan.blocks_per_sm = blocks;
  }
  return plan;
}

template <typename T, bool kNested, int kTokens, int kUnits>
cudaError_t launch(const Launch& on, const Plan& plan, Gemv<T>& gemv) {
  const int64_t step = gemv.gated ? 2 : 1, all = gemv.before[gemv.count] / step;
  const int slot_bytes = plan.warps * kTileRows * kTokens * 4;
  const auto room_of = [&](int blocks) { return on.shared / blocks - 1024 - kTable4Bytes; };
  const int blocks = room_of(plan.blocks_per_sm) >= step * slot_bytes ? plan.blocks_per_sm : 1;
  const int64_t clusters = std::min<int64_t>(
      all, plan.splits > 1 ? std::max(on.clusters_of(plan.splits), 1) : on.multiprocessors * blocks);
  gemv.each = all / clusters;
  gemv.rest = all % clusters;
  const int64_t longest = (gemv.each + (gemv.rest > 0)) * step;
  gemv.chunk = static_cast<int>(std::min<int64_t>(longest, room_of(blocks) / slot_bytes / step * step));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(clusters * plan.splits));
  shape.block = dim3(plan.warps * 32);
  shape.shared = static_cast<size_t>(kTable4Bytes + gemv.chunk * slot_bytes);
  shape.cluster = static_cast<unsigned>(plan.splits);
  return launch_kernel(on, shape, gemv_kernel<T, kTokens, kUnits, kNested>, gemv);
}

template <typename T, bool kNested>
cudaError_t launch(const Launch& on, const Plan& plan, Gemv<T>& gemv) {
  switch (plan.tokens * 10 + plan.units) {
    case 21:
      return launch<T, kNested, 2, 1>(on, plan, gemv);
    case 22:
      return launch<T, kNested, 2, 2>(on, plan, gemv);
    case 23:
      return launch<T, kNested, 2, 3>(on, plan, gemv);
    case 24:
      return launch<T, kNested, 2, 4>(on, plan, gemv);
    case 41:
      return launch<T, kNested, 4, 1>(on, plan, gemv);
    case 42:
      return launch<T, kNested, 4, 2>(on, plan, gemv);
    case 43:
      return launch<T, kNested, 4, 3>(on, plan, gemv);
    case 44:
      return launch<T, kNested, 4, 4>(on, plan, gemv);
    case 81:
      return launch<T, kNested, 8, 1>(on, plan, gemv);
    case 82:
      return launch<T, kNested, 8, 2>(on, plan, gemv);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t run(const Launch& on, Gemv<T>& gemv) {
  const bool nested = !gemv.w[0].absmax.plain;
  gemv.tiles = static_cast<int>(gemv.w[0].k / kTileK);
  gemv.before[0] = 0;
  for (int i = 0; i < gemv.count; ++i) gemv.before[i + 1] = gemv.before[i] + gemv.w[i].n / kTileRows;
  const Plan plan = plan_for(on.arch, gemv.m, gemv.tiles, gemv.before[gemv.count] / on.multiprocessors);
  gemv.book = book_of<T>(gemv.w[0].type);
  const int units = (gemv.tiles + kUnit - 1) / kUnit;
  gemv.units = (units + plan.splits - 1) / plan.splits;
  return nested ? launch<T, true>(on, plan, gemv) : launch<T, false>(on, plan, gemv);
}

template <typename T>
Gemv<T> gemv_of(const Product4<T>* products, int count) {
  Gemv<T> gemv = {};
  for (int i = 0; i < count; ++i) {
    gemv.w[i] = products[i].w;
    gemv.out[i] = products[i].out;
  }
  gemv.count = count;
  gemv.x = products[0].x;
  gemv.m = static_cast<int>(products[0].m);
  return gemv;
}

}  // namespace

bool gemv4_takes(int arch, int64_t m, int64_t k) { return plan_for(arch, m, k / kTileK, 0).tokens > 0; }

template <typename T>
cudaError_t gemv4(const Launch& on, const Product4<T>* products, int count) {
  Gemv<T> gemv = gemv_of(products, count);
  return run(on, gemv);
}

template <typename T>
cudaError_t gemv4_gated(const Launch& on, const Product4<T>* products, Activation act) {
  Gemv<T> gemv = gemv_of(products, 2);
  gemv.gated = true;
  gemv.act = act;
  return run(on, gemv);
}

template cudaError_t gemv4(const Launch&, const Product4<half_t>*, int);
template cudaError_t gemv4(const Launch&, const Product4<bf16_t>*, int);
template cudaError_t gemv4_gated(const Launch&, const Product4<half_t>*, Activation);
template cudaError_t gemv4_gated(const Launch&, const Product4<bf16_t>*, Activation);

}  // namespace halfbyte::cuda
