// y = x w^T + bias + residual with a tiled 4-bit weight and up to 8 rows of 16-bit x: the weight is read
// once, at the rate of the memory. Also several weights that share x in one launch (q, k, v), and
// act(gate) * up.
//
// A block takes a run of row tiles; its warps divide K. A unit is 4 tiles, 256 k; warp w has the units w,
// w + warps, ... of every row tile, so a block reads one contiguous stream, and x, whose part a warp meets
// again and again, stays in its registers from beginning to end:
//
//   codes   4 x 16 bytes a lane and unit, straight into registers, one unit or two ahead
//   decode  a byte permute makes an address, a look-up makes two weights (table4.cuh): the A fragment
//   mma     m16n8k16. Its 8 columns are kTokens rows of x for each of 8 / kTokens tiles: column c holds x of
//           the group's tile c / kTokens, so of the products with tile q only those columns count, and each
//           lane keeps x of one tile only. The lane that accumulates a column also scales it. One row of x:
//           the 8 tiles are those of two units.
//   scale   sums of a tile's 64 k times absmax, in fp32
//   reduce  over the columns' tiles by shuffles; over warps, and over the blocks of a cluster where K is
//           divided among them, through shared memory after several row tiles at once; in a fixed order
//
// One and two rows of x on sm_90, and three and four of a small weight: gemv4_sm90.cu, but for long K.
//
// Fast where K / 256 divides among 8 to 16 warps without a rest and there are 132 row tiles or more. K beyond
// 16384 (8192 where there are more than 2 rows of x) is divided among blocks.
#include <algorithm>

#include "gemv4_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

/// Offsets of the nested absmax of all weights. False for a thread that has seen a map unlike the first one.
template <typename T>
__device__ __forceinline__ bool read_nested(float (&offset)[kMaxGroup], const Gemv<T>& p) {
  bool same_map = true;
#pragma unroll
  for (int i = 0; i < kMaxGroup; ++i) {
    if (i >= p.count) break;
    offset[i] = *p.w[i].absmax.offset;
    if (i == 0) continue;
    for (int j = threadIdx.x; j < 256; j += blockDim.x)
      same_map &= p.w[i].absmax.nested_code[j] == p.w[0].absmax.nested_code[j];
  }
  return same_map;
}

/// kTokens rows of x in the columns of a product, kUnits units of a warp in every row tile, an even number
/// where kTokens is 1.
template <typename T, int kTokens, int kUnits, bool kNested>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) gemv_kernel(const __grid_constant__ Gemv<T> p) {
  constexpr int kGroup = 8 / kTokens;                           // tiles in the columns
  constexpr int kPasses = kGroup < kUnit ? kUnit / kGroup : 1;  // groups of a unit
  constexpr int kJoined = kGroup > kUnit ? kGroup / kUnit : 1;  // units of a group
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

  const int cluster = blockIdx.x / splits, step = p.gated ? 2 : 1;
  const int begin = (cluster * p.each + min(cluster, p.rest)) * step;
  const int end = begin + (p.each + (cluster < p.rest ? 1 : 0)) * step;
  const auto place = [&](int row_tile) { return locate(p, min(row_tile, end - 1), kNested); };
  // Two units are under way: of two buffers each is filled again as soon as it is decoded; an odd number of
  // units moves one into the other. Where x takes the registers there is one buffer, and each of its tiles is
  // filled again as soon as it is decoded.
  constexpr bool kInPlace = kTokens <= 2 && kUnits > 2, kEven = !kInPlace && kUnits % 2 == 0;
  constexpr int kAhead = kEven ? 2 : 1;
  Unit<kNested> buffers[2];  // in place: of the second one only the absmax
  const auto own_unit = [&](const RowTile& at, int i) {
    // for the compiler a number of each row tile's own: else it keeps the places of all units in registers
    asm("" : "+r"(i) : "l"(at.codes));
    return i;
  };
  // of a group of two units lane t has the absmax of tiles 2 t and 2 t + 1, which come with the first
  const auto fetch_scale = [&](const RowTile& at, int i, int buffer) __attribute__((always_inline)) {
    if (kJoined == 1) {
      buffers[buffer].fetch_scale(at, first_tile(i) + t, p.tiles, lane);
    } else {
      const int tile = first_tile(i + t / 2) + t % 2 * 2;
      buffers[0].fetch_scale(at, tile, p.tiles, lane);
      buffers[1].fetch_scale(at, tile + 1, p.tiles, lane);
    }
  };
  const auto fetch = [&](const RowTile& at, int i, int buffer) __attribute__((always_inline)) {
    const int unit = own_unit(at, i);
    buffers[buffer].fetch_codes(at, first_tile(unit), lane);
    if (kJoined == 1 || buffer == 0) fetch_scale(at, unit, buffer);
  };
  RowTile from = place(begin);  // the one whose units are fetched
  int part = from.part;         // of the one whose units are multiplied
  fetch(from, 0, 0);
  if (kEven) fetch(from, 1, 1);
  fill_table4(table, p.book, kNested ? p.w[0].absmax.nested_code : nullptr);
  float offset[kMaxGroup] = {};
  bool same_map = !kNested || read_nested(offset, p);  // the maps of all weights are that in the table

  wait_for_results();
  constexpr int kGroups = kUnits / kJoined * kPasses;
  uint32_t x[kGroups][8];
  for_each(
      std::make_integer_sequence<int, kGroups>{}, [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, kPass = i % kPasses;
        const int token = g % kTokens, column_tile = g / kTokens;
        const int of_warp = i / kPasses * kJoined + column_tile / kUnit, unit = first_unit + of_warp * warps;
        const int tile = first_tile(of_warp) + kPass * kGroup + column_tile % kUnit;
        const bool there = token < p.m && tile >= unit * kUnit && unit < (rank + 1) * p.units;
        load_x(x[i], p, place_of_x(p, token, tile, there, t));
      });
  same_map = __syncthreads_and(same_map);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) transpose_quad(x[i], t);

  int slot = 0;
  for (int row_tile = begin; row_tile < end; ++row_tile) {
    float acc[4] = {};
    float2 scales[kJoined];
    for_each(
        std::make_integer_sequence<int, kUnits>{}, [&](auto index) __attribute__((always_inline)) {
          constexpr int i = decltype(index)::value, kBuffer = kEven ? i % 2 : 0;
          constexpr int kNext = (i + kAhead) % kUnits;  // the unit that is fetched
          Unit<kNested>& unit = buffers[kBuffer];
          if (i + kAhead == kUnits) from = place(row_tile + 1);
          if (kAhead == 1 && !kInPlace) fetch(from, kNext, 1);
#pragma unroll
          for (int j = 0; j < kJoined; ++j) {
            if (i % kJoined != 0) break;
            const Unit<kNested>& coded = kJoined == 1 ? unit : buffers[j];
            scales[j] = coded.scale;
            if (kNested) {
              const uint32_t low = coded.code & 255, high = coded.code >> 8;
              const float* values = p.w[part].absmax.nested_code;
              const float a = same_map ? map_value(table, low, lane4) : values[low];
              const float b = same_map ? map_value(table, high, lane4) : values[high];
              const float mean = part == 0 ? offset[0] : part == 1 ? offset[1] : offset[2];
              scales[j] =
                  make_float2(nested_value(a, coded.scale.x, mean), nested_value(b, coded.scale.y, mean));
            }
          }
          const int next_unit = own_unit(from, kNext);
          const uint4* const next = unit_codes(from, first_tile(next_unit), lane);
          const auto multiply_tile = [&](float(&sums)[4], int tile, const uint32_t(&x)[8])
              __attribute__((always_inline)) {
            const uint4 c = unit.codes[tile];
            const uint32_t words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              uint32_t a[4];
              look_up(a, table, words[j], lane4);
              if (j == 0)
                multiply_first(sums, a, x[0], x[1], T{});
              else
                multiply(sums, a, x[2 * j], x[2 * j + 1], T{});
            }
            if (kInPlace) unit.codes[tile] = load_once(next + tile * 32);
          };
          if constexpr (kJoined == 2) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              float sums[2][4];
              multiply_tile(sums[0], 2 * pair, x[i / 2]);
              multiply_tile(sums[1], 2 * pair + 1, x[i / 2]);
              if (t == i % 2 * 2 + pair) {  // columns 2 t and 2 t + 1 are of one sum
                acc[0] = fmaf(sums[0][0], scales[0].x, fmaf(sums[1][1], scales[1].x, acc[0]));
                acc[2] = fmaf(sums[0][2], scales[0].y, fmaf(sums[1][3], scales[1].y, acc[2]));
              }
            }
          } else {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
              float sums[kGroup][4];
#pragma unroll
              for (int q = 0; q < kGroup; ++q)
                multiply_tile(sums[q], pass * kGroup + q, x[i * kPasses + pass]);
              float2 scale = scales[0];
              if (kPasses > 1) {  // lane t has the absmax of tile t
                scale.x = __shfl_sync(0xffffffffu, scale.x, pass * kGroup + own, 4);
                scale.y = __shfl_sync(0xffffffffu, scale.y, pass * kGroup + own, 4);
              }
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float sum = sums[0][e];
#pragma unroll
                for (int q = 1; q < kGroup; ++q) sum = own == q ? sums[q][e] : sum;
                acc[e] = fmaf(sum, e < 2 ? scale.x : scale.y, acc[e]);
              }
            }
          }
          if (kInPlace) {
            if (i % kJoined == kJoined - 1) fetch_scale(from, next_unit, 0);
          } else if (kEven) {
            fetch(from, kNext, kBuffer);
          } else {
            unit = buffers[1];
          }
        });
    part = from.part;

    put_sums<kTokens>(acc, partial + slot * warps * kTileRows * kTokens, warp, lane);
    if (++slot < p.chunk && row_tile + 1 < end) continue;
    finish_row_tiles<kTokens>(p, partial, row_tile + 1 - slot, slot);
    slot = 0;
  }
}

struct Plan {
  int tokens, units, warps, splits, blocks_per_sm;
};

/// How K is divided; tokens = 0 where this kernel cannot. `row_tiles`: of a multiprocessor.
Plan plan_for(int arch, int64_t m, int64_t tiles, int64_t row_tiles) {
  Plan plan = {m <= 2 ? 2 : m <= 4 ? 4 : 8, 0, 0, 1, 1};
  const int64_t units = (tiles + kUnit - 1) / kUnit;
  if (m > 8 || tiles < kUnit) return {};
  // one row of x: where a warp has two units, or more
  if (m == 1 && (units > kMaxWarps || row_tiles >= 8)) plan.tokens = 1;
  // units whose x a warp has registers for; where K is divided among blocks, as many as leave room for two
  // that are under way
  int most = plan.tokens <= 2 || (plan.tokens == 4 && arch < 90) ? 4 : 2;
  if (units > most * kMaxWarps) most = 2;
  while ((units + plan.splits - 1) / plan.splits > most * kMaxWarps) plan.splits *= 2;
  if (plan.splits > (arch >= 90 ? 8 : 1)) return {};
  // few idle places and many warps on a multiprocessor; of equals the one with fewer units a warp, but two
  // where there is much to stream
  const int share = static_cast<int>((units + plan.splits - 1) / plan.splits);
  double best = 0.0;
  for (int candidate = 1; candidate <= most; ++candidate) {
    if (plan.tokens == 1 && candidate % 2 != 0) continue;
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
  const int step = gemv.gated ? 2 : 1, all = gemv.before[gemv.count] / step;
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
    case 12:
      return launch<T, kNested, 1, 2>(on, plan, gemv);
    case 14:
      return launch<T, kNested, 1, 4>(on, plan, gemv);
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
  gemv.book = book_of<T>(gemv.w[0].type);
  if (gemv4_sm90_takes(on, gemv)) return gemv4_sm90(on, gemv);
  const Plan plan = plan_for(on.arch, gemv.m, gemv.tiles, gemv.before[gemv.count] / on.multiprocessors);
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
