// The LLM.int8() layer for 1 to 16 rows of x in one launch: the weight is read once, at the rate of the
// memory.
//
// Blocks take row tiles (16 rows of the weight) in turn, so that all read in one neighbourhood; a block's
// warps divide K, and where its codes of x would take too much room, the blocks of a cluster do so too.
//
//   weights   step = 128 k of a row tile, 2 KiB, which a warp has fetched into a ring of its own: by the copy
//             engine on sm_90, where loads of x need not wait behind them, else each lane what it reads. A
//             lane's 16 bytes of row g and of row g + 8 are the A fragments of two mma m16n8k32 as they are:
//             the order of k is free as long as x has the same. A step has two units: the even pieces of 16
//             bytes, and the odd ones, so that a warp reads without bank conflicts
//   x         every block quantises its part of x itself while its first weights are on their way: codes in
//             shared memory [unit][row of x][64], from where 16 bytes a lane are the B fragments. Where that
//             is much, two blocks of a cluster quantise half of the rows each, for both: all of x in every
//             block is more than L2 gives beside the weight
//   outliers  an outlier has code 0. What the codes leave of x in its column is multiplied in 16 bits by the
//             warp whose unit has the column, while the weights are in its registers: one more mma takes up
//             to four columns of each lane's 16. A warp makes the B fragments once, and which bytes are the
//             A fragments; where there is no room for all, units are left out and read again (late units)
//   reduce    over warps, and over the blocks of a cluster, through shared memory after several row tiles at
//             once; in a fixed order. Sums of a block that has outlier columns are floats
//
// Fast where K / 128 divides among 16 warps without a rest and there are 132 row tiles or more.
#include "int8_gemv.cuh"

#include <algorithm>
#include <array>

#include "cluster.cuh"
#include "int8_fragment.cuh"
#include "tma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kMaxWarps = 16, kUnit = 64, kTile = 16, kMaxRows = 16;
constexpr int kStep = 2 * kUnit, kStepBytes = kStep * kTile;
constexpr int kMostDepth = 4;           // steps of a warp under way
constexpr int kEarly = 2;               // of them asked for before the wait, and before x
constexpr int kSumStride = kTile + 4;   // of sums of a row of x: without bank conflicts
constexpr int kScales = 2048;           // rows of a block whose scb is fetched ahead
constexpr int kCodeBytes = 128 << 10;   // of codes of x in a block
constexpr int kSharedBytes = 48 << 10;  // of them that are worth two blocks that share their making

/// n / d for small numbers: n * d is less than 2^16.
struct Divisor {
  int d, factor;

  Divisor() = default;
  explicit Divisor(int d) : d(d), factor((65536 + d - 1) / d) {}
  __device__ __forceinline__ int divide(int n) const { return n * factor >> 16; }
};

/// What a block would have to divide for is here: it starts sooner without.
template <typename T>
struct Gemv8 {
  Linear8<T> layer;
  int m, k;
  int split_bits;             // 2^ this blocks of a cluster divide K
  int share, rest_of_share;   // steps of a block; the first `rest_of_share` of a cluster have one more
  int warp_share, warp_rest;  // those of a warp, of `share`
  Divisor rows_of_x, own_rows, teams;  // m, rows of x that a block quantises, and teams of warps for each
  int64_t each, rest;                  // row tiles of a cluster; the first `rest` have one more
  int chunk;                           // row tiles between two reductions
  int fragments;                       // for which a warp has room
  int depth;                           // steps under way
  CUtensorMap map;                     // sm_90: of the weight, in tiles of 16 rows
};

/// What a block's threads tell each other.
struct Shared {
  unsigned most_of[kMaxRows], part_most[kMaxRows];
  int found, found_by_any;  // not 0: this block, or one of those that share x, has found outliers
  float outlier_part;       // the same, to be read by other blocks
};

/// Where the parts of a block's shared memory begin.
struct Room {
  int codes, scales, bits, fragments, sums, barriers, common, total;

  __host__ __device__ Room(int depth, int m, int steps, int64_t rows, int chunk, int warps,
                           int fragment_bytes, int helpers) {
    codes = depth * warps * kStepBytes;
    scales = codes + steps * kStep * m;
    bits = scales + static_cast<int>(rows < kScales ? rows : kScales) * 4;
    fragments = bits + (fragment_bytes > 0 ? steps * (kStep / 8) * (helpers > 1 ? 2 : 1) : 0);
    sums = fragments + fragment_bytes;
    barriers = sums + chunk * warps * m * kSumStride * 4;
    common = barriers + depth * warps * 8;
    total = common + static_cast<int>(sizeof(Shared));
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

__device__ __forceinline__ int largest_of_warp(int x) {  // x >= 0
#if __CUDA_ARCH__ >= 800
  return static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(x)));
#else
  return static_cast<int>(warp_max(static_cast<float>(x)));
#endif
}

/// Blocks of a cluster on their way to a common barrier: none of them waits, and what it has written to its
/// own shared memory is there when the others go on.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;\n" ::: "memory");
#endif
}

/// kGroups: of 8 rows of x. kKept: pieces of x in a lane's registers. kThreshold: there may be outliers.
/// kHelpers: blocks of a cluster that share the rows of x to be quantised, where none divides K.
template <typename T, int kGroups, int kKept, bool kThreshold, int kHelpers>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) gemv8_kernel(const __grid_constant__ Gemv8<T> p) {
  extern __shared__ __align__(1024) char shared[];
  let_next_start();

  const Linear8<T>& layer = p.layer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4, m = p.m;
  const int splits = 1 << p.split_bits, rank = p.split_bits > 0 ? cluster_rank() : 0;
  const int extra = rank < p.rest_of_share ? 1 : 0;
  const int block_step = rank * p.share + min(rank, p.rest_of_share), block_steps = p.share + extra;
  const int own = p.warp_share + (warp < p.warp_rest + extra ? 1 : 0);  // steps of this warp

  const int64_t cluster = blockIdx.x >> p.split_bits, clusters = gridDim.x >> p.split_bits;
  const int64_t tiles = p.each + (cluster < p.rest ? 1 : 0);
  using Outliers = Fragment<T, kGroups>;
  constexpr int kPieces = Outliers::kPieces;
  const int fragment_size = fragment_bytes(m, kPieces);
  const Room room(p.depth, m, p.share + (p.rest_of_share > 0 ? 1 : 0), (p.each + 1) * kTile, p.chunk, warps,
                  kThreshold ? warps * p.fragments * fragment_size : 0, kHelpers);
  int8_t* const codes = reinterpret_cast<int8_t*>(shared + room.codes);
  float* const scales = reinterpret_cast<float*>(shared + room.scales);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(shared + room.bits);
  uint32_t* const own_bits = kHelpers > 1 ? bits + block_steps * 4 : bits;  // found in the rows of this block
  char* const fragments = shared + room.fragments + warp * p.fragments * fragment_size;
  int* const sums = reinterpret_cast<int*>(shared + room.sums);  // [chunk][warps][m][kSumStride]
  Shared& common = *reinterpret_cast<Shared*>(shared + room.common);

  // the stream of this warp's weights: step after step of a row tile, tile after tile
  const int64_t last_row = layer.out.n - 1;
  const auto row_at = [&](int64_t tile, int row) {
    return layer.weight + min((cluster + tile * clusters) * kTile + row, last_row) * layer.k;
  };
  char* const ring = shared + warp * p.depth * kStepBytes;
  // of rows g and g + 8 of a step: piece 2 t + h, swizzled
  const auto piece_at = [&](int h) { return g * kStep + ((2 * t + h) ^ g) * 16; };
  int64_t next_tile = 0;
  int next_step = 0, next_place = 0;  // of the ring
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t barriers = shared_address(shared + room.barriers) + warp * p.depth * 8;
  if (lane == 0) {
    prefetch_map(p.map);
    for (int i = 0; i < p.depth; ++i) init_barrier(barriers + i * 8, 1);
    publish_barriers();
  }
  const auto fetch = [&] {
    if (next_tile < tiles) {
      if (lane == 0) {
        const uint32_t barrier = barriers + next_place * 8;
        arrive_expecting(barrier, kStepBytes);
        fetch_tile_once(shared_address(ring) + next_place * kStepBytes, p.map,
                        static_cast<int>((cluster + next_tile * clusters) * kTile),
                        (block_step + warp + next_step * warps) * kStep, barrier);
      }
      if (++next_step == own) next_step = 0, ++next_tile;
    }
    if (++next_place == p.depth) next_place = 0;
  };
#else
  const auto fetch = [&] {
    if (next_tile < tiles) {
      const int8_t *const low = row_at(next_tile, g), *const high = row_at(next_tile, g + 8);
      const uint32_t to = shared_address(ring) + next_place * kStepBytes;
      const uint64_t policy = once_policy();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // what is beyond K meets zeros of x
        const int at = min((block_step + warp + next_step * warps) * kStep + (2 * t + h) * 16, p.k - 16);
        copy_once(to + piece_at(h), low + at, policy);
        copy_once(to + piece_at(h) + 8 * kStep, high + at, policy);
      }
      if (++next_step == own) next_step = 0, ++next_tile;
    }
    commit_copies();
    if (++next_place == p.depth) next_place = 0;
  };
#endif
  const int early = min(kEarly, p.depth);
#pragma unroll 1
  for (int i = 0; i < early; ++i) fetch();

  if (kThreshold) {
    for (int i = threadIdx.x; i < block_steps * (kHelpers > 1 ? 8 : 4); i += blockDim.x) bits[i] = 0;
    if (threadIdx.x == 0) common.found = common.found_by_any = 0;
  }
  if (threadIdx.x < kMaxRows) common.part_most[threadIdx.x] = 0;
  __syncthreads();
  if (kHelpers > 1) cluster_arrive();

  // x: teams of warps take a row each, of those of this block; a warp's pieces of it are 32 lanes wide,
  // `teams` apart
  using Part = Piece<T, 16 / sizeof(T)>;
  constexpr int kWide = 16 / sizeof(T);
  const int first_k = block_step * kStep, columns = block_steps * kStep;
  const int pieces = (columns + 32 * kWide - 1) / (32 * kWide);
  const int own_rows = kHelpers > 1 ? p.own_rows.d : m, next_row = warps * kHelpers;
  const int teams = p.teams.d, team = warps >= own_rows ? p.own_rows.divide(warp) : 0;
  const int first_row =
      (warps >= own_rows ? warp - team * own_rows : warp) * kHelpers + (kHelpers > 1 ? cluster_rank() : 0);
  const int mine = team < teams && team < pieces ? p.teams.divide(pieces - team + teams - 1) : 0;
  const Threshold<T> threshold(layer.threshold);
  static_assert(32 * kWide % kStep == 0);  // a lane's pieces are at one place of their steps
  int first_column = (team * 32 + lane) * kWide, wide = teams * 32 * kWide;
  const auto column_of = [&](int i) { return first_column + i * wide; };
  const auto pieces_below = [&](int limit) {  // those of this lane
    return min(mine, p.teams.divide((limit / kWide + 31 - lane) / 32 - team + teams - 1));
  };
  int in_x = pieces_below(min(columns, p.k - first_k));
  const int in_codes = pieces_below(columns);
  asm volatile("" : "+r"(first_column), "+r"(wide), "+r"(in_x));  // known before the wait
  wait_for_results();
  Part kept[kKept];  // the last that were fetched
  const auto fetch_some = [&](int row, int at) {
    const T* const from = layer.x + row * layer.k + first_k + column_of(at);
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = at + i < in_x ? Part::load(from + i * wide) : Part::zero();
  };
  if (first_row < m) fetch_some(first_row, 0);
  // this thread's first of scb is on its way while the largest of x are found
  const int scales_here = min(static_cast<int>(tiles) * kTile, kScales), own_scale = threadIdx.x;
  const auto scb_at = [&](int i) {
    return layer.scb[min((cluster + i / kTile * clusters) * kTile + i % kTile, last_row)];
  };
  const float first_scale = own_scale < scales_here ? scb_at(own_scale) : 0.0f;
#pragma unroll 1
  for (int i = early; i < p.depth; ++i) fetch();

  int8_t* const first_code = codes + (first_column / kStep * 2 + first_column / 16 % 2) * m * kUnit +
                             first_column % kStep / 32 * 16 + first_column % 16;
  const int wide_code = wide / kStep * 2 * m * kUnit;
  const auto encode = [&](int8_t* code, const RowScale& scale, Part part) {
    part.forget();
    Vec<uint32_t, kWide / 4> words;
    part.encode(scale, words.v);
    auto* const to = reinterpret_cast<Vec<uint32_t, kWide / 4>*>(code);
    if constexpr (kHelpers > 1) {
#pragma unroll
      for (int i = 0; i < kHelpers; ++i) *cluster_place(to, i) = words;
    } else {
      *to = words;
    }
  };
  unsigned unclean = 0;  // bits for turns in which this thread has found outliers or NaN
  const auto clean = [&](int at, unsigned turn, bool marks) {
    bool cleaned = false;
    const float largest =
        look_at<kThreshold>(kept, mine - at, threshold, &cleaned, [&](int i, unsigned outliers) {
          if (!marks) return;
          const int column = column_of(at + i);
          atomicOr(own_bits + column / 32, outliers << (column % 32));
          common.found = 1;
        });
    if (cleaned) unclean |= turn;
    return largest;
  };
  unsigned turn = 1;
  for (int row = first_row; row < m && mine > 0; row += next_row, turn *= 2) {
    float largest = 0.0f;
#pragma unroll 1
    for (int at = 0; at < mine; at += kKept) {
      if (row > first_row || at > 0) fetch_some(row, at);
      largest = fmaxf(largest, clean(at, turn, true));
    }
    largest = most_of_warp(largest);
    if (lane == 0) atomicMax(common.part_most + row, __float_as_uint(largest));
  }
  if (own_scale < scales_here) scales[own_scale] = first_scale;
  for (int i = own_scale + blockDim.x; i < scales_here; i += blockDim.x) scales[i] = scb_at(i);
  __syncthreads();

  bool outliers = kThreshold && common.found;
  if (kThreshold && threadIdx.x == 0) common.outlier_part = outliers ? 1.0f : 0.0f;
  const unsigned *own_most = common.part_most, *most = own_most;
  if constexpr (kHelpers > 1) {  // to each other: the largest of x, and which columns have outliers
    cluster_wait();
    most = common.most_of;
    for (int i = 0; i < kHelpers; ++i) {
      const int row = threadIdx.x * kHelpers + cluster_rank();
      if (row < m) *cluster_place(common.most_of + row, i) = common.part_most[row];
      if (!outliers) continue;
      if (threadIdx.x == 0) *cluster_place(&common.found_by_any, i) = 1;
      uint32_t* const its_bits = cluster_place(bits, i);
      for (int w = threadIdx.x; w < block_steps * 4; w += blockDim.x) {
        if (const uint32_t marks = own_bits[w]) atomicOr(its_bits + w, marks);
      }
    }
  } else if (splits > 1) {
    cluster_barrier();
    if (threadIdx.x < m) {
      unsigned all = 0;
      for (int r = 0; r < splits; ++r) {
        const float part = cluster_value(reinterpret_cast<const float*>(common.part_most) + threadIdx.x, r);
        all = max(all, __float_as_uint(part));
      }
      common.most_of[threadIdx.x] = all;
    }
    __syncthreads();
    own_most = most = common.most_of;
  }

  const bool all_kept = first_row + next_row >= m && mine <= kKept;
  turn = 1;
  for (int row = first_row; row < m && mine > 0; row += next_row, turn *= 2) {
    const RowScale scale(__uint_as_float(own_most[row]));
#pragma unroll 1
    for (int at = 0; at < mine; at += kKept) {
      if (!all_kept) {
        fetch_some(row, at);
        if (unclean & turn) clean(at, turn, false);
      }
      int8_t* const code = first_code + row * kUnit + at * wide_code;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (at + i < in_codes) encode(code + i * wide_code, scale, kept[i]);
      }
    }
  }

  if constexpr (kHelpers > 1) {
    cluster_barrier();
    outliers = kThreshold && common.found_by_any;
  }

  // units of this warp: two of each of its steps. The step's place in the block, marks of a lane's 16 columns
  const auto step_of = [&](int unit) { return warp + unit / 2 * warps; };
  const auto marks_of = [&](int unit) { return bits[step_of(unit) * 4 + t] >> (unit % 2 * 16) & 0xffff; };
  const auto rounds_of = [&](uint32_t marks) { return largest_of_warp((__popc(marks) + 3) / 4); };
  const auto make_fragment = [&](Outliers* to, int unit, uint32_t* marks) {
    T in[kGroups][4];
    bool there[4];
    to->select = to->upper = 0;
    const T* const x = layer.x + first_k + step_of(unit) * kStep + (2 * t + unit % 2) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      there[j] = *marks != 0;
      const int byte = there[j] ? __ffs(static_cast<int>(*marks)) - 1 : 0;
      *marks &= *marks - 1;
      to->select |= (byte & 7) << (j * 4);
      if (byte & 8) to->upper |= 0xffu << (j * 8);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (there[j]) in[group][j] = x[min(g + group * 8, m - 1) * layer.k + byte];
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Rest<T> rest(__uint_as_float(most[min(g + group * 8, m - 1)]), layer.threshold);
      float left[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) left[j] = there[j] ? rest.of(in[group][j]) : 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        using Half = typename Outliers::Half;
        Vec<Half, 4> four;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kPieces > 1)
            four.v[j] = piece_of(left[j], piece);
          else
            four.v[j] = from_float<Half>(left[j]);
        }
        to->x[piece][group] = *reinterpret_cast<const uint2*>(&four);
      }
    }
  };
  const auto x_of_fragment = [&](int i, int piece, int row) {
    return reinterpret_cast<uint2*>(fragments + i * fragment_size + 32 + ((piece * m + row) * 4 + t) * 8);
  };
  const auto choice_of_fragment = [&](int i) {
    return reinterpret_cast<uint2*>(fragments + i * fragment_size + t * 8);
  };
  uint64_t hot = 0, late = 0;  // units with outliers, whose fragments are there or are not
  if (outliers) {
    for (int u = lane; u - lane < 2 * own; u += 32) {
      uint32_t marks = 0;
      for (int i = 0; i < 4 && u < 2 * own; ++i) marks |= bits[step_of(u) * 4 + i] >> (u % 2 * 16) & 0xffff;
      const uint64_t here = __ballot_sync(0xffffffffu, marks != 0);
      hot |= here << (u - lane);
    }
    int made = 0;
    for (uint64_t left = hot; left; left &= left - 1) {
      const int u = __ffsll(static_cast<int64_t>(left)) - 1;
      uint32_t marks = marks_of(u);
      const int rounds = rounds_of(marks);
      if (made + rounds > p.fragments) {
        late |= uint64_t{1} << u;
        continue;
      }
#pragma unroll 1
      for (int round = 0; round < rounds; ++round, ++made) {
        Outliers fragment;
        make_fragment(&fragment, u, &marks);
        if (g == 0)
          *choice_of_fragment(made) =
              make_uint2(fragment.select | (round + 1 < rounds ? Outliers::kMore : 0), fragment.upper);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            if (g + group * 8 < m) *x_of_fragment(made, piece, g + group * 8) = fragment.x[piece][group];
          }
        }
      }
    }
    hot &= ~late;
  }
  if constexpr (kHelpers > 1)
    __syncwarp();
  else
    __syncthreads();

  int64_t tile = 0;
  int step = 0, slot = 0, next_fragment = 0;
  int acc[kGroups][4] = {};
  float others[kGroups][4] = {};
  const int8_t* const x_at = codes + warp * kStep * m + t * 16;
  const int x_step = warps * kStep * m;
  const int token0 = min(g, m - 1) * kUnit, token1 = min(g + 8, m - 1) * kUnit;

  const auto add_outliers = [&](const uint4& low, const uint4& high) {
    Outliers fragment;
    do {
      const uint2 choice = *choice_of_fragment(next_fragment);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
          fragment.x[piece][group] = *x_of_fragment(next_fragment, piece, min(g + group * 8, m - 1));
      }
      fragment.select = choice.x;
      fragment.upper = choice.y;
      fragment.add(others, low, high);
      ++next_fragment;
    } while (fragment.select & Outliers::kMore);
  };

  const auto put_sums = [&]() {
    int* const to = sums + (slot * warps + warp) * m * kSumStride;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = group * 8 + 2 * t + (e & 1);
        if (token < m) {
          int sum = acc[group][e];
          if (outliers) {
            const float scale = __uint_as_float(most[token]) * kInt8Scale;
            sum = __float_as_int(fmaf(static_cast<float>(sum), scale, others[group][e]));
          }
          to[token * kSumStride + g + e / 2 * 8] = sum;
        }
        acc[group][e] = 0;
        others[group][e] = 0.0f;
      }
    }
    step = next_fragment = 0;
    ++tile;
    ++slot;
  };

  // late units of this warp, of the row tiles since the last reduction
  const auto add_late = [&]() {
#pragma unroll 1
    for (int i = 0; i < slot; ++i) {
      float more[kGroups][4] = {};
#pragma unroll 1
      for (uint64_t left = late; left; left &= left - 1) {
        const int u = __ffsll(static_cast<int64_t>(left)) - 1;
        const int column = min((block_step + step_of(u)) * kStep + (2 * t + u % 2) * 16, p.k - 16);
        const int64_t of = tile - slot + i;
        const uint4 low = *reinterpret_cast<const uint4*>(row_at(of, g) + column);
        const uint4 high = *reinterpret_cast<const uint4*>(row_at(of, g + 8) + column);
        uint32_t marks = marks_of(u);
#pragma unroll 1
        for (int rounds = rounds_of(marks); rounds > 0; --rounds) {
          Outliers fragment;
          make_fragment(&fragment, u, &marks);
          fragment.add(more, low, high);
        }
      }
      int* const to = sums + (i * warps + warp) * m * kSumStride;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = group * 8 + 2 * t + (e & 1);
          if (token >= m) continue;
          float* const sum = reinterpret_cast<float*>(to + token * kSumStride + g + e / 2 * 8);
          *sum += more[group][e];
        }
      }
    }
  };

  const auto reduce = [&]() {
    if (kThreshold && late) add_late();
    __syncthreads();
    const int results = slot * m * kTile;
    struct Place {
      int tile, token, at;  // tile of those since the last reduction, row of x, row of the tile
    };
    const auto place_of = [&](int i) {
      const int all = i / kTile, tile = p.rows_of_x.divide(all);
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
      if (outliers) {
        float all = 0.0f;
#pragma unroll 8
        for (int w = 0; w < warps; ++w) all += __int_as_float(from[w * m * kSumStride]);
        return __float_as_int(all);
      }
      int all = 0;
#pragma unroll 8
      for (int w = 0; w < warps; ++w) all += from[w * m * kSumStride];
      return all;
    };
    const auto store = [&](const Place& to, int whole, float others) {
      const int64_t row = row_of(to), at = (tile - slot + to.tile) * kTile + to.at;
      if (row > last_row) return;
      const float scb = at < kScales ? scales[at] : layer.scb[row];
      const float scaled =
          __fmul_rn(__fmul_rn(static_cast<float>(whole), __uint_as_float(most[to.token])), scb);
      float value = __fmul_rn(scaled, kInt8ProductScale);
      if (kThreshold) value = fmaf(others, scb * kInt8Scale, value);
      layer.out.store(to.token, row, value);
    };
    if (splits == 1) {
      for (int i = threadIdx.x; i < results; i += blockDim.x) {
        const Place to = place_of(i);
        const int whole = whole_of(to);
        if (outliers)
          store(to, 0, __int_as_float(whole));
        else
          store(to, whole, 0.0f);
      }
      slot = 0;
      __syncthreads();
      return;
    }
    // each block's sums, in the place of its first warp's
    for (int i = threadIdx.x; i < results; i += blockDim.x) {
      const Place to = place_of(i);
      const int all = whole_of(to);
      *sums_at(to) = all;
    }
    cluster_barrier();
    for (int i = threadIdx.x + rank * blockDim.x; i < results; i += splits * blockDim.x) {
      const Place to = place_of(i);
      int whole = 0;
      float others = 0.0f;
      for (int r = 0; r < splits; ++r) {
        const float sum = cluster_value(reinterpret_cast<const float*>(sums_at(to)), r);
        if (kThreshold && cluster_value(&common.outlier_part, r) != 0.0f)
          others += sum;
        else
          whole += __float_as_int(sum);
      }
      store(to, whole, others);
    }
    slot = 0;
    cluster_barrier();
  };

  int place = 0;
  uint32_t parity = 0;
#pragma unroll 1
  while (tile < tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    wait_barrier(barriers + place * 8, parity);
#else
    if (p.depth == 4)
      wait_copies<3>();
    else if (p.depth == 3)
      wait_copies<2>();
    else if (p.depth == 2)
      wait_copies<1>();
    else
      wait_copies<0>();
#endif
    uint4 low[2], high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const char* const weights = ring + place * kStepBytes + piece_at(h);
      low[h] = *reinterpret_cast<const uint4*>(weights);
      high[h] = *reinterpret_cast<const uint4*>(weights + 8 * kStep);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int8_t* const from = x_at + step * x_step + h * kUnit * m;
      const uint4 b0 = *reinterpret_cast<const uint4*>(from + token0);
      multiply8(acc[0], low[h].x, high[h].x, low[h].y, high[h].y, b0.x, b0.y);
      multiply8(acc[0], low[h].z, high[h].z, low[h].w, high[h].w, b0.z, b0.w);
      if (kGroups > 1) {
        const uint4 b1 = *reinterpret_cast<const uint4*>(from + token1);
        multiply8(acc[kGroups - 1], low[h].x, high[h].x, low[h].y, high[h].y, b1.x, b1.y);
        multiply8(acc[kGroups - 1], low[h].z, high[h].z, low[h].w, high[h].w, b1.z, b1.w);
      }
    }
    __syncwarp();  // all have read
    fetch();
    if (++place == p.depth) place = 0, parity ^= 1;
    if (kThreshold) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (hot >> (step * 2 + h) & 1) add_outliers(low[h], high[h]);
      }
    }
    if (++step < own) continue;
    put_sums();
    if (slot == p.chunk || tile == tiles) reduce();
  }
}

struct Plan {
  int steps, splits, helpers, share, warps, kept;
};

/// How K is divided: among blocks where the codes of x would take too much room in one, which costs a few
/// microseconds.
Plan plan_for(const Launch& on, int64_t m, int64_t k, size_t element) {
  Plan plan = {static_cast<int>((k + kStep - 1) / kStep), 1, 1, 0, 0, 0};
  const int most = on.arch >= 90 ? 8 : 1;
  const auto code_bytes = [&] { return plan.steps * int64_t{kStep} * m / plan.splits; };
  while (plan.splits < most && code_bytes() > kCodeBytes) plan.splits *= 2;
  plan.share = (plan.steps + plan.splits - 1) / plan.splits;
  plan.warps = std::min(kMaxWarps, plan.steps / plan.splits);
  // pieces of x of a lane: little code runs sooner, many are fetched together
  const int64_t bytes = plan.share * kStep * element, each = std::max<int64_t>(plan.warps / m, 1) * 512;
  plan.kept = bytes <= 2 * each ? 2 : 8;
  const bool pairs = on.arch >= 90 && on.clusters_of(2) * 2 + 1 >= on.multiprocessors;
  if (pairs && plan.splits == 1 && m <= 8 && code_bytes() >= kSharedBytes) plan.helpers = 2;
  return plan;
}

/// Shared memory of a block, and of it for sums between two reductions.
struct Choice {
  int depth, fragments;  // steps of a warp under way; bytes for outlier columns
};
constexpr std::array<Choice, 5> kChoices = {
    {{kMostDepth, 32 << 10}, {3, 32 << 10}, {2, 32 << 10}, {2, 16 << 10}, {1, 8 << 10}}};

struct Budget {
  int room, sums;

  explicit Budget(const Launch& on) : room(on.block_shared), sums(12 << 10) {}
};

/// Fragments for which a warp gets room: one for each of its units and a few more, where there is so much.
int fragments_of(const Plan& plan, int m, int pieces, int bytes) {
  const int units = (plan.share + plan.warps - 1) / plan.warps * 2;
  return std::min(units + 3, bytes / (plan.warps * fragment_bytes(m, pieces)));
}

template <typename T, int kGroups, int kKept, int kHelpers>
cudaError_t launch(const Launch& on, const Plan& plan, const Linear8<T>& layer) {
  Gemv8<T> gemv = {};
  gemv.layer = layer;
  gemv.m = static_cast<int>(layer.m);
  gemv.k = static_cast<int>(layer.k);
  while (1 << gemv.split_bits < plan.splits) ++gemv.split_bits;
  gemv.share = plan.steps / plan.splits;
  gemv.rest_of_share = plan.steps % plan.splits;
  gemv.warp_share = gemv.share / plan.warps;
  gemv.warp_rest = gemv.share % plan.warps;
  gemv.rows_of_x = Divisor(gemv.m);
  gemv.own_rows = Divisor((gemv.m + kHelpers - 1) / kHelpers);
  gemv.teams = Divisor(std::max(plan.warps / gemv.own_rows.d, 1));
  const bool threshold = layer.threshold > 0.0f;
  const int64_t tiles = (layer.out.n + kTile - 1) / kTile;
  const int64_t clusters =
      std::min<int64_t>((tiles + kHelpers - 1) / kHelpers, on.clusters_of(plan.splits * kHelpers)) * kHelpers;
  gemv.each = tiles / clusters;
  gemv.rest = tiles % clusters;
  constexpr int kPieces = OutlierType<T>::kPieces;
  const Budget budget(on);
  const auto room_of = [&](int64_t chunk) {
    const int bytes = threshold ? plan.warps * gemv.fragments * fragment_bytes(gemv.m, kPieces) : 0;
    return Room(gemv.depth, gemv.m, plan.share, (gemv.each + 1) * kTile, static_cast<int>(chunk), plan.warps,
                bytes, kHelpers)
        .total;
  };
  const int64_t longest = gemv.each + (gemv.rest > 0), tile_bytes = room_of(1) - room_of(0);
  gemv.chunk = static_cast<int>(std::min(longest, std::max<int64_t>(budget.sums / tile_bytes, 1)));
  // a deep ring first, then room for outlier columns, which it may cost a step of depth
  for (const auto& [depth, bytes] : kChoices) {
    gemv.depth = depth;
    gemv.fragments = fragments_of(plan, gemv.m, kPieces, bytes);
    if (room_of(gemv.chunk) <= budget.room) break;
  }
  if (on.code >= 90) {
    const cudaError_t error = describe_tiles(&gemv.map, DType::i8, layer.weight, layer.out.n, layer.k, kTile);
    if (error != cudaSuccess) return error;
  }
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(clusters * plan.splits));
  shape.block = dim3(plan.warps * 32);
  shape.shared = static_cast<size_t>(room_of(gemv.chunk));
  shape.cluster = static_cast<unsigned>(plan.splits * kHelpers);
  return threshold ? launch_kernel(on, shape, gemv8_kernel<T, kGroups, kKept, true, kHelpers>, gemv)
                   : launch_kernel(on, shape, gemv8_kernel<T, kGroups, kKept, false, kHelpers>, gemv);
}

}  // namespace

bool int8_gemv_takes(const Launch& on, int64_t m, int64_t k) {
  if (on.arch < 80 || m > kMaxRows || m < 1 || k < 16 || k % 16 != 0 || k > (1 << 24)) return false;
  const Plan plan = plan_for(on, m, k, 4);
  if (on.clusters_of(plan.splits) == 0) return false;
  const Budget budget(on);
  const auto room_of = [&](int chunk) {
    return Room(kChoices.back().depth, static_cast<int>(m), plan.share, kScales, chunk, plan.warps,
                kChoices.back().fragments, plan.helpers)
        .total;
  };
  const int most = room_of(0) + std::max(budget.sums, room_of(1) - room_of(0));
  return plan.share * kStep <= 65536 && most <= budget.room;
}

template <typename T>
cudaError_t int8_gemv(const Launch& on, const Linear8<T>& layer) {
  const Plan plan = plan_for(on, layer.m, layer.k, sizeof(T));
  if (layer.m > 8) return launch<T, 2, 8, 1>(on, plan, layer);
  if (plan.helpers > 1) return launch<T, 1, 8, 2>(on, plan, layer);
  return plan.kept == 2 ? launch<T, 1, 2, 1>(on, plan, layer) : launch<T, 1, 8, 1>(on, plan, layer);
}

template cudaError_t int8_gemv(const Launch&, const Linear8<float>&);
template cudaError_t int8_gemv(const Launch&, const Linear8<half_t>&);
template cudaError_t int8_gemv(const Launch&, const Linear8<bf16_t>&);

}  // namespace halfbyte::cuda
