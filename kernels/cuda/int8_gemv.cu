// The LLM.int8() layer for 1 to 16 rows of x in one launch: the weight is read once, at the rate of the
// memory.
//
// Blocks take row tiles (16 rows of the weight) in turn, so that all read in one neighbourhood; a block's
// warps divide K, and where its codes of x would take too much room, the blocks of a cluster do so too.
//
//   weights   unit = 64 k of a row tile: 16 bytes a lane of row g and of row g + 8, straight into registers,
//             kAhead units ahead. Those bytes are the A fragments of two mma m16n8k32 as they are: the order
//             of k within a unit is free as long as x has the same
//   x         every block quantises its part of x itself while its first weights are on their way: codes in
//             shared memory [unit][row of x][64], from where 16 bytes a lane are the B fragments
//   outliers  each block sees all rows of its columns, so it finds the outlier columns of its part itself.
//             Their x is kept in shared memory, and as their weights come by, those are put there too: of the
//             first kPicked columns; what is beyond is read again
//   reduce    over warps, and over the blocks of a cluster, through shared memory after several row tiles at
//             once; in a fixed order. Then the outliers' sums, in fp32
//
// Shared memory is taken from the L1 cache, which holds the lines that loads in flight wait for: with little
// of it left they wait for each other. Hence kSumBytes.
// Fast where K / 64 divides among 16 warps without a rest and there are 132 row tiles or more.
#include "int8_gemv.cuh"

#include <algorithm>

#include "cluster.cuh"
#include "int8_rows.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kAhead = 4;  // units
constexpr int kMaxWarps = 16, kUnit = 64, kTile = 16, kMaxRows = 16;
constexpr int kSumStride = kTile + 4;  // of sums of a row of x: without bank conflicts
constexpr int kScales = 2048;          // rows of a block whose scb is fetched ahead
constexpr int kPicked = 128;           // outlier columns of a block that are picked from the stream
constexpr int kSumBytes = 24 << 10;    // of sums and picked weights between two reductions
constexpr int kCodeBytes = 136 << 10;  // of codes of x in a block

template <typename T>
struct Gemv8 {
  Linear8<T> layer;
  int m, k;
  int units;           // of 64 k, of all blocks of a cluster together
  int64_t each, rest;  // row tiles of a cluster; the first `rest` have one more
  int chunk;           // row tiles between two reductions
};

/// Where the parts of a block's shared memory begin.
struct Room {
  int codes, scales, bits, prefix, values, picked, sums, total;

  __host__ __device__ Room(int m, int units, int64_t rows, int chunk, int warps, bool threshold) {
    const int columns = threshold ? units * kUnit : 0;
    codes = 0;
    scales = codes + units * kUnit * m;
    bits = scales + static_cast<int>(rows < kScales ? rows : kScales) * 4;
    prefix = bits + columns / 8;
    values = prefix + columns / 16;
    picked = values + (threshold ? kPicked * m * 4 : 0);
    sums = picked + (threshold ? chunk * kPicked * kTile : 0);
    total = sums + chunk * warps * m * kSumStride * 4;
  }
};

__device__ __forceinline__ void multiply8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ float most_of_warp(float x) {  // x >= 0
#if __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
  return warp_max(x);
#endif
}

__device__ __forceinline__ int sum_of_warp(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
#endif
}

/// Outlier columns are added up so many at a time, with zeros behind the last.
__device__ __forceinline__ int padded(int count) { return (count + 7) / 8 * 8; }

__device__ __forceinline__ uint32_t byte_of(const uint4& v, int i) {
  const uint32_t low = i & 4 ? v.y : v.x, high = i & 4 ? v.w : v.z;
  return (i & 8 ? high : low) >> (i % 4 * 8) & 255;
}

/// kGroups: of 8 rows of x. kKept: pieces of x in a lane's registers. kThreshold: there may be outliers.
template <typename T, int kGroups, int kKept, bool kThreshold>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) gemv8_kernel(const __grid_constant__ Gemv8<T> p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ unsigned most_of[kMaxRows], part_most[kMaxRows];
  __shared__ int counts[kMaxWarps], found;
  __shared__ float outlier_part;  // not 0: this block's sums are floats
  let_next_start();

  const Linear8<T>& layer = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4, m = p.m;
  const int splits = cluster_size(), rank = cluster_rank();
  const int unit_share = p.units / splits, unit_rest = p.units % splits;
  const int block_unit = rank * unit_share + min(rank, unit_rest);
  const int block_units = unit_share + (rank < unit_rest ? 1 : 0);
  const int own = block_units / warps + (warp < block_units % warps ? 1 : 0);  // units of this warp

  const int64_t cluster = blockIdx.x / splits, clusters = gridDim.x / splits;
  const int64_t tiles = p.each + (cluster < p.rest ? 1 : 0);
  const Room room(m, (p.units + splits - 1) / splits, (p.each + 1) * kTile, p.chunk, warps, kThreshold);
  int8_t* const codes = reinterpret_cast<int8_t*>(shared + room.codes);
  float* const scales = reinterpret_cast<float*>(shared + room.scales);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(shared + room.bits);
  uint16_t* const prefix = reinterpret_cast<uint16_t*>(shared + room.prefix);  // outliers before each word
  float* const values = reinterpret_cast<float*>(shared + room.values);        // [kPicked][m] of x
  int8_t* const picked = reinterpret_cast<int8_t*>(shared + room.picked);      // [chunk][kPicked][kTile]
  int* const sums = reinterpret_cast<int*>(shared + room.sums);  // [chunk][warps][m][kSumStride]

  // the stream of this warp's weights: unit after unit of a row tile, tile after tile
  const int64_t last_row = layer.out.n - 1;
  const auto row_at = [&](int64_t tile, int row) {
    return layer.weight + min((cluster + tile * clusters) * kTile + row, last_row) * layer.k;
  };
  const int lane_k = (block_unit + warp) * kUnit + t * 16;
  int64_t next_tile = 0;
  int next_unit = 0;
  const int8_t *next_low = row_at(0, g), *next_high = row_at(0, g + 8);
  uint4 low[kAhead], high[kAhead];
  const auto fetch = [&](int slot) {
    if (next_tile >= tiles) return;
    // the rest of the last unit meets zeros of x
    const int at = min(lane_k + next_unit * warps * kUnit, p.k - 16);
    low[slot] = __ldcs(reinterpret_cast<const uint4*>(next_low + at));
    high[slot] = __ldcs(reinterpret_cast<const uint4*>(next_high + at));
    if (++next_unit < own) return;
    next_unit = 0;
    ++next_tile;
    next_low = row_at(next_tile, g);
    next_high = row_at(next_tile, g + 8);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(i);

  if (kThreshold) {
    for (int i = threadIdx.x; i < block_units * 2; i += blockDim.x) bits[i] = 0;
    if (threadIdx.x == 0) found = 0;
  }
  if (threadIdx.x < kMaxRows) part_most[threadIdx.x] = 0;
  __syncthreads();
  wait_for_results();

  // this thread's first of scb is on its way while the largest of x are found
  const int scales_here = min(static_cast<int>(tiles) * kTile, kScales), own_scale = threadIdx.x;
  const auto scb_at = [&](int i) {
    return layer.scb[min((cluster + i / kTile * clusters) * kTile + i % kTile, last_row)];
  };
  const float first_scale = own_scale < scales_here ? scb_at(own_scale) : 0.0f;

  // x: teams of warps take a row each; a warp's pieces of it are 32 lanes wide, `teams` apart
  using Part = Piece<T, 16 / sizeof(T)>;
  constexpr int kWide = 16 / sizeof(T);
  const int first_k = block_unit * kUnit, columns = block_units * kUnit;
  const int pieces = (columns + 32 * kWide - 1) / (32 * kWide);
  const int teams = max(warps / m, 1), team = warps >= m ? warp / m : 0;
  const int first_row = warps >= m ? warp % m : warp;
  const int mine = team < teams && team < pieces ? (pieces - team + teams - 1) / teams : 0;
  const Threshold<T> threshold(layer.threshold);
  const auto column_of = [&](int i) { return ((team + i * teams) * 32 + lane) * kWide; };
  const auto fetch_x = [&](int row, int i) {
    const int at = column_of(i);
    return at < columns && first_k + at < p.k ? Part::load(layer.x + row * layer.k + first_k + at)
                                              : Part::zero();
  };
  Part kept[kKept];  // the last that were fetched
  const auto fetch_some = [&](int row, int at) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (at + i < mine) kept[i] = fetch_x(row, at + i);
    }
  };
  for (int row = first_row; row < m && mine > 0; row += warps) {
    float most = 0.0f;
#pragma unroll 1
    for (int at = 0; at < mine; at += kKept) {
      fetch_some(row, at);
      unsigned hot = 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (at + i >= mine) continue;
        const float here = kept[i].most();
        if (kThreshold && here >= layer.threshold)
          hot |= 1u << i;
        else
          most = fmaxf(most, here);
      }
      for (; kThreshold && hot; hot &= hot - 1) {
        const int i = at + __ffs(static_cast<int>(hot)) - 1, column = column_of(i);
        Part part = fetch_x(row, i);
        atomicOr(bits + column / 32, part.take_outliers(threshold) << (column % 32));
        found = 1;
        most = fmaxf(most, part.most());
      }
    }
    most = most_of_warp(most);
    if (lane == 0) atomicMax(part_most + row, __float_as_uint(most));
  }
  if (own_scale < scales_here) scales[own_scale] = first_scale;
  for (int i = own_scale + blockDim.x; i < scales_here; i += blockDim.x) scales[i] = scb_at(i);
  __syncthreads();

  int count = 0;  // of this block's outlier columns
  if (kThreshold && found) {
    const int words = block_units * 2, each = (words + warps - 1) / warps;
    const int from = warp * each, to = min(from + each, words);
    int here = 0;
    for (int w = from + lane; w < to; w += 32) here += __popc(bits[w]);
    here = sum_of_warp(here);
    if (lane == 0) counts[warp] = here;
    __syncthreads();
    const int other = lane < warps ? counts[lane] : 0;
    int before = sum_of_warp(lane < warp ? other : 0);
    count = sum_of_warp(other);
    for (int base = from; base < to; base += 32) {
      const int w = base + lane;
      const uint32_t word = w < to ? bits[w] : 0;
      int through = __popc(word);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += left;
      }
      if (w < to) prefix[w] = static_cast<uint16_t>(before + through - __popc(word));
      before += __shfl_sync(0xffffffffu, through, 31);
    }
    for (int i = threadIdx.x + count * m; i < min(padded(count), kPicked) * m; i += blockDim.x)
      values[i] = 0.0f;
  }
  if (kThreshold && threadIdx.x == 0) outlier_part = count > 0 ? 1.0f : 0.0f;
  const unsigned* most = part_most;
  if (splits > 1) {
    cluster_barrier();
    if (threadIdx.x < m) {
      unsigned all = 0;
      for (int r = 0; r < splits; ++r) {
        const float part = cluster_value(reinterpret_cast<const float*>(part_most) + threadIdx.x, r);
        all = max(all, __float_as_uint(part));
      }
      most_of[threadIdx.x] = all;
    }
    __syncthreads();
    most = most_of;
  } else if (count > 0) {
    __syncthreads();
  }

  const auto encode = [&](int row, int column, const RowScale& scale, Part part) {
    part.forget();
    Vec<uint32_t, kWide / 4> words;
    part.encode(scale, words.v);
    int8_t* const to = codes + (column / kUnit * m + row) * kUnit + column % kUnit;
    *reinterpret_cast<Vec<uint32_t, kWide / 4>*>(to) = words;
  };
  const auto outliers_at = [&](int column) {
    return bits[column / 32] >> (column % 32) & ((1u << kWide) - 1);
  };
  const bool all_kept = first_row + warps >= m && mine <= kKept;
  for (int row = first_row; row < m && mine > 0; row += warps) {
    const RowScale scale(__uint_as_float(most[row]));
#pragma unroll 1
    for (int at = 0; at < mine; at += kKept) {
      if (!all_kept) fetch_some(row, at);
      unsigned hot = 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int column = column_of(at + i);
        if (at + i >= mine || column >= columns) continue;
        encode(row, column, scale, kept[i]);
        if (kThreshold && count > 0 && outliers_at(column)) hot |= 1u << i;
      }
      for (; kThreshold && hot; hot &= hot - 1) {  // again, without the outliers
        const int i = at + __ffs(static_cast<int>(hot)) - 1, column = column_of(i);
        const unsigned outliers = outliers_at(column);
        int index = prefix[column / 32] + __popc(bits[column / 32] & ((1u << (column % 32)) - 1));
        const T* const x = layer.x + row * layer.k + first_k + column;
        for (unsigned left = outliers; left && index < kPicked; left &= left - 1, ++index)
          values[index * m + row] = to_float(x[__ffs(static_cast<int>(left)) - 1]);
        Part part = fetch_x(row, i);
        part.clear(outliers);
        encode(row, column, scale, part);
      }
    }
  }
  __syncthreads();

  int64_t tile = 0;
  int unit = 0, slot = 0;
  int acc[kGroups][4] = {};
  const int8_t* const x_at = codes + warp * kUnit * m + t * 16;
  const int x_step = warps * kUnit * m;
  const int token0 = min(g, m - 1) * kUnit, token1 = min(g + 8, m - 1) * kUnit;

  uint32_t hot = 0;  // units with outliers, where there are more than 32 a bit for every 32nd
  if (kThreshold && count > 0) {
    for (int u = lane; u < (own + 31) / 32 * 32; u += 32) {
      const int at = (warp + u * warps) * 2;
      hot |= __ballot_sync(0xffffffffu, u < own && (bits[at] | bits[at + 1]) != 0);
    }
  }
  const auto pick = [&](const uint4& low, const uint4& high) {
    const int word_at = (warp + unit * warps) * 2 + t / 2, shift = t % 2 * 16;
    const uint32_t word = bits[word_at];
    uint32_t here = word >> shift & 0xffff;
    if (here == 0) return;
    int index = prefix[word_at] + __popc(word & ((1u << shift) - 1));
    for (; here && index < kPicked; here &= here - 1, ++index) {
      const int at = __ffs(static_cast<int>(here)) - 1;
      int8_t* const to = picked + (slot * kPicked + index) * kTile + g;
      to[0] = static_cast<int8_t>(byte_of(low, at));
      to[8] = static_cast<int8_t>(byte_of(high, at));
    }
  };

  const auto put_sums = [&]() {
    int* const to = sums + (slot * warps + warp) * m * kSumStride;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = group * 8 + 2 * t + (e & 1);
        if (token < m) to[token * kSumStride + g + e / 2 * 8] = acc[group][e];
        acc[group][e] = 0;
      }
    }
    unit = 0;
    ++tile;
    ++slot;
  };

  const auto reduce = [&]() {
    __syncthreads();
    const int results = slot * m * kTile;
    struct Place {
      int tile, token, at;  // tile of those since the last reduction, row of x, row of the tile
    };
    const auto place_of = [&](int i) {
      const int all = i / kTile, tile = all / m;
      return Place{tile, all - tile * m, i % kTile};
    };
    const auto sums_at = [&](const Place& to) {
      return sums + (to.tile * warps * m + to.token) * kSumStride + to.at;
    };
    const auto row_of = [&](const Place& to) {
      return (cluster + (tile - slot + to.tile) * clusters) * kTile + to.at;
    };
    const auto whole_of = [&](const Place& to) {
      const int* from = sums_at(to);
      int all = 0;
#pragma unroll 8
      for (int w = 0; w < warps; ++w) all += from[w * m * kSumStride];
      return all;
    };
    const auto outliers_of = [&](const Place& to) {
      const int8_t* const weights = picked + to.tile * kPicked * kTile + to.at;
      float all = 0.0f;
      for (int c = 0; c < min(padded(count), kPicked); c += 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          all = fmaf(values[(c + i) * m + to.token], static_cast<float>(weights[(c + i) * kTile]), all);
      }
      if (count > kPicked) {
        const int8_t* const row = layer.weight + min(row_of(to), last_row) * layer.k + first_k;
        const T* const x = layer.x + to.token * layer.k + first_k;
        for (int w = 0; w < block_units * 2; ++w) {
          int index = prefix[w];
          for (uint32_t word = bits[w]; word; word &= word - 1, ++index) {
            const int column = w * 32 + __ffs(static_cast<int>(word)) - 1;
            if (index >= kPicked) all = fmaf(to_float(x[column]), static_cast<float>(row[column]), all);
          }
        }
      }
      return all;
    };
    const auto store = [&](const Place& to, int whole, float outliers) {
      const int64_t row = row_of(to), at = (tile - slot + to.tile) * kTile + to.at;
      if (row > last_row) return;
      const float scb = at < kScales ? scales[at] : layer.scb[row];
      const float scaled =
          __fmul_rn(__fmul_rn(static_cast<float>(whole), __uint_as_float(most[to.token])), scb);
      float value = __fmul_rn(scaled, kInt8ProductScale);
      if (kThreshold) value = fmaf(outliers, scb * kInt8Scale, value);
      layer.out.store(to.token, row, value);
    };
    if (splits == 1) {
      for (int i = threadIdx.x; i < results; i += blockDim.x) {
        const Place to = place_of(i);
        store(to, whole_of(to), kThreshold && count > 0 ? outliers_of(to) : 0.0f);
      }
      slot = 0;
      __syncthreads();
      return;
    }
    // each block's sums, in the place of its first warp's
    for (int i = threadIdx.x; i < results; i += blockDim.x) {
      const Place to = place_of(i);
      int all = whole_of(to);
      if (kThreshold && count > 0) {
        const float scale = __uint_as_float(most[to.token]) * kInt8Scale;
        all = __float_as_int(fmaf(static_cast<float>(all), scale, outliers_of(to)));
      }
      *sums_at(to) = all;
    }
    cluster_barrier();
    for (int i = threadIdx.x + rank * blockDim.x; i < results; i += splits * blockDim.x) {
      const Place to = place_of(i);
      int whole = 0;
      float others = 0.0f;
      for (int r = 0; r < splits; ++r) {
        const float sum = cluster_value(reinterpret_cast<const float*>(sums_at(to)), r);
        if (kThreshold && cluster_value(&outlier_part, r) != 0.0f)
          others += sum;
        else
          whole += __float_as_int(sum);
      }
      store(to, whole, others);
    }
    slot = 0;
    cluster_barrier();
  };

  int start = 0;  // where the buffers go on behind a reduction
  while (tile < tiles) {
    bool full = false;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (full || i < start) continue;
      const int8_t* const from = x_at + unit * x_step;
      const uint4 b0 = *reinterpret_cast<const uint4*>(from + token0);
      multiply8(acc[0], low[i].x, high[i].x, low[i].y, high[i].y, b0.x, b0.y);
      multiply8(acc[0], low[i].z, high[i].z, low[i].w, high[i].w, b0.z, b0.w);
      if (kGroups > 1) {
        const uint4 b1 = *reinterpret_cast<const uint4*>(from + token1);
        multiply8(acc[kGroups - 1], low[i].x, high[i].x, low[i].y, high[i].y, b1.x, b1.y);
        multiply8(acc[kGroups - 1], low[i].z, high[i].z, low[i].w, high[i].w, b1.z, b1.w);
      }
      if (kThreshold && (hot >> (unit % 32) & 1)) pick(low[i], high[i]);
      fetch(i);
      if (++unit < own) continue;
      put_sums();
      full = slot == p.chunk || tile == tiles;
      start = (i + 1) % kAhead;
    }
    if (full)
      reduce();
    else
      start = 0;
  }
}

struct Plan {
  int units, splits, share, warps, kept;
};

/// How K is divided: among blocks where the codes of x would take too much room in one, which costs a few
/// microseconds.
Plan plan_for(const Launch& on, int64_t m, int64_t k, size_t element) {
  Plan plan = {static_cast<int>((k + kUnit - 1) / kUnit), 1, 0, 0, 0};
  const int most = on.arch >= 90 ? 8 : 1;
  const auto code_bytes = [&] { return plan.units * int64_t{kUnit} * m / plan.splits; };
  while (plan.splits < most && code_bytes() > kCodeBytes) plan.splits *= 2;
  plan.share = (plan.units + plan.splits - 1) / plan.splits;
  plan.warps = std::min(kMaxWarps, plan.units / plan.splits);
  // pieces of x of a lane: little code runs sooner, many are fetched together
  const int64_t bytes = plan.share * kUnit * element, each = std::max<int64_t>(plan.warps / m, 1) * 512;
  plan.kept = bytes <= 2 * each ? 2 : 8;
  return plan;
}

template <typename T, int kGroups, int kKept>
cudaError_t launch(const Launch& on, const Plan& plan, const Linear8<T>& layer) {
  Gemv8<T> gemv;
  gemv.layer = layer;
  gemv.m = static_cast<int>(layer.m);
  gemv.k = static_cast<int>(layer.k);
  gemv.units = plan.units;
  const bool threshold = layer.threshold > 0.0f;
  const int64_t tiles = (layer.out.n + kTile - 1) / kTile;
  const int64_t clusters = std::min<int64_t>(tiles, on.clusters_of(plan.splits));
  gemv.each = tiles / clusters;
  gemv.rest = tiles % clusters;
  const auto room_of = [&](int64_t chunk) {
    return Room(gemv.m, plan.share, (gemv.each + 1) * kTile, static_cast<int>(chunk), plan.warps, threshold)
        .total;
  };
  const int64_t longest = gemv.each + (gemv.rest > 0), tile_bytes = room_of(1) - room_of(0);
  gemv.chunk = static_cast<int>(std::min(longest, std::max<int64_t>(kSumBytes / tile_bytes, 1)));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(clusters * plan.splits));
  shape.block = dim3(plan.warps * 32);
  shape.shared = static_cast<size_t>(room_of(gemv.chunk));
  shape.cluster = static_cast<unsigned>(plan.splits);
  return threshold ? launch_kernel(on, shape, gemv8_kernel<T, kGroups, kKept, true>, gemv)
                   : launch_kernel(on, shape, gemv8_kernel<T, kGroups, kKept, false>, gemv);
}

}  // namespace

bool int8_gemv_takes(const Launch& on, int64_t m, int64_t k) {
  if (on.arch < 80 || m > kMaxRows || m < 1 || k < 16 || k % 16 != 0 || k > (1 << 24)) return false;
  const Plan plan = plan_for(on, m, k, 4);
  if (on.clusters_of(plan.splits) == 0) return false;
  const auto room_of = [&](int chunk) {
    return Room(static_cast<int>(m), plan.share, kScales, chunk, plan.warps, true).total;
  };
  const int most = room_of(0) + std::max(kSumBytes, room_of(1) - room_of(0));
  return plan.share * kUnit <= 65536 && most <= on.shared - 1024 - 512;
}

template <typename T>
cudaError_t int8_gemv(const Launch& on, const Linear8<T>& layer) {
  const Plan plan = plan_for(on, layer.m, layer.k, sizeof(T));
  if (layer.m > 8) return launch<T, 2, 8>(on, plan, layer);
  return plan.kept == 2 ? launch<T, 1, 2>(on, plan, layer) : launch<T, 1, 8>(on, plan, layer);
}

template cudaError_t int8_gemv(const Launch&, const Linear8<float>&);
template cudaError_t int8_gemv(const Launch&, const Linear8<half_t>&);
template cudaError_t int8_gemv(const Launch&, const Linear8<bf16_t>&);

}  // namespace halfbyte::cuda
