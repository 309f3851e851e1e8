// Products of few tokens with the 4-bit experts that each has chosen: for every pair of a token and an expert
// that expert's weight is read once, at the rate of the memory.
//
// A block takes a run of row tiles of one pair (of tiles of gate and of up in turns); which expert's they are
// it learns from the ids. Its warps divide tiles and K among them: a warp has every `groups`-th tile, and of
// it every `splits`-th unit of 256 k. Where a block of the kernel before has ended one of this takes its
// place: it reads ids that are settled, and its first codes, while others still make x.
//
//   x       in shared memory, read as B fragments; of their 8 columns every other one is a tile of the unit,
//           the rest is zero: of the products with tile q column 2 q alone counts
//   codes   4 x 16 bytes a lane and unit, straight into registers, kAhead units ahead, across tiles
//   decode  a byte permute makes an address, a look-up makes two weights (table4.cuh): the A fragment
//   scale   sums of a tile's 64 k times absmax, in fp32
//   reduce  over the columns by shuffles, over warps through shared memory, in a fixed order
#include <algorithm>

#include "activation.cuh"
#include "experts.cuh"
#include "gemv4.cuh"
#include "mma.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kBlocks = 2;  // kBlocks: of a multiprocessor
constexpr int kTileWords = 36;  // of x in shared memory: 32, and 4 that spread tiles over the banks
constexpr int kMapBytes = 2 * 256 * 4;
constexpr int64_t kMostK = 32768;
constexpr double kRoundCost = 2.0;  // of filling the device with blocks, in row tiles

template <typename T>
struct Run {
  ExpertProduct<T> product;
  int tiles, units;
  int64_t each, rest;  // row tiles (pairs of them, when gated) of a block; the first `rest` have one more
  int splits, chunk;   // chunk: row tiles between two reductions
};

template <typename T, bool kNested, bool kGated, int kPlaces>
__global__ void __launch_bounds__(kThreads, kBlocks)
    experts_gemv_kernel(const __grid_constant__ ExpertTable<kPlaces> table,
                        const __grid_constant__ Run<T> p) {
#if !HALFBYTE_SM75  // which has no tiled weights
  constexpr int kParts = kGated ? 2 : 1, kAhead = 3;
  extern __shared__ __align__(1024) char shared[];
  uint32_t* const xs = reinterpret_cast<uint32_t*>(shared + kTable4Bytes);  // [tiles][kTileWords]
  float* const map = reinterpret_cast<float*>(xs + p.tiles * kTileWords);   // [2][256]
  float* const partial = map + 2 * 256;                                     // [chunk][splits][16]

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  if (!p.product.settled) {
    fill_table4(shared, p.product.book, nullptr);
    wait_for_results();
  }
  const int pair = blockIdx.y, id = __ldcg(p.product.ids + pair);
  const int64_t begin = blockIdx.x * p.each + min(static_cast<int64_t>(blockIdx.x), p.rest);
  const int64_t items = p.each + (blockIdx.x < p.rest ? 1 : 0);
  T* const y = p.product.y + pair * p.product.n;
  if (id < 0 || id >= p.product.experts) {
    if (p.product.settled) wait_for_results();
    for (int64_t i = threadIdx.x; i < items * kTileRows; i += kThreads)
      y[begin * kTileRows + i] = from_float<T>(NAN);
    return;
  }

  const int64_t slots = items * kParts;
  const int split = warp % p.splits, group = warp / p.splits, groups = kWarps / p.splits;
  const auto place = [&](int64_t slot) {
    const int part = kGated ? static_cast<int>(slot % 2) : 0;
    const ExpertPlace& at = table.at[part * p.product.experts + id];
    return row_tile_of(at.codes, at.absmax, at.nested, kNested, (begin + slot / kParts) * p.tiles, part);
  };
  const int last_first = p.tiles - kUnit;  // a unit that would reach beyond the end begins here

  for (int64_t chunk = 0; chunk < slots; chunk += p.chunk) {
    const int64_t end = min(chunk + p.chunk, slots);
    // what is fetched next
    int64_t fetch_slot = chunk + group;
    int fetch_unit = split;
    RowTile from = place(min(fetch_slot, slots - 1));
    Unit<kNested> units[kAhead];
    const auto fetch = [&](Unit<kNested> & unit) __attribute__((always_inline)) {
      if (fetch_slot >= end || split >= p.units) return;
      unit.fetch(from, min(fetch_unit * kUnit, last_first), p.tiles, lane);
      fetch_unit += p.splits;
      if (fetch_unit < p.units) return;
      fetch_unit = split;
      fetch_slot += groups;
      if (fetch_slot < end) from = place(fetch_slot);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(units[i]);

    float offset[kParts] = {};
    if (chunk == 0) {
      if (p.product.settled) fill_table4(shared, p.product.book, nullptr);
      if (kNested) {
        for (int i = threadIdx.x; i < 256 * kParts; i += kThreads)
          map[i] = table.at[i / 256 * p.product.experts + id].nested_code[i % 256];
      }
      if (p.product.settled) wait_for_results();
      let_next_start();
      const T* const x = p.product.x + static_cast<int64_t>(pair / p.product.each) * p.product.k;
      if (is_aligned(x, 16)) {
        for (int i = threadIdx.x; i < p.tiles * 8; i += kThreads)
          *reinterpret_cast<uint4*>(xs + i / 8 * kTileWords + i % 8 * 4) =
              *reinterpret_cast<const uint4*>(x + i * 8);
      } else {
        for (int i = threadIdx.x; i < p.tiles * 64; i += kThreads)
          reinterpret_cast<T*>(xs)[i / 64 * kTileWords * 2 + i % 64] = x[i];
      }
      __syncthreads();
    }
    if (kNested) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        offset[part] = *table.at[part * p.product.experts + id].offset;
    }

    float low = 0.0f, high = 0.0f;
    int64_t slot = chunk + group;
    int unit = split;
    const auto multiply_unit = [&](Unit<kNested> & codes) __attribute__((always_inline)) {
      const int first = min(unit * kUnit, last_first);
      const bool there = g % 2 == 0 && first + g / 2 >= unit * kUnit;
      uint32_t x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = there ? xs[(first + g / 2) * kTileWords + 4 * i + t] : 0u;
      float2 scale = codes.scale;
      if (kNested) {
        const int part = kGated ? static_cast<int>(slot % 2) : 0;
        const float mean = kGated && part ? offset[kParts - 1] : offset[0];
        scale.x = nested_value(map[part * 256 + (codes.code & 255)], scale.x, mean);
        scale.y = nested_value(map[part * 256 + (codes.code >> 8)], scale.y, mean);
      }
      float sum_low = 0.0f, sum_high = 0.0f;
#pragma unroll
      for (int q = 0; q < kUnit; ++q) {
        const uint4 c = codes.codes[q];
        const uint32_t words[4] = {c.x, c.y, c.z, c.w};
        float sums[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          look_up(a, shared, words[j], lane4);
          if (j == 0)
            multiply_first(sums, a, x[0], x[1], T{});
          else
            multiply(sums, a, x[2 * j], x[2 * j + 1], T{});
        }
        sum_low = q == t ? sums[0] : sum_low;
        sum_high = q == t ? sums[2] : sum_high;
      }
      low = fmaf(sum_low, scale.x, low);
      high = fmaf(sum_high, scale.y, high);
      unit += p.splits;
      if (unit < p.units) return;
      unit = split;
#pragma unroll
      for (int between = 1; between < 4; between *= 2) {
        low += __shfl_xor_sync(0xffffffffu, low, between);
        high += __shfl_xor_sync(0xffffffffu, high, between);
      }
      if (t == 0) {
        float* const to = partial + ((slot - chunk) * p.splits + split) * kTileRows + g;
        to[0] = low;
        to[8] = high;
      }
      low = high = 0.0f;
      slot += groups;
    };
    if (split < p.units) {
      while (slot < end) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (slot >= end) break;
          multiply_unit(units[i]);
          fetch(units[i]);
        }
      }
    }
    __syncthreads();

    const int used = min(p.splits, p.units);
    const auto total_of = [&](int64_t at, int row) {
      float sum = 0.0f;
      for (int s = 0; s < used; ++s) sum += partial[(at * p.splits + s) * kTileRows + row];
      return sum;
    };
    for (int64_t i = threadIdx.x; i < (end - chunk) / kParts * kTileRows; i += kThreads) {
      const int64_t at = i / kTileRows * kParts;
      const int row = static_cast<int>(i % kTileRows);
      const int64_t column = (begin + chunk / kParts) * kTileRows + i;
      float value = total_of(at, row) + bias_value(table.at[id].bias, p.product.bias_dtype[0], column);
      if (kGated) {
        const void* const bias = table.at[p.product.experts + id].bias;
        const float up = total_of(at + 1, row) + bias_value(bias, p.product.bias_dtype[1], column);
        value = activate<true>(p.product.act, value) * up;
      }
      y[column] = from_float<T>(value);
    }
    __syncthreads();
  }
#endif
}

template <typename T, bool kNested, bool kGated, int kPlaces>
cudaError_t launch(const Launch& on, const ExpertProduct<T>& product, const ExpertTable<kPlaces>& table) {
  constexpr int kParts = kGated ? 2 : 1;
  Run<T> run = {};
  run.product = product;
  run.tiles = static_cast<int>(product.k / kTileK);
  run.units = (run.tiles + kUnit - 1) / kUnit;
  const int64_t items = product.n / kTileRows;

  // how many blocks a pair gets: what the block with most of them has to do, in row tiles, for each time that
  // the device is full of blocks
  const int64_t places = kBlocks * on.multiprocessors;
  int64_t blocks = 1;
  double least = 0.0;
  const int64_t most = std::min<int64_t>(items, 4 * kBlocks * on.multiprocessors / product.pairs + 1);
  for (int64_t b = 1; b <= most; ++b) {
    const int64_t rounds = (product.pairs * b + places - 1) / places;
    const double cost =
        static_cast<double>(rounds) * (kRoundCost + static_cast<double>((items + b - 1) / b * kParts));
    if (b > 1 && cost >= least) continue;
    least = cost;
    blocks = b;
  }
  run.each = items / blocks;
  run.rest = items % blocks;

  // how warps divide K: the fewest units of a warp
  const int64_t slots = (run.each + (run.rest > 0)) * kParts;
  int64_t fewest = INT64_MAX;
  for (int splits = 1; splits <= kWarps; splits *= 2) {
    const int64_t groups = kWarps / splits;
    const int64_t units = (slots + groups - 1) / groups * ((run.units + splits - 1) / splits);
    if (units >= fewest) continue;
    fewest = units;
    run.splits = splits;
  }
  const int fixed = kTable4Bytes + run.tiles * kTileWords * 4 + kMapBytes,
            slot_bytes = run.splits * kTileRows * 4;
  // no more than lets kBlocks run, unless one needs it
  const int64_t share = on.shared / kBlocks - 1024;
  const int64_t given = fixed + kParts * slot_bytes <= share ? share : on.block_shared;
  const int64_t room = (given - fixed) / slot_bytes / kParts * kParts;
  run.chunk = static_cast<int>(std::min<int64_t>(slots, room));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(product.pairs));
  shape.block = dim3(kThreads);
  shape.shared = static_cast<size_t>(fixed + run.chunk * slot_bytes);
  return launch_kernel(on, shape, experts_gemv_kernel<T, kNested, kGated, kPlaces>, table, run);
}

}  // namespace

bool experts_gemv4_takes(const Launch& on, int64_t k) {
  const int64_t fixed = kTable4Bytes + k / kTileK * kTileWords * 4 + kMapBytes;
  return k >= kUnit * kTileK && k <= kMostK && fixed + 2 * kWarps * kTileRows * 4 <= on.block_shared;
}

template <typename T>
cudaError_t experts_gemv4(const Launch& on, const ExpertProduct<T>& product, const ExpertPlaces& places) {
  return with_table(places, [&](const auto& table) {
    constexpr int kPlaces = std::remove_reference_t<decltype(table)>::kPlaces;
    if (product.gated)
      return product.nested ? launch<T, true, true, kPlaces>(on, product, table)
                            : launch<T, false, true, kPlaces>(on, product, table);
    return product.nested ? launch<T, true, false, kPlaces>(on, product, table)
                          : launch<T, false, false, kPlaces>(on, product, table);
  });
}

template cudaError_t experts_gemv4(const Launch&, const ExpertProduct<half_t>&, const ExpertPlaces&);
template cudaError_t experts_gemv4(const Launch&, const ExpertProduct<bf16_t>&, const ExpertPlaces&);

}  // namespace halfbyte::cuda
