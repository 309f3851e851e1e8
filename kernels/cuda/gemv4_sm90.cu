// gemv4.cu for one and two rows of x, the weight through shared memory, so that what is under way costs no
// registers and a block of 8 warps leaves half of a multiprocessor to another one.
//
//   ring    of every warp, kRing units: codes, absmax and nested absmax of a unit are one group of
//           asynchronous copies. A lane copies the codes that it decodes itself
//   decode  a dot product of bytes makes an address, a look-up makes two weights
//   mma     as in gemv4.cu. One row of x: the 8 columns are the tiles of two units, column 2 q + j tile q of
//           unit j, so that lane t of a quad scales tile t of every unit
//
// A small weight takes one block on a multiprocessor. Beside it the next kernel's block starts, fills its
// table and its rings, and waits. It asks for little at a time and not at once: x, which the kernel in front
// reads just then, would wait behind it. A large weight takes two blocks on a multiprocessor, or, where x
// needs many registers, one that leaves no room.
#include <algorithm>

#include "gemv4_product.cuh"
#include "launch.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;  // of a block that leaves room
constexpr int kRing = 4;   // units of a warp
constexpr int kTable = kCompactTable4Bytes, kMap = kCompactMap4Bytes;

/// How blocks share a multiprocessor.
enum class Company { next_kernel, own_kernel, none };

template <typename T>
struct Streamed : Gemv<T> {
  bool table_first;   // before the weight is asked for
  bool absmax_apart;  // nested absmax that does not lie on 4 bytes
};

#if __CUDA_ARCH__ >= 900
/// 8 bytes on 8 bytes.
__device__ __forceinline__ void copy_pair(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(to), "l"(from) : "memory");
}
#endif

/// A unit in shared memory: codes, absmax and, where that is nested, the two nested absmax of every lane.
template <bool kNested>
struct Slot {
  static constexpr int kScales = kUnit * 512, kNestedAt = kScales + 64;
  static constexpr int kBytes = kNested ? kNestedAt + 256 : kScales + 256;

#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ void fetch(char* to, const RowTile& at, int tile, int tiles, int lane,
                                               bool absmax_apart) {
    const uint32_t there = shared_address(to);
    const uint64_t policy = once_policy();
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
      constexpr uint32_t kBlock = kNestedBlocksize;
      const uint32_t block = at.rest + lane / 4 * tiles + tile + lane % 4;
      copy_word_async(there + kNestedAt + lane * 8, at.nested + block / kBlock, 4);
      copy_word_async(there + kNestedAt + lane * 8 + 4, at.nested + (block + 8 * tiles) / kBlock, 4);
    } else {
      copy_pair(there + kScales + lane * 8, at.absmax + (tile * 64 + lane * 8));
    }
  }
#endif
};

/// Parameters that are needed at the end: the first to read them waits for memory.
template <typename T>
__device__ __forceinline__ void read_ahead(const Output<T>& out) {
  asm volatile("" ::"l"(out.y), "l"(out.residual), "l"(out.bias), "r"(static_cast<int>(out.bias_dtype)),
               "l"(out.n));
}

/// kTokens rows of x, 1 or 2, in the columns of a product, kUnits units of a warp in every row tile.
template <typename T, int kTokens, int kUnits, bool kNested>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) streamed_kernel(const __grid_constant__ Streamed<T> p) {
#if __CUDA_ARCH__ >= 900                         // nothing else runs it
  constexpr int kJoined = kTokens == 1 ? 2 : 1;  // units in the columns
  constexpr int kGroups = (kUnits + kJoined - 1) / kJoined;
  using S = Slot<kNested>;
  extern __shared__ __align__(1024) char table[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* const map = reinterpret_cast<const float*>(table + kTable);
  char* const ring = table + kTable + kMap + warp * (kRing * S::kBytes);
  // [chunk][warps][16][kTokens]
  float* const partial = reinterpret_cast<float*>(table + kTable + kMap + warps * (kRing * S::kBytes));
  let_next_start();

  const int g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  const int last_tiles = p.tiles - kUnit;  // a unit that would reach beyond the end begins here
  const auto first_tile = [&](int i) { return min((warp + i * warps) * kUnit, last_tiles); };
  const int step = p.gated ? 2 : 1, block = blockIdx.x;
  const int begin = (block * p.each + min(block, p.rest)) * step;
  const int end = begin + (p.each + (block < p.rest ? 1 : 0)) * step;

  int next_row = begin, next_unit = 0;  // that is asked for next
  RowTile from = locate(p, begin, kNested);
  const auto fetch = [&](char* to) __attribute__((always_inline)) {
    if (next_row < end) {
      S::fetch(to, from, first_tile(next_unit), p.tiles, lane, p.absmax_apart);
      if (++next_unit == kUnits) {
        next_unit = 0;
        if (++next_row < end) from = locate(p, next_row, kNested);
      }
    }
    commit_copies();
  };
  constexpr int kAtOnce = 2;  // units that are asked for before one has come
#pragma unroll 1
  for (int i = 0; i < kRing; ++i) {
    if (i == (p.table_first ? 0 : kAtOnce))
      fill_compact_table4(table, p.book, kNested ? p.w[0].absmax.nested_code : nullptr, blockDim.x);
    if (i >= kAtOnce) wait_copies<kAtOnce - 1>();
    fetch(ring + i * S::kBytes);
  }
  float offset[kMaxGroup] = {};
  bool same_map = !kNested || read_nested(offset, p);  // the maps of all weights are that in shared memory
#pragma unroll
  for (int i = 0; i < kMaxGroup; ++i) {
    if (i < p.count) read_ahead(p.out[i]);
  }

  wait_for_results();
  uint32_t x[kGroups][8];
  for_each(
      std::make_integer_sequence<int, kGroups>{}, [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value;
        const int token = kTokens == 1 ? 0 : g % 2, tile_of_unit = g / 2;
        const int of_warp = i * kJoined + (kJoined == 2 ? g % 2 : 0),
                  tile = first_tile(of_warp) + tile_of_unit;
        const bool there = token < p.m && of_warp < kUnits && tile >= (warp + of_warp * warps) * kUnit;
        load_x(x[i], p, token, tile, there, t);
      });
  same_map = __syncthreads_and(same_map);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) transpose_quad(x[i], t);

  int slot = 0, place = 0;  // of sums; in the ring
  for (int row_tile = begin; row_tile < end; ++row_tile) {
    const int part = kNested ? locate(p, row_tile, kNested).part : 0;
    const float mean = part == 0 ? offset[0] : part == 1 ? offset[1] : offset[2];
    float acc[4] = {};
    for_each(
        std::make_integer_sequence<int, kUnits>{}, [&](auto index) __attribute__((always_inline)) {
          constexpr int i = decltype(index)::value;
          char* const here = ring + place * S::kBytes;
          wait_copies<kRing - 1>();
          __syncwarp();
          uint4 codes[kUnit];
#pragma unroll
          for (int kk = 0; kk < kUnit; ++kk)
            codes[kk] = *reinterpret_cast<const uint4*>(here + kk * 512 + lane * 16);
          float2 scale;  // of tile t; nested: their nested absmax
          uint32_t coded = 0;
          if (kNested) {
            coded = *reinterpret_cast<const uint16_t*>(here + S::kScales + t * 16 + g * 2);
            scale = *reinterpret_cast<const float2*>(here + S::kNestedAt + lane * 8);
          } else {
            scale = *reinterpret_cast<const float2*>(here + S::kScales + t * 64 + g * 8);
          }
          __syncwarp();
          fetch(here);
          if (++place == kRing) place = 0;
          if (kNested) {
            const uint32_t low = coded & 255, high = coded >> 8;
            const float* const other = p.w[part].absmax.nested_code;
            const float a = same_map ? map[low] : other[low], b = same_map ? map[high] : other[high];
            scale = make_float2(nested_value(a, scale.x, mean), nested_value(b, scale.y, mean));
          }
          // of the sums with each tile the columns of that tile count
          float sums[kTokens == 1 ? 2 : 4] = {};
#pragma unroll
          for (int q = 0; q < kUnit; ++q) {
            const uint32_t words[4] = {codes[q].x, codes[q].y, codes[q].z, codes[q].w};
            const uint32_t(&b)[8] = x[i / kJoined];
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
              sums[0] = t == q ? all[i % 2] : sums[0];
              sums[1] = t == q ? all[2 + i % 2] : sums[1];
            } else {
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[e] = t == q ? all[e] : sums[e];
            }
          }
          if constexpr (kTokens == 1) {
            acc[0] = fmaf(sums[0], scale.x, acc[0]);
            acc[2] = fmaf(sums[1], scale.y, acc[2]);
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[e] = fmaf(sums[e], e < 2 ? scale.x : scale.y, acc[e]);
          }
        });

    put_sums<kTokens>(acc, partial + slot * warps * kTileRows * kTokens, warp, lane);
    if (++slot < p.chunk && row_tile + 1 < end) continue;
    finish_row_tiles<kTokens>(p, partial, row_tile + 1 - slot, slot);
    slot = 0;
  }
#endif
}

struct Plan {
  int tokens, units, warps;
};

/// How K is divided; tokens = 0 where there is no kernel: the x of a warp takes up to 64 registers.
Plan plan_for(int64_t m, int64_t tiles) {
  constexpr int kOne[] = {2, 3, 4, 6, 7, 10, 14}, kTwo[] = {1, 2, 3, 4, 7};
  const int64_t units = (tiles + kUnit - 1) / kUnit;
  if (m > 2 || tiles < kUnit || units > 14 * kMaxWarps) return {};
  Plan plan = {m == 1 && units > kWarps ? 1 : 2, 0, 0};
  // few idle places, and no more warps than leave room
  double best = 0.0;
  const int count = plan.tokens == 1 ? 7 : 5;
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
  const bool nested = !gemv.w[0].absmax.plain;
  return nested && plan.tokens == 2 ? Company::none : Company::own_kernel;
}

template <typename T, bool kNested, int kTokens, int kUnits>
cudaError_t launch(const Launch& on, const Plan& plan, const Gemv<T>& gemv) {
  Streamed<T> p = {gemv, false, false};
  const int step = p.gated ? 2 : 1, all = p.before[p.count] / step;
  const Company company = company_of(on, gemv, plan);
  const int blocks = company == Company::own_kernel ? 2 : 1;
  const int slot_bytes = plan.warps * kTileRows * kTokens * 4;
  const int fixed = kTable + kMap + plan.warps * kRing * Slot<kNested>::kBytes;
  const int half = on.shared / 2 - 1024, room = (company == Company::none ? on.shared - 1024 : half) - fixed;
  const int grid = std::min(all, on.multiprocessors * blocks);
  p.each = all / grid;
  p.rest = all % grid;
  p.chunk = std::min((p.each + (p.rest > 0)) * step, room / slot_bytes / step * step);
  p.table_first = company == Company::next_kernel;
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
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename T>
bool gemv4_sm90_takes(const Launch& on, const Gemv<T>& gemv) {
  if (on.arch < 90 || on.shared < 227 << 10 || plan_for(gemv.m, gemv.tiles).tokens == 0) return false;
  if (gemv.w[0].absmax.plain) return true;
  // nested: gemv4.cu is faster from 8 row tiles of a multiprocessor on
  return gemv.before[gemv.count] < 8 * on.multiprocessors;
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
