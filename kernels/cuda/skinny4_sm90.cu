// y = x w^T + bias + residual with a tiled 4-bit weight and 3 to 64 rows of 16-bit x, on sm_90a: the weight
// is the A operand of wgmma, decoded on its way from shared memory into registers; x is B.
//
// An item is 128 rows of the weight times up to 64 tokens. A block has warpgroups that multiply, two with 64
// rows each and, where kDepth is 2, another two at the same rows and other k; a warp that asks the copy
// engine for what they need; and three warps beside it that decode nested absmax. A step is 2 k tiles of
// each. The steps of all items follow each other in one line, of which every block takes as many, so that
// every multiprocessor has as much work whatever N is. With kDepth 1 two blocks fit on a multiprocessor and
// an item is one block's.
//
//   ring    a stage has a step: x, [tokens][64 k] a tile, swizzled as wgmma wants it, codes, absmax, and
//           room for absmax as decoded. Some weights are asked for before what ran before has ended; more
//           would stand in the way of x.
//   decode  a dot product of bytes makes an address, a look-up makes two weights
//   scale   up to 16 tokens absmax times the sums of a tile, in fp32; more: times the weights, a rounding
//           more, which lets the product of a tile run while the next one is decoded. There nested absmax
//           would keep every product waiting: warps of their own decode it when a stage has come
//   reduce  warpgroups through shared memory, blocks through memory, both in a fixed order: all but the last
//           block of an item put their part down, the last one waits for them. More than 32 tokens: where an
//           item is that of an even number of blocks, these are clusters of two, which first exchange halves
//
// Blocks go from their last item to their first: what others wait for comes first, what a block has to wait
// for itself comes last. It waits for blocks of lower numbers only, which started before it.
//
// Bound by memory, from 32 tokens on by the instructions of a step and shared memory. More than 64 tokens are
// several items for the same rows, which decode the weight again: only where absmax or y are not on 16 bytes,
// as gemm4_sm90.cu needs them.
#include <algorithm>

#include "launch.cuh"
#include "output_sm90.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 128, kRowTiles = kRows / 16;  // of an item
constexpr int kMostStages = 16;                     // of the ring
constexpr int kTable = kCompactTable4Bytes, kMap = kCompactMap4Bytes, kBarriers = 1024;
constexpr int kPartFloats = 64 * kRows;  // of a block, the most

/// A block. Shared memory: the table and the nested map, barriers, sums for another warpgroup, the ring.
template <int kTokens, bool kNested, int kDepth>
struct Shape {
  static constexpr int kConsumers = 256 * kDepth;         // threads
  static constexpr int kThreads = kConsumers + 128;       // the last warpgroup asks, and decodes absmax
  static constexpr int kBlocks = kDepth == 1 ? 2 : 1;     // of a multiprocessor
  static constexpr int kTiles = 2 * kDepth;               // k tiles of a step
  static constexpr int kAbsmaxBytes = kNested ? 16 : 64;  // of a tile
  static constexpr int kX = kTiles * kTokens * 128, kCodes = kRowTiles * kTiles * 512;
  static constexpr int kAbsmax = kRowTiles * kTiles * kAbsmaxBytes;
  // nested and more than 16 tokens: decoded by other warps, 16-bit values of rows g and g + 8 a pair,
  // [row tile][depth][g][tile of the depth]
  static constexpr bool kPairs = kNested && kTokens > 16;
  static constexpr int kPairsAt = kX + kCodes + (kAbsmax + 127) / 128 * 128;  // in a stage
  static constexpr int kStage = (kPairsAt + (kPairs ? kRowTiles * kTiles * 32 : 0) + 1023) / 1024 * 1024;
  static constexpr bool kPaired = kTokens == 64 && kDepth == 2;  // blocks of an item may be
  static constexpr int kSumsAt = kTable + kMap + kBarriers;
  static constexpr int kRingAt = kSumsAt + (kDepth - 1) * kTokens / 4 * kConsumers * 4;
};

template <typename T>
struct Skinny {
  Tiled4 w;
  Output<T> out;
  Book4 book;
  float* parts;         // [blocks][kPartFloats], all kAbsent before and after
  int total, share;     // steps of all items, of a block
  int m, tiles, steps;  // steps of an item
  int token_blocks;
  int stages;         // of the ring
  bool absmax_apart;  // it lies where the copy engine cannot read it
  bool paired;        // blocks are clusters of two of an item, which exchange sums
};

#if HALFBYTE_WGMMA

constexpr int kDecoders = 96;  // threads that decode nested absmax: the rest of the last warpgroup
// Stages that are asked for before the wait, of a multiprocessor; the same of a block of at most kFewSteps,
// whose x, from 32 tokens on, comes late behind more.
constexpr int kMostEarly = 4, kFewSteps = 16, kFewEarly = 3;
constexpr uint32_t kAbsent = 0xffffffffu;  // in place of a part: a NaN that no sum is

/// Steps of a block that are of one item.
struct Span {
  int item, begin, steps;  // begin: in the item
};
/// The last item of the first `rest` of the block's steps.
template <typename T>
__device__ __forceinline__ Span span_of(const Skinny<T>& p, int first_step, int rest) {
  const int end = first_step + rest, item = (end - 1) / p.steps, begin = max(first_step, item * p.steps);
  return {item, begin - item * p.steps, end - begin};
}

/// Until the table and the barriers are there. Where absmax is decoded apart, the warp that asks does not
/// wait for the others to meet and is at its first weights meanwhile.
template <typename S>
__device__ __forceinline__ void meet_at_start() {
  if (S::kPairs)
    asm volatile("bar.sync 9, %0;\n" ::"n"(S::kThreads) : "memory");
  else
    __syncthreads();
}
/// What the copy engine does with absmax, by a warp, where they are not on 16 bytes.
template <typename S>
__device__ __forceinline__ void copy_absmax(const Tiled4& w, char* to, int row_tile, int tile, int tiles) {
  const int64_t last = w.n / kTileRows - 1;
  for (int i = threadIdx.x % 32; i < S::kAbsmax; i += 32) {
    const int each = S::kTiles * S::kAbsmaxBytes;
    const int64_t at =
        min(int64_t{row_tile} + i / each, last) * tiles + min(tile + i % each / S::kAbsmaxBytes, tiles - 1);
    const char* const from = w.absmax.plain ? reinterpret_cast<const char*>(w.absmax.plain)
                                            : reinterpret_cast<const char*>(w.absmax.codes);
    to[i] = from[at * S::kAbsmaxBytes + i % S::kAbsmaxBytes];
  }
}

/// Decodes nested absmax of all steps of a block, as they come, by the warps beside the one that asks.
template <typename T, typename S>
__device__ __forceinline__ void decode_absmax(const Skinny<T>& p, char* table, uint32_t coded, uint32_t full,
                                              int stages, int first_step, int mine) {
  constexpr int kWords = kRowTiles * S::kTiles * 4;  // of codes: 4 are rows 2 j, 2 j + 8, 2 j + 1, 2 j + 9
  constexpr int kOwn = (kWords + kDecoders - 1) / kDecoders;
  const int thread = threadIdx.x - S::kConsumers - 32;
  const float* const map = reinterpret_cast<const float*>(table + kTable);
  const float offset = *p.w.absmax.offset;
  const int last_row = static_cast<int>(p.w.n - 1);
  constexpr uint32_t kBlock = kNestedBlocksize;
  float scale[kOwn][4] = {};
  int stage = 0;
  uint32_t parity = 0;
  for (int rest = mine, steps; rest > 0; rest -= steps) {
    const Span span = span_of(p, first_step, rest);
    steps = span.steps;
    const int64_t first = int64_t{span.item / p.token_blocks} * kRows * p.tiles;  // number of an absmax
    const float* const nested = p.w.absmax.nested + first / kNestedBlocksize;
    const int nested_rest = static_cast<int>(first % kNestedBlocksize);
    const int rows = last_row - span.item / p.token_blocks * kRows;  // number of the last one here
    uint32_t flat[kOwn][4];                                          // number of an absmax in tile 0
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int word = thread + o * kDecoders, row = word / (4 * S::kTiles) * 16 + word % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) flat[o][e] = nested_rest + min(row + e / 2 + e % 2 * 8, rows) * p.tiles;
    }
    for (int i = 0; i < steps; ++i) {
      const int tile = min((span.begin + i) * S::kTiles + thread / 4 % S::kTiles, p.tiles - 1);
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        if (thread + o * kDecoders >= kWords) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t block = flat[o][e] + tile;
          if (i == 0 || block % kBlock < S::kTiles) scale[o][e] = nested[block / kBlock];
        }
      }
      wait_barrier(coded + stage * 8, parity);
      char* const here = table + S::kRingAt + stage * S::kStage;
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        const int word = thread + o * kDecoders;
        if (word >= kWords) break;
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(here + S::kX + S::kCodes + word * 4);
        float values[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          values[e] = nested_value(map[codes >> (8 * e) & 255], scale[o][e], offset);
        char* const to = here + S::kPairsAt + word / 8 * 64 + word % 4 * 16 + word / 4 % 2 * 4;
        *reinterpret_cast<uint32_t*>(to) = pair_of<T>(values[0], values[1]);
        *reinterpret_cast<uint32_t*>(to + 8) = pair_of<T>(values[2], values[3]);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(full + stage * 8);
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

/// A part of a sum, which another block may be writing: n registers.
template <int n>
struct Piece {
  uint32_t v[n];

  __device__ __forceinline__ void look(const uint32_t* from, bool exists) {
    if constexpr (n == 4)
      asm volatile(
          "{\n.reg .pred exists;\nsetp.ne.b32 exists, %5, 0;\n"
          "@exists ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
          : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
          : "l"(from), "r"(static_cast<int>(exists))
          : "memory");
    else
      asm volatile(
          "{\n.reg .pred exists;\nsetp.ne.b32 exists, %3, 0;\n"
          "@exists ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];\n}\n"
          : "+r"(v[0]), "+r"(v[1])
          : "l"(from), "r"(static_cast<int>(exists))
          : "memory");
  }
  __device__ __forceinline__ bool is_there() const {
    bool there = true;
#pragma unroll
    for (int i = 0; i < n; ++i) there = there && v[i] != kAbsent;
    return there;
  }
  __device__ __forceinline__ void put(uint32_t* to) const {
    if constexpr (n == 4)
      __stcg(reinterpret_cast<uint4*>(to), make_uint4(v[0], v[1], v[2], v[3]));
    else
      __stcg(reinterpret_cast<uint2*>(to), make_uint2(v[0], v[1]));
  }
};

/// The blocks that have parts of an item before the one that adds them: every stride-th from `first` on.
struct Others {
  int first, stride, count;
  bool puts;  // this one is one of them
};

template <typename T>
__device__ __forceinline__ Others others_of(const Skinny<T>& p, int item) {
  const int from = item * p.steps / p.share, to = (item * p.steps + p.steps - 1) / p.share;
  return {from, 1, to - from, to > static_cast<int>(blockIdx.x)};
}

/// Adds to the sums the parts of other blocks, whose places it leaves absent, or puts them down: then false.
template <int kThreads, int kCount>
__device__ __forceinline__ bool join(float (&sums)[kCount], uint32_t* all_parts, const Others& others) {
  constexpr int kWidth = kCount % 4 == 0 ? 4 : 2, kPieces = kCount / kWidth;
  constexpr int kPieceStride = kThreads * kWidth;
  uint32_t* const parts = all_parts + threadIdx.x * kWidth;
  if (others.puts) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      Piece<kWidth> piece;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const uint32_t bits = __float_as_uint(sums[j * kWidth + i]);
        piece.v[i] = bits == kAbsent ? 0x7fffffffu : bits;
      }
      piece.put(parts + blockIdx.x * kPartFloats + j * kPieceStride);
    }
    return false;
  }
  constexpr int kOnce = 8 / kPieces < 4 ? 8 / kPieces : 4;  // parts
  for (int b = 0; b < others.count; b += kOnce) {
    Piece<kWidth> pieces[kOnce][kPieces] = {};
    const auto place = [&](int o, int j) {
      const int block = others.first + (b + o) * others.stride;
      return parts + block * kPartFloats + j * kPieceStride;
    };
    bool there;
    do {
#pragma unroll
      for (int o = 0; o < kOnce; ++o) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) pieces[o][j].look(place(o, j), b + o < others.count);
      }
      there = true;
#pragma unroll
      for (int o = 0; o < kOnce; ++o) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) there = there && pieces[o][j].is_there();
      }
    } while (!there);
#pragma unroll
    for (int o = 0; o < kOnce; ++o) {
      if (b + o >= others.count) break;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sums[j * kWidth + i] += __uint_as_float(pieces[o][j].v[i]);
          pieces[o][j].v[i] = kAbsent;
        }
        pieces[o][j].put(place(o, j));
      }
    }
  }
  return true;
}

#endif  // HALFBYTE_WGMMA

template <typename T, int kTokens, bool kNested, int kDepth>
__global__ void __launch_bounds__(Shape<kTokens, kNested, kDepth>::kThreads,
                                  Shape<kTokens, kNested, kDepth>::kBlocks)
    skinny_kernel(const __grid_constant__ Skinny<T> p, const __grid_constant__ CUtensorMap code_tiles,
                  const __grid_constant__ CUtensorMap absmax_tiles,
                  const __grid_constant__ CUtensorMap x_tiles) {
#if HALFBYTE_WGMMA
  using S = Shape<kTokens, kNested, kDepth>;
  constexpr bool kExact = kTokens <= 16;
  constexpr int kSums = kTokens / 2, kOwn = kSums / kDepth;  // of a thread; that it keeps
  extern __shared__ __align__(1024) char table[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const int stages = p.stages;
  const uint32_t ring = shared_address(table) + S::kRingAt;
  // of each stage: all is there, absmax decoded where other warps do that; all warps that read it have done
  // so; absmax that other warps decode is there
  const uint32_t full = shared_address(table) + kTable + kMap, empty = full + kMostStages * 8;
  const uint32_t coded = empty + kMostStages * 8;
  let_next_start();
  const int first_step = static_cast<int>(blockIdx.x) * p.share, mine = min(p.share, p.total - first_step);

  if (warp >= S::kConsumers / 32) {
    give_registers<kDepth == 2 ? 56 : 48>();
    if (warp > S::kConsumers / 32) {
      meet_at_start<S>();
      if constexpr (S::kPairs) decode_absmax<T, S>(p, table, coded, full, stages, first_step, mine);
      wait_for_results();
      return;
    }
    struct Cursor {
      int rest;                       // steps of the block before those of this item
      int row_tile, tokens, i, left;  // first row tile and token block of the item; step of it, steps left
    };
    const auto enter_item = [&](Cursor& c) {
      if (c.rest <= 0) return;
      const Span span = span_of(p, first_step, c.rest);
      c.row_tile = span.item / p.token_blocks * kRowTiles;
      c.tokens = span.item % p.token_blocks;
      c.i = span.begin;
      c.left = span.steps;
      c.rest -= span.steps;
    };
    const auto advance = [&](Cursor& c) {
      ++c.i;
      if (--c.left == 0) enter_item(c);
    };
    Cursor weights = {mine, 0, 0, 0, 0};
    enter_item(weights);
    Cursor inputs = weights;
    // beyond the last row or k tile, and beyond the last token: zeros
    const auto fetch_weights = [&](int stage) {
      const uint32_t at = ring + stage * S::kStage + S::kX, there = full + stage * 8;
      if (p.absmax_apart) {
        copy_absmax<S>(p.w, table + S::kRingAt + stage * S::kStage + S::kX + S::kCodes, weights.row_tile,
                       weights.i * S::kTiles, p.tiles);
        __syncwarp();
      }
      if (lane == 0) {
        const int absmax_bytes = p.absmax_apart ? 0 : S::kAbsmax;
        const uint32_t absmax_there = S::kPairs ? coded + stage * 8 : there;
        const auto fetch_absmax = [&] {
          if (!p.absmax_apart)
            fetch_tile_once(at + S::kCodes, absmax_tiles, weights.row_tile,
                            weights.i * (S::kTiles * S::kAbsmaxBytes / 4), absmax_there);
        };
        if (S::kPairs) {
          arrive_expecting(absmax_there, absmax_bytes);
          fetch_absmax();
        }
        arrive_expecting(there, S::kX + S::kCodes + (S::kPairs ? 0 : absmax_bytes));
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
          fetch_tile_once(at + d * (S::kCodes / kDepth), code_tiles, weights.row_tile,
                          (weights.i * S::kTiles + d * 2) * 128, there);
        if (!S::kPairs) fetch_absmax();
      }
      advance(weights);
    };
    const auto fetch_x = [&](int stage) {
      const uint32_t at = ring + stage * S::kStage, there = full + stage * 8;
      if (lane == 0) {
#pragma unroll
        for (int q = 0; q < S::kTiles; ++q)
          fetch_tile(at + q * (kTokens * 128), x_tiles, inputs.tokens * kTokens,
                     (inputs.i * S::kTiles + q) * static_cast<int>(kTileK), there);
      }
      advance(inputs);
    };
    if (lane == 0) {
      prefetch_map(code_tiles);
      prefetch_map(x_tiles);
      if (!p.absmax_apart) prefetch_map(absmax_tiles);
      for (int i = 0; i < stages; ++i) {
        init_barrier(full + i * 8, S::kPairs ? 1 + kDecoders / 32 : 1);
        init_barrier(empty + i * 8, S::kConsumers / 32);
        if (S::kPairs) init_barrier(coded + i * 8, 1);
      }
      publish_barriers();
    }
    __syncwarp();
    if (S::kPairs) asm volatile("bar.arrive 9, %0;\n" ::"n"(S::kThreads) : "memory");
    const int most_early = kTokens >= 32 && mine <= kFewSteps ? kFewEarly : kMostEarly * S::kBlocks;
    const int early = min(min(stages, most_early), (mine + 1) / 2);
    for (int i = 0; i < early; ++i) fetch_weights(i);
    if (!S::kPairs) __syncthreads();
    wait_for_results();
    int stage = 0;
    uint32_t parity = 1;
    for (int i = 0; i < mine; ++i) {
      if (i >= stages) wait_barrier(empty + stage * 8, parity);
      if (i >= early) fetch_weights(stage);
      fetch_x(stage);
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    return;
  }

  take_registers<kDepth == 2 ? 104 : 96>();
  const int depth = kDepth == 1 ? 0 : warp / kRowTiles, row_warp = warp % kRowTiles;
  uint32_t lane4 = lane * 4;
  asm volatile("" : "+r"(lane4));  // not computed again in every step
  fill_compact_table4(table, p.book, kNested ? p.w.absmax.nested_code : nullptr, S::kConsumers);
  const float offset = kNested && !S::kPairs ? *p.w.absmax.offset : 0.0f;
  meet_at_start<S>();
  wait_for_results();

  const uint64_t first_x = describe_b(ring + depth * (2 * kTokens * 128), 0);
  int stage = 0;        // place in the ring
  uint32_t parity = 0;  // of the round through it
  const auto release = [&](int place) {
    __syncwarp();
    if (lane4 == 0) arrive(empty + place * 8);
  };
  for (int rest = mine, steps; rest > 0; rest -= steps) {
    const Span span = span_of(p, first_step, rest);
    const int item = span.item, begin = span.begin;
    steps = span.steps;
    // that it is uniform the compiler learns so: then descriptors of x are added up beside the lanes' work
    const int count = __shfl_sync(0xffffffffu, steps, 0);
    const int64_t first_row = int64_t{item / p.token_blocks} * kRows + row_warp * 16;
    // nested: the four lanes of a row decode one absmax each, of row g + 8 (t / 2) in tile t % 2; `flat` is
    // the number of the row's first one
    const int64_t flat = (min(first_row, p.w.n - kTileRows) + g + t / 2 * 8) * p.tiles;
    const float* const nested_row = p.w.absmax.nested + flat / kNestedBlocksize;
    const int nested_rest = static_cast<int>(flat % kNestedBlocksize);
    const auto nested_of = [&](int i) {
      const int tile = min((begin + i) * S::kTiles + depth * 2 + t % 2, p.tiles - 1);
      return nested_row[(nested_rest + tile) / static_cast<int>(kNestedBlocksize)];
    };
    float nested = kNested && !S::kPairs ? nested_of(0) : 0.0f;
    float acc[kSums], part[2][kExact ? kSums : 1];
    uint32_t a[2][4][4] = {};
    float2 scale[2] = {};
    uint2 pairs = {};  // of both tiles, where other warps decode absmax
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0.0f;
    // the product of tile q of a step is done: its registers are ours again
    const auto finish = [&](auto tile) __attribute__((always_inline)) {
      constexpr int q = decltype(tile)::value;
      hold_registers(a[q]);
      if constexpr (kExact) {
        hold_registers(part[q]);
#pragma unroll
        for (int e = 0; e < kSums; ++e)
          acc[e] = fmaf(part[q][e], e % 4 < 2 ? scale[q].x : scale[q].y, acc[e]);
      }
    };
    // of the step that comes next: out of the ring while the products of the one before run
    uint4 codes[2];
    float2 absmax[2] = {};
    float own = 0.0f;  // nested: the absmax that this lane has decoded
    const auto load_step = [&](int i) __attribute__((always_inline)) {
      wait_barrier(full + stage * 8, parity);
      const char* const here = table + S::kRingAt + stage * S::kStage + S::kX;
      const char* const words = here + depth * (S::kCodes / kDepth) + row_warp * 1024 + lane * 16;
#pragma unroll
      for (int q = 0; q < 2; ++q) codes[q] = *reinterpret_cast<const uint4*>(words + q * 512);
      const int first_tile = row_warp * S::kTiles + depth * 2;
      const char* const scales = here + S::kCodes + first_tile * S::kAbsmaxBytes;
      if (S::kPairs) {
        pairs = *reinterpret_cast<const uint2*>(here - S::kX + S::kPairsAt + first_tile * 32 + g * 8);
      } else if (kNested) {
        const uint32_t code = *reinterpret_cast<const uint8_t*>(scales + t % 2 * 16 + 2 * g + t / 2);
        own = nested_value(reinterpret_cast<const float*>(table + kTable)[code], nested, offset);
        if (i + 1 < count) nested = nested_of(i + 1);
      } else {
#pragma unroll
        for (int q = 0; q < 2; ++q) absmax[q] = *reinterpret_cast<const float2*>(scales + q * 64 + g * 8);
      }
    };
    const auto multiply_tile = [&](uint64_t x, auto tile) __attribute__((always_inline)) {
      constexpr int q = decltype(tile)::value;
      scale[q] = absmax[q];
      if (kNested && !S::kPairs)
        scale[q] = make_float2(__shfl_sync(0xffffffffu, own, q, 4), __shfl_sync(0xffffffffu, own, q + 2, 4));
      const uint32_t words[4] = {codes[q].x, codes[q].y, codes[q].z, codes[q].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) look_up_compact(a[q][j], table, words[j], lane4);
      if (!kExact) {
        const uint32_t pair = q ? pairs.y : pairs.x;
        const uint32_t low = S::kPairs ? __byte_perm(pair, 0, 0x1010) : pair_of<T>(scale[q].x, scale[q].x);
        const uint32_t high = S::kPairs ? __byte_perm(pair, 0, 0x3232) : pair_of<T>(scale[q].y, scale[q].y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[q][j][r] = scale_pair(a[q][j][r], r % 2 ? high : low, T{});
        }
      }
      begin_group();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t x_step = x + (q * (kTokens * 128) + j * 32) / 16;
        if constexpr (kExact)
          multiply_group(part[q], a[q][j], x_step, j > 0, T{});
        else
          multiply_group(acc, a[q][j], x_step, true, T{});
      }
      commit_group();
    };
    load_step(0);
    int last = -1;  // place of the step before, whose second product is under way
    for (int i = 0; i < count; ++i) {
      const uint64_t x = first_x + stage * (S::kStage / 16);
      multiply_tile(x, std::integral_constant<int, 0>{});
      if constexpr (!kExact) {
        wait_group<1>();
        finish(std::integral_constant<int, 1>{});
        if (last >= 0) release(last);
      }
      last = stage;
      multiply_tile(x, std::integral_constant<int, 1>{});
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
      if (i + 1 < count) load_step(i + 1);
      wait_group<1>();
      finish(std::integral_constant<int, 0>{});
      if constexpr (kExact) {  // sums of their own must not be under way at the end of a step
        wait_group<0>();
        finish(std::integral_constant<int, 1>{});
        release(last);
      }
    }
    if constexpr (!kExact) {
      wait_group<0>();
      finish(std::integral_constant<int, 1>{});
      hold_registers(acc);
      release(last);
    }

    float sums[kOwn];
    if constexpr (kDepth == 1) {
#pragma unroll
      for (int e = 0; e < kOwn; ++e) sums[e] = acc[e];
    } else {
      // each of the two warps of the same rows gets the other's sums of half of the registers
      float* const there = reinterpret_cast<float*>(table + S::kSumsAt);  // [kOwn][kConsumers]
      const auto meet = [&] { asm volatile("bar.sync %0, 64;\n" ::"r"(1 + row_warp) : "memory"); };
      if (rest < mine) meet();
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        there[e * S::kConsumers + threadIdx.x] = depth ? acc[e] : acc[kOwn + e];
        sums[e] = depth ? acc[kOwn + e] : acc[e];
      }
      meet();
#pragma unroll
      for (int e = 0; e < kOwn; ++e) sums[e] += there[e * S::kConsumers + (threadIdx.x ^ S::kConsumers / 2)];
    }
    const int first_token = item % p.token_blocks * kTokens;
    // sums of the registers from `first` on, of those of this depth, with the parts of other blocks into y
    const auto deliver = [&](auto& own, int first, const Others& others) __attribute__((always_inline)) {
      if (kDepth == 2 && steps < p.steps &&
          !join<S::kConsumers>(own, reinterpret_cast<uint32_t*>(p.parts), others))
        return;
      constexpr int kCount = sizeof(own) / sizeof(float);
      const bool odd = g % 2;
      // lanes of neighbouring rows exchange, so that each has two rows of one token
#pragma unroll
      for (int j = 0; j < kCount; j += 2) {
        const int e = first + j + depth * kOwn;
        const float other = __shfl_xor_sync(0xffffffffu, odd ? own[j] : own[j + 1], 4);
        const int token = first_token + e / 4 * 8 + 2 * t + odd;
        const int64_t row = first_row + g / 2 * 2 + e % 4 / 2 * 8;
        if (token < p.m && row < p.w.n)
          p.out.store2(token, row, odd ? other : own[j], odd ? own[j + 1] : other);
      }
    };
    if constexpr (S::kPaired) {
      if (p.paired) {
        // each of two blocks gets the other's sums of half of the registers
        constexpr int kHalf = kOwn / 2;
        const int self = static_cast<int>(blockIdx.x), rank = self % 2, blocks = p.steps / p.share;
        float4* const there = reinterpret_cast<float4*>(table + S::kSumsAt) + threadIdx.x;
        float own[kHalf];
        cluster_barrier();  // the other one's warps have read what they exchanged
#pragma unroll
        for (int j = 0; j < kHalf; j += 4) {
          float other[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            other[i] = rank ? sums[j + i] : sums[kHalf + j + i];
            own[j + i] = rank ? sums[kHalf + j + i] : sums[j + i];
          }
          store_at(reinterpret_cast<uint4*>(there + j / 4 * S::kConsumers), 1 - rank,
                   *reinterpret_cast<const uint4*>(other));
        }
        cluster_barrier();
#pragma unroll
        for (int j = 0; j < kHalf; j += 4) {
          const float4 other = there[j / 4 * S::kConsumers];
          own[j] += other.x;
          own[j + 1] += other.y;
          own[j + 2] += other.z;
          own[j + 3] += other.w;
        }
        const int from = item * blocks;
        deliver(own, rank * kHalf, Others{from + rank, 2, blocks / 2 - 1, self / 2 * 2 + 2 < from + blocks});
        return;
      }
    }
    deliver(sums, 0, others_of(p, item));
  }
#endif
}

/// How the line of steps is cut.
struct Cut {
  int steps;         // of an item
  int total, share;  // of all items; of a block
};

/// Blocks of whole items, two on a multiprocessor, where those are not too few.
bool fits_in_pairs(const Launch& on, int64_t items) {
  return items > on.multiprocessors * 5 / 4 && items <= 2 * on.multiprocessors;
}

template <int kDepth>
Cut cut_of(const Launch& on, int64_t items, int64_t k, int tokens, bool whole) {
  // of the end of an item, in steps, as measured
  const double whole_cost = 1.0, part_cost = tokens <= 16 ? 1.0 : 2.25;
  const int64_t steps = (k / kTileK + 2 * kDepth - 1) / (2 * kDepth), all = items * steps;
  const int64_t least = (all + on.multiprocessors - 1) / on.multiprocessors;
  int64_t share = kDepth == 1 ? steps : (least + steps - 1) / steps * steps;
  // as few steps as every multiprocessor must take, or a few more where items are then cut less often
  double best = 0.0;
  for (int64_t candidate = least; !whole && kDepth == 2 && candidate < least + steps; ++candidate) {
    const bool uncut = candidate % steps == 0, one = steps % candidate == 0;
    const int64_t parts = uncut ? 0 : one ? 1 : 2, wholes = candidate / steps;
    const double cost = candidate + parts * part_cost + wholes * whole_cost;
    if (best != 0.0 && cost >= best) continue;
    best = cost;
    share = candidate;
  }
  return {static_cast<int>(steps), static_cast<int>(all), static_cast<int>(share)};
}

template <typename T, int kTokens, bool kNested, int kDepth>
cudaError_t launch(const Launch& on, const Product4<T>& product, float* parts) {
  using S = Shape<kTokens, kNested, kDepth>;
  const Tiled4& w = product.w;
  const int64_t row_tiles = w.n / kTileRows, tiles = w.k / kTileK;
  const void* const absmax_data = kNested ? static_cast<const void*>(w.absmax.codes) : w.absmax.plain;
  Skinny<T> p = {};
  p.w = w;
  p.out = product.out;
  p.book = book_of<T>(w.type);
  p.parts = parts;
  p.m = static_cast<int>(product.m);
  p.tiles = static_cast<int>(tiles);
  p.token_blocks = (p.m + kTokens - 1) / kTokens;
  const int64_t items = (row_tiles + kRowTiles - 1) / kRowTiles * p.token_blocks;
  const Cut cut = cut_of<kDepth>(on, items, w.k, kTokens, !parts);
  p.steps = cut.steps;
  p.total = cut.total;
  p.share = cut.share;
  const int room = std::min(on.shared / S::kBlocks - 1024, 227 << 10) - S::kRingAt;
  p.stages = std::min(room / S::kStage, kMostStages);
  p.absmax_apart = !is_aligned(absmax_data, 16);
  const int blocks = (p.total + p.share - 1) / p.share;
  const int of_item = p.steps % p.share == 0 ? p.steps / p.share : 0;  // blocks, where they have no other
  p.paired = S::kPaired && of_item > 0 && of_item % 2 == 0 && blocks <= 2 * on.clusters_of(2);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = dim3(S::kThreads);
  shape.cluster = p.paired ? 2 : 1;
  shape.shared = static_cast<size_t>(S::kRingAt + p.stages * S::kStage);
  CUtensorMap codes, absmax = {}, x;
  constexpr DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  constexpr int kAbsmaxWords = S::kAbsmaxBytes / 4;
  cudaError_t error = describe_words(&codes, w.codes, row_tiles, tiles * 128, kRowTiles, 256);
  if (error == cudaSuccess && !p.absmax_apart)
    error = describe_words(&absmax, absmax_data, row_tiles, tiles * kAbsmaxWords, kRowTiles,
                           S::kTiles * kAbsmaxWords);
  if (error == cudaSuccess) error = describe_tiles(&x, dtype, product.x, p.m, w.k, kTokens);
  if (error != cudaSuccess) return error;
  return launch_kernel(on, shape, skinny_kernel<T, kTokens, kNested, kDepth>, p, codes, absmax, x);
}

template <typename T, int kTokens>
cudaError_t launch(const Launch& on, const Product4<T>& product, float* parts) {
  const bool nested = !product.w.absmax.plain;
  if constexpr (kTokens <= 16) {
    if (fits_in_pairs(on, (product.w.n + kRows - 1) / kRows))
      return nested ? launch<T, kTokens, true, 1>(on, product, parts)
                    : launch<T, kTokens, false, 1>(on, product, parts);
  }
  return nested ? launch<T, kTokens, true, 2>(on, product, parts)
                : launch<T, kTokens, false, 2>(on, product, parts);
}

}  // namespace

size_t skinny4_sm90_parts(const Launch& on) {
  return static_cast<size_t>(on.multiprocessors) * kPartFloats * sizeof(float);
}

template <typename T>
cudaError_t skinny4_sm90(Launch on, Product4<T> product, float* parts) {
  // so many rows of x at a time that steps can be counted in 32 bits
  const int64_t steps_of_tokens = (product.w.n / kRows + 1) * (product.w.k / 256 + 1);
  const int64_t most = std::max<int64_t>(INT32_MAX / 2 / steps_of_tokens, 1) * 64;
  for (int64_t rest = product.m; rest > 0; rest -= most) {
    product.m = std::min(rest, most);
    const cudaError_t error = product.m <= 8    ? launch<T, 8>(on, product, parts)
                              : product.m <= 16 ? launch<T, 16>(on, product, parts)
                              : product.m <= 32 ? launch<T, 32>(on, product, parts)
                                                : launch<T, 64>(on, product, parts);
    if (error != cudaSuccess) return error;
    product.x += most * product.w.k;
    product.out.y += most * product.out.n;
    if (product.out.residual) product.out.residual += most * product.out.n;
    on.early = true;
  }
  return cudaSuccess;
}

template cudaError_t skinny4_sm90(Launch, Product4<half_t>, float*);
template cudaError_t skinny4_sm90(Launch, Product4<bf16_t>, float*);

}  // namespace halfbyte::cuda
