// gemv4.cu for one to four rows of x, the weight through shared memory, so that what is under way costs no
// registers and a block of 8 warps leaves half of a multiprocessor to another one.
//
//   ring    of every warp, kRing units: codes and absmax of a unit are one group of asynchronous copies. A
//           lane copies the codes that it decodes itself. What else nested absmax takes, maps, offsets and
//           all nested absmax of the block, comes with the first units: nobody waits for it alone
//   decode  a dot product of bytes makes an address, a look-up makes two weights
//   mma     as in gemv4.cu. One row of x: the 8 columns are the tiles of two units, column 2 q + j tile q of
//           unit j, so that lane t of a quad scales tile t of every unit
//
// A small weight takes one block on a multiprocessor. Beside it the next kernel's block starts, fills its
// table and its rings, and waits. It asks for little at a time and not at once: x, which the kernel in front
// reads just then, would wait behind it. Four rows of x are there later than the table; where the rings take
// all that a block has, the weight is held back so long. A large weight takes two blocks on a multiprocessor,
// or, where x needs many registers, one that leaves no room. Three and four rows: small weights, up to 4096
// k.
#include <algorithm>

#include "gemv4_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;  // of a block that leaves room
constexpr int kRing = 4;   // units of a warp
constexpr int kTable = kCompactTable4Bytes;
constexpr int kMostNested = 1536;  // nested absmax of a block: they leave room for sums
constexpr int kHold = 3000;        // clocks after which x of four rows has come to the kernel in front

/// How blocks share a multiprocessor.
enum class Company { next_kernel, own_kernel, none };

template <typename T>
struct Streamed : Gemv<T> {
  bool table_first;   // before the weight is asked for
  bool absmax_apart;  // nested absmax that does not lie on 4 bytes
  int nested;         // nested absmax that a row tile has at most
  int ring;           // nested: where the rings begin in shared memory
  int hold;           // clocks before the weight is asked for, then at once; or 0
};

#if __CUDA_ARCH__ >= 900
/// 8 bytes on 8 bytes.
__device__ __forceinline__ void copy_pair(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(to), "l"(from) : "memory");
}
#endif

/// A unit in shared memory: codes and absmax.
template <bool kNested>
struct Slot {
  static constexpr int kScales = kUnit * 512, kBytes = kScales + (kNested ? 128 : 256);

#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ void fetch(char* to, const RowTile& at, int tile, int lane,
                                               bool absmax_apart, uint64_t policy) {
    const uint32_t there = shared_address(to);
    const uint8_t* const codes = at.codes + (tile * 512 + lane * 16);
#pragma unroll
    for (int kk = 0; kk < kUnit; ++kk) copy_once(there + kk * 512 + lane * 16, codes + kk * 512, policy);
    if (kNested) {
      const char* const absmax = at.absmax + tile * 16;
      if (absmax_apart)
        *reinterpret_cast<uint16_t*>(to + kScales + lane * 2) =
            *reinterpret_cast<const uint16_t*>(absmax + lane * 2);
      else if (lane < 16)
        copy_word_async(there + kScales + lane * 4, absmax + lane * 4, 4);
    } else {
      copy_pair(there + kScales + lane * 8, at.absmax + (tile * 64 + lane * 8));
    }
  }
#endif
};

#if __CUDA_ARCH__ >= 900
/// Asks for what decoding absmax of a block's row tiles takes: the map of every weight, four places for
/// offsets, and the nested absmax of each row tile, p.nested of them at most.
template <typename T>
__device__ __forceinline__ void fetch_nested(char* to, const Streamed<T>& p, int begin, int end) {
  uint32_t there = shared_address(to);
  const int thread = threadIdx.x, lane = thread % 32, warps = blockDim.x / 32;
  for (int part = 0; part < p.count; ++part, there += kCompactMap4Bytes) {
    for (int i = thread; i < 256; i += blockDim.x)
      copy_word_async(there + i * 4, p.w[part].absmax.nested_code + i, 4);
  }
  if (thread < p.count) copy_word_async(there + thread * 4, p.w[thread].absmax.offset, 4);
  there += 16;
  for (int i = thread / 32; i < end - begin; i += warps) {
    const RowTile at = locate(p, begin + i, true);
    const int last = (at.rest + kTileRows * p.tiles - 1) / static_cast<int>(kNestedBlocksize);
    for (int j = lane; j <= last; j += 32) copy_word_async(there + (i * p.nested + j) * 4, at.nested + j, 4);
  }
}
#endif

/// Parameters that are needed at the end: the first to read them waits for memory.
template <typename T>
__device__ __forceinline__ void read_ahead(const Output<T>& out) {
  asm volatile("" ::"l"(out.y), "l"(out.residual), "l"(out.bias), "r"(static_cast<int>(out.bias_dtype)),
               "l"(out.n));
}

/// kTokens rows of x in the columns of a product, kUnits units of a warp in every row tile.
template <typename T, int kTokens, int kUnits, bool kNested>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) streamed_kernel(const __grid_constant__ Streamed<T> p) {
#if __CUDA_ARCH__ >= 900                                      // nothing else runs it
  constexpr int kGroup = kTokens <= 2 ? kUnit : 8 / kTokens;  // tiles of a unit in the columns
  constexpr int kPasses = kUnit / kGroup;                     // groups of a unit
  constexpr int kJoined = kTokens == 1 ? 2 : 1;               // units in the columns
  constexpr int kGroups = (kUnits + kJoined - 1) / kJoined * kPasses;
  using S = Slot<kNested>;
  extern __shared__ __align__(1024) char table[];
  const int start = kTokens > 2 ? clock() : 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* const maps = reinterpret_cast<const float*>(table + kTable);  // [weights][256], offsets
  char* const rings = table + (kNested ? p.ring : kTable);
  char* const ring = rings + warp * (kRing * S::kBytes);
  // [chunk][warps][16][kTokens]
  float* const partial = reinterpret_cast<float*>(rings + warps * (kRing * S::kBytes));
  let_next_start();

  const int g = lane / 4, t = lane % 4;
  const int own =
      kTokens <= 2 ? t : 2 * t / kTokens;  // the tile of a group whose columns this lane accumulates
  const uint32_t lane4 = lane * 4;
  const int last_tiles = p.tiles - kUnit;  // a unit that would reach beyond the end begins here
  const auto first_tile = [&](int i) { return min((warp + i * warps) * kUnit, last_tiles); };
  const int step = p.gated ? 2 : 1, block = blockIdx.x;
  const int begin = (block * p.each + min(block, p.rest)) * step;
  const int end = begin + (p.each + (block < p.rest ? 1 : 0)) * step;
  int next_row = begin, next_unit = 0;  // that is asked for next
  RowTile from = locate(p, begin, kNested);
  const uint64_t policy = once_policy();
  const auto fetch = [&](char* to) __attribute__((always_inline)) {
    if (next_row < end) {
      S::fetch(to, from, first_tile(next_unit), lane, p.absmax_apart, policy);
      if (++next_unit == kUnits) {
        next_unit = 0;
        if (++next_row < end) from = locate(p, next_row, kNested);
      }
    }
    commit_copies();
  };
  // what all warps need of nested absmax comes with the first unit
  if (kNested) fetch_nested(table + kTable, p, begin, end);
  constexpr int kAtOnce = 2;  // units that are asked for before one has come
#pragma unroll 1
  for (int i = 0; i < kRing; ++i) {
    if (i == (p.table_first ? 0 : kAtOnce)) {
      fill_compact_table4(table, p.book, nullptr, blockDim.x);
      while (kTokens > 2 && static_cast<int>(clock()) - start < p.hold) {
      }
    }
    if (i >= kAtOnce && (kTokens <= 2 || p.hold == 0)) wait_copies<kAtOnce - 1>();
    fetch(ring + i * S::kBytes);
  }
#pragma unroll
  for (int i = 0; i < kMaxGroup; ++i) {
    if (i < p.count) read_ahead(p.out[i]);
  }
  int places[kGroups];
  for_each(
      std::make_integer_sequence<int, kGroups>{}, [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, kPass = i % kPasses;
        const int token = kTokens == 1 ? 0 : g % kTokens, column_tile = kTokens == 1 ? g / 2 : g / kTokens;
        const int of_warp = kJoined == 2 ? i * 2 + g % 2 : i / kPasses;
        const int tile = first_tile(of_warp) + kPass * kGroup + column_tile;
        const bool there = token < p.m && of_warp < kUnits && tile >= (warp + of_warp * warps) * kUnit;
        places[i] = place_of_x(p, token, tile, there, t);
        asm volatile("" : "+r"(places[i]));  // now, not when x is there
      });
  if (kTokens > 2) wait_copies<kRing - 1>();  // for what comes with the first unit; else that was waited for
  __syncthreads();
  wait_for_results();
  uint32_t x[kGroups][8];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) load_x(x[i], p, places[i]);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) transpose_quad(x[i], t);

  int slot = 0;  // of the ring
  // adds the product of unit i of a row tile to the sums
  const auto multiply_unit = [&](auto index, int row_tile, float(&acc)[4]) __attribute__((always_inline)) {
    constexpr int i = decltype(index)::value;
    char* const here = ring + slot * S::kBytes;
    wait_copies<kRing - 1>();
    __syncwarp();
    uint4 codes[kUnit];
#pragma unroll
    for (int kk = 0; kk < kUnit; ++kk)
      codes[kk] = *reinterpret_cast<const uint4*>(here + kk * 512 + lane * 16);
    float2 scale[kPasses];  // of the tiles whose sums this lane scales
    uint32_t coded = 0;     // nested: of tile t
    if (kNested) {
      coded = *reinterpret_cast<const uint16_t*>(here + S::kScales + t * 16 + g * 2);
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass)
        scale[pass] =
            *reinterpret_cast<const float2*>(here + S::kScales + (pass * kGroup + own) * 64 + g * 8);
    }
    __syncwarp();
    fetch(here);
    if (++slot == kRing) slot = 0;
    if (kNested) {
      const RowTile at = locate(p, row_tile, kNested);
      const float *const map = maps + at.part * 256, *const offsets = maps + p.count * 256;
      const float* const nested = offsets + 4 + (row_tile - begin) * p.nested;
      const float offset = offsets[at.part];
      constexpr uint32_t kBlock = kNestedBlocksize;
      const uint32_t number = at.rest + g * p.tiles + first_tile(i) + t;  // of an absmax
      float2 decoded;
      decoded.x = nested_value(map[coded & 255], nested[number / kBlock], offset);
      decoded.y = nested_value(map[coded >> 8], nested[(number + 8 * p.tiles) / kBlock], offset);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        scale[pass] = decoded;
        if (kPasses == 1) break;
        scale[pass].x = __shfl_sync(0xffffffffu, decoded.x, pass * kGroup + own, 4);
        scale[pass].y = __shfl_sync(0xffffffffu, decoded.y, pass * kGroup + own, 4);
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t(&b)[8] = x[i / kJoined * kPasses + pass];
      // of the sums with each tile the columns of that tile count
      float sums[kTokens == 1 ? 2 : 4] = {};
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        const uint4 c = codes[pass * kGroup + q];
        const uint32_t words[4] = {c.x, c.y, c.z, c.w};
        float all[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          look_up_compact(a, table, words[j], lane4);
          if (j == 0)
            multiply_first(all, a, b[0], b[1], T{});
          else
            multiply(all, a, b[2 * j], b[2 * j + 1], T{});
        }
        if constexpr (kTokens == 1) {
          sums[0] = own == q ? all[i % 2] : sums[0];
          sums[1] = own == q ? all[2 + i % 2] : sums[1];
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] = own == q ? all[e] : sums[e];
        }
      }
      if constexpr (kTokens == 1) {
        acc[0] = fmaf(sums[0], scale[0].x, acc[0]);
        acc[2] = fmaf(sums[1], scale[0].y, acc[2]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[e] = fmaf(sums[e], e < 2 ? scale[pass].x : scale[pass].y, acc[e]);
      }
    }
  };

  for (int first = begin; first < end; first += p.chunk) {
    const int count = min(p.chunk, end - first);
    for (int i = 0; i < count; ++i) {
      float acc[4] = {};
      for_each(
          std::make_integer_sequence<int, kUnits>{}, [&](auto index) __attribute__((always_inline)) {
            multiply_unit(index, first + i, acc);
          });
      put_sums<kTokens>(acc, partial + i * warps * kTileRows * kTokens, warp, lane);
    }
    finish_row_tiles<kTokens>(p, partial, first, count);
  }
#endif
}

struct Plan {
  int tokens, units, warps;
};

/// How K is divided; tokens = 0 where there is no kernel: the x of a warp takes up to 64 registers, or 32
/// where it has more than two rows.
Plan plan_for(int64_t m, int64_t tiles) {
  constexpr int kOne[] = {2, 3, 4, 6, 7, 10, 14}, kTwo[] = {1, 2, 3, 4, 7};
  const int64_t units = (tiles + kUnit - 1) / kUnit;
  if (m > 4 || tiles < kUnit || units > (m > 2 ? 2 * kWarps : 14 * kMaxWarps)) return {};
  Plan plan = {m > 2 ? 4 : m == 1 && units > kWarps ? 1 : 2, 0, 0};
  // few idle places, and no more warps than leave room
  double best = 0.0;
  const int count = plan.tokens == 1 ? 7 : plan.tokens == 2 ? 5 : 2;
  for (int i = 0; i < count; ++i) {
    const int candidate = plan.tokens == 1 ? kOne[i] : kTwo[i];
    const int warps = static_cast<int>((units + candidate - 1) / candidate);
    if (warps > kMaxWarps) continue;
    const double used = static_cast<double>(units) / (warps * candidate);
    const double score = used * (warps > kWarps ? 0.75 : static_cast<double>(warps) / kWarps);
    if (score <= best) continue;
    best = score;
    plan.units = candidate;
    plan.warps = warps;
  }
  return best > 0.0 ? plan : Plan{};
}

/// Codes of a multiprocessor from which on it is better shared by two blocks of the kernel: what their rings
/// hold.
constexpr int64_t kManyCodes = 2 * kWarps * kRing * kUnit * 512;

template <typename T>
Company company_of(const Launch& on, const Gemv<T>& gemv, const Plan& plan) {
  if (plan.warps > kWarps || (plan.tokens == 2 && plan.units > 4)) return Company::none;
  const int64_t codes = int64_t{gemv.before[gemv.count]} * gemv.tiles * 512;
  if (codes <= kManyCodes * on.multiprocessors) return Company::next_kernel;
  if (gemv.w[0].absmax.plain) return Company::own_kernel;
  // nested: two rows of x and few row tiles are slower with two blocks
  const bool few = gemv.before[gemv.count] < 8 * on.multiprocessors;
  return plan.tokens == 2 && few ? Company::none : Company::own_kernel;
}

/// Nested absmax that a row tile has at most.
int nested_of(int tiles) {
  return static_cast<int>((kTileRows * tiles + kNestedBlocksize - 2) / kNestedBlocksize) + 1;
}

template <typename T, bool kNested, int kTokens, int kUnits>
cudaError_t launch(const Launch& on, const Plan& plan, const Gemv<T>& gemv) {
  Streamed<T> p = {gemv, false, false, nested_of(gemv.tiles), 0, 0};
  const int step = p.gated ? 2 : 1, all = p.before[p.count] / step;
  const Company company = company_of(on, gemv, plan);
  const int blocks = company == Company::own_kernel ? 2 : 1;
  const int grid = std::min(all, on.multiprocessors * blocks);
  p.each = all / grid;
  p.rest = all % grid;
  const int row_tiles = (p.each + (p.rest > 0)) * step;
  const int maps = kNested ? p.count * kCompactMap4Bytes + 16 + row_tiles * p.nested * 4 : 0;
  p.ring = kTable + (maps + 127) / 128 * 128;
  const int slot_bytes = plan.warps * kTileRows * kTokens * 4;
  const int fixed = p.ring + plan.warps * kRing * Slot<kNested>::kBytes;
  const int half = on.shared / 2 - 1024, room = (company == Company::none ? on.shared - 1024 : half) - fixed;
  p.chunk = std::min(row_tiles, room / slot_bytes / step * step);
  p.table_first = company == Company::next_kernel;
  if (p.table_first && kTokens > 2 && row_tiles * kUnits <= kRing) p.hold = kHold;
  for (int i = 0; i < p.count && kNested; ++i) p.absmax_apart |= !is_aligned(p.w[i].absmax.codes, 4);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(grid));
  shape.block = dim3(plan.warps * 32);
  shape.shared = static_cast<size_t>(fixed + p.chunk * slot_bytes);
  if (company == Company::none) shape.shared = std::max(shape.shared, static_cast<size_t>(half) + 1);
  return launch_kernel(on, shape, streamed_kernel<T, kTokens, kUnits, kNested>, p);
}

template <typename T, bool kNested>
cudaError_t launch(const Launch& on, const Plan& plan, const Gemv<T>& gemv) {
  switch (plan.tokens * 100 + plan.units) {
    case 102:
      return launch<T, kNested, 1, 2>(on, plan, gemv);
    case 103:
      return launch<T, kNested, 1, 3>(on, plan, gemv);
    case 104:
      return launch<T, kNested, 1, 4>(on, plan, gemv);
    case 106:
      return launch<T, kNested, 1, 6>(on, plan, gemv);
    case 107:
      return launch<T, kNested, 1, 7>(on, plan, gemv);
    case 110:
      return launch<T, kNested, 1, 10>(on, plan, gemv);
    case 114:
      return launch<T, kNested, 1, 14>(on, plan, gemv);
    case 201:
      return launch<T, kNested, 2, 1>(on, plan, gemv);
    case 202:
      return launch<T, kNested, 2, 2>(on, plan, gemv);
    case 203:
      return launch<T, kNested, 2, 3>(on, plan, gemv);
    case 204:
      return launch<T, kNested, 2, 4>(on, plan, gemv);
    case 207:
      return launch<T, kNested, 2, 7>(on, plan, gemv);
    case 401:
      return launch<T, kNested, 4, 1>(on, plan, gemv);
    case 402:
      return launch<T, kNested, 4, 2>(on, plan, gemv);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename T>
bool gemv4_sm90_takes(const Launch& on, const Gemv<T>& gemv) {
  const int all = gemv.before[gemv.count], sms = on.multiprocessors;
  const Plan plan = plan_for(gemv.m, gemv.tiles);
  if (on.arch < 90 || on.block_shared < 227 << 10 || plan.tokens == 0) return false;
  if (plan.tokens > 2 && company_of(on, gemv, plan) != Company::next_kernel) return false;
  return gemv.w[0].absmax.plain || (all + 2 * sms - 1) / sms * nested_of(gemv.tiles) <= kMostNested;
}

template <typename T>
cudaError_t gemv4_sm90(const Launch& on, const Gemv<T>& gemv) {
  const Plan plan = plan_for(gemv.m, gemv.tiles);
  return gemv.w[0].absmax.plain ? launch<T, false>(on, plan, gemv) : launch<T, true>(on, plan, gemv);
}

template bool gemv4_sm90_takes(const Launch&, const Gemv<half_t>&);
template bool gemv4_sm90_takes(const Launch&, const Gemv<bf16_t>&);
template cudaError_t gemv4_sm90(const Launch&, const Gemv<half_t>&);
template cudaError_t gemv4_sm90(const Launch&, const Gemv<bf16_t>&);

}  // namespace halfbyte::cuda
