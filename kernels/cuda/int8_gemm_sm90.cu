// y = (a b^T * row scale + outlier columns) * column scale + bias + residual with int8 a [M, K] and b [N, K],
// on sm_90a: the weight b is the A operand of wgmma and a, the tokens, is B, both from shared memory. For 9
// rows of a and more, 5 where K is long; bound by the tensor cores from some hundreds on, below by reading b.
//
// A block makes 128 rows of b times kTokens tokens: a producer thread, two consumer warpgroups of 64 rows
// each, and some warps for outlier columns.
//
//   ring      a step is 128 k: boxes of b [128][128 bytes] and a [kTokens][128 bytes] by the copy engine,
//             swizzled. With kPair, two blocks of neighbouring rows of b fetch half of a each, for both
//   product   4 products of 32 k a step and warpgroup, int32 sums in registers
//   scale     sums become fp32, times the token's scale
//   outliers  64 columns in 16 bits at a time, of what the codes of x leave of x, and codes of b, which are
//             exact. More warps find the columns among the marks and pick b's from the ring while the product
//             runs, into the memory of the end. Other ones read x's there; or, with 128 tokens and more or
//             with one item a block, those of all blocks make rows of them while the first items are
//             multiplied, which the copy engine fetches, with 256 tokens into the ring. Where blocks divide K
//             each has the columns of its part. Columns beyond 64 come in further rounds, from memory
//   end       times the row's scale, + bias + residual, rounded once and turned round; without a residual the
//             copy engine writes it between the first products of the next item (int8_output_sm90.cuh)
//
// Blocks stay and take items in turn, in bands of token tiles, so that what runs at once shares a and b in
// L2. Items that do not fill the last round go to a cluster each, whose blocks divide K and exchange sums
// through shared memory, in a fixed order.
#include <atomic>
#include <climits>

#include "int8_gemm_sm90.cuh"

namespace halfbyte::cuda {
namespace {

using namespace int8_sm90;

#if HALFBYTE_WGMMA

/// Writes sums of types that are not turned round: fp32 and int32.
template <int kTokens, typename T, typename V>
__device__ __forceinline__ void write_plain(const Output<T>& out, int64_t tokens, const V (&acc)[kTokens / 2],
                                            int64_t first_row, int64_t first_token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int64_t m = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int64_t row = first_row + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    if (m >= tokens || row >= out.n) continue;
    if constexpr (std::is_same_v<V, float>)
      out.store(m, row, acc[i]);
    else
      out.y[m * out.n + row] = acc[i];
  }
}

/// The rest of an item that the copy engine does not write: sums of kTokens tokens, of whole K.
template <int kTokens, typename T>
__device__ __forceinline__ void finish(const Gemm8<T>& p, float (&acc)[kTokens / 2], char* staging, int group,
                                       int64_t first_row, int64_t first_token) {
  const int64_t row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  const int64_t rows[2] = {min(row, p.out.n - 1), min(row + 8, p.out.n - 1)};
  const float scale[2] = {p.scb[rows[0]] * kInt8Scale, p.scb[rows[1]] * kInt8Scale};
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] *= scale[i / 2 % 2];
  if constexpr (std::is_same_v<T, float>) {
    write_plain<kTokens>(p.out, p.m, acc, first_row, first_token);
  } else {
    if (p.engine) {  // it may still read the staging of the item before
      if (threadIdx.x % kGroup == 0) wait_stores<0>();
      group_barrier(group);
    }
    write_sums<kTokens>(p.out, p.m, p.whole_lines, acc, staging, group, first_row, first_token);
  }
}

template <int kSplits, int kTokens, typename T, typename V>
__device__ __forceinline__ void finish_divided(const Gemm8<T>& p, const V (&acc)[kTokens / 2], char* ring,
                                               uint32_t arrived, char* staging, int group, int64_t first_row,
                                               int64_t first_token) {
  constexpr int kShare = kTokens / kSplits;
  if constexpr (kShare >= 16 && kTokens < 256) {  // more would not fit into registers
    V total[kShare / 2];
    exchange_sums<kSplits, kConsumers>(total, acc, ring, arrived);
    first_token += cluster_rank() * kShare;
    if constexpr (std::is_same_v<V, float>) {
      finish<kShare>(p, total, staging, group, first_row, first_token);
    } else {
      write_plain<kShare>(p.out, p.m, total, first_row, first_token);
    }
  }
}

#endif  // HALFBYTE_WGMMA

template <typename T, int kTokens, bool kPair>
__global__ void __launch_bounds__(Warps<kTokens>::kThreads, 1)
    int8_gemm_kernel(const __grid_constant__ Gemm8<T> p, const __grid_constant__ Maps maps) {
#if HALFBYTE_WGMMA
  using S = Space<kTokens>;
  constexpr int kPickers = Warps<kTokens>::kPickers, kReaders = Warps<kTokens>::kReaders;
  constexpr int kStages = S::kStages, kBlocks = kPair ? 2 : 1;
  constexpr bool kSums = std::is_same_v<T, int32_t>;  // nothing but the sums
  extern __shared__ __align__(1024) char space[];
  const uint32_t ring = shared_address(space), full = ring + S::kBarriersAt, empty = full + kStages * 8;
  // outlier columns: b's, and up to 128 tokens x's, are where the end will be, with more tokens x's in the
  // ring
  constexpr bool kInRing = kTokens > 128;
  const bool outliers = !kSums && p.marks;
  char* const outlier_rows = space + S::kStagingAt;
  int* const outlier_slots =
      reinterpret_cast<int*>(space + S::kSlotsAt);  // of this round; + kMore: not the last
  int* const columns_gathered = outlier_slots + 1;  // and those beyond
  // a round is there; it is multiplied and another comes; an item has begun, those before have left;
  // the reader may fill a stage; what all tokens have in outlier columns is gathered. Sums of other blocks of
  // the cluster are there
  const uint32_t outliers_full = empty + kStages * 8, outliers_empty = outliers_full + 8,
                 outliers_free = outliers_full + 16, outliers_asked = outliers_full + 24,
                 outliers_gathered = outliers_full + 32, sums_arrived = outliers_full + 40;
  constexpr int kMore = 1 << 16;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const int rank = kPair ? cluster_rank() : 0;
  let_next_start();

  if (threadIdx.x == kConsumers) {
    prefetch_map(maps.a);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, kBlocks * kConsumers / 32 + (outliers ? 1 : 0));
    }
    if (outliers) {
      init_barrier(outliers_full, kPickers + kReaders);
      init_barrier(outliers_empty, kConsumers / 32);
      init_barrier(outliers_free, 2);
      init_barrier(outliers_asked, 1);
      init_barrier(outliers_gathered, 1);
    }
    if (!kPair && p.splits > 1) {
      init_barrier(sums_arrived, 1);
      arrive_expecting(sums_arrived, kTokens * kRows * 4 / p.splits * (p.splits - 1));
    }
    publish_barriers();
  }
  const auto fetch_rows = [&](int stage, const CUtensorMap& map, int row, int column) {
    arrive_expecting(full + stage * 8, S::kStage);
    if (kTokens <= 128 || p.once)  // few tiles of tokens, at work at once: x, its codes and y may have L2
      fetch_tile_once(ring + stage * S::kStage, map, row, column, full + stage * 8);
    else
      fetch_tile(ring + stage * S::kStage, map, row, column, full + stage * 8);
  };
  const auto fetch_tokens = [&](int stage, const CUtensorMap& map, int token, int column) {
    constexpr int kHere = kTokens / kBlocks;
    const uint32_t to = ring + stage * S::kStage + kRowBytes + rank * (kHere * kStep);
    if (kPair)
      fetch_tile_for(to, map, token + rank * kHere, column, full + stage * 8, 3);
    else if (kInRing && p.once)
      fetch_tile_once(to, map, token, column, full + stage * 8);
    else
      fetch_tile(to, map, token, column, full + stage * 8);
  };
  // first steps of the first item: b's before the wait, a's at once behind it, where no other block gets them
  int early = 0, early_token = 0, early_column = 0;
  if (Work work; threadIdx.x == kConsumers && find_work<kPair>(p, 0, &work)) {
    const Place place = place_of(p, work.item);
    const int row = (place.rows * kBlocks + rank) * kRows;
    early_token = place.tokens * kTokens;
    early_column = work.first_step * kStep;
    for (; early < min(kStages, work.steps); ++early)
      fetch_rows(early, maps.b, row, early_column + early * kStep);
  }
  const bool gathers = outliers && (kInRing || (p.rest && p.rounds != 0));  // there are whole items
  const int own = warp - kConsumers / 32 - 1, reader = own - kPickers;      // pickers come first
  // steps beyond K have no columns
  const auto end_of = [&](const Work& work) {
    return min(work.first_step + work.steps, static_cast<int>((p.k + kStep - 1) / kStep));
  };
  Work first_work = {0, 0, p.steps};  // whose marks come first; who gathers wants those of all columns
  if (!(gathers && reader >= 0)) find_work<kPair>(p, 0, &first_work);
  if (kPair)
    cluster_barrier();
  else
    __syncthreads();
  // each kind of warp waits for the kernels before by itself, where it first needs what they have made
  if (warp >= kConsumers / 32) {
    give_registers<(kTokens > 128 ? 56 : 88)>();
    if (threadIdx.x == kConsumers) {
      wait_for_results();
      for (int i = 0; !kPair && i < early; ++i)
        fetch_tokens(i, maps.a, early_token, early_column + i * kStep);
      int stage = 0, columns = 0;
      uint32_t parity = 1;
      const auto next = [&] {
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      Work work;
      for (int n = 0; find_work<kPair>(p, n, &work); ++n) {
        const Place place = place_of(p, work.item);
        const int row = (place.rows * kBlocks + rank) * kRows, token = place.tokens * kTokens;
        for (int i = 0; i < work.steps; ++i, next()) {
          const int column = (work.first_step + i) * kStep;
          // a stage that was fetched early may have been left already, and its barrier be a phase further on
          if (early == 0) {
            wait_barrier(empty + stage * 8, parity);
            fetch_rows(stage, maps.b, row, column);
          }
          if (kPair || early == 0) fetch_tokens(stage, maps.a, token, column);
          if (early > 0) --early;
        }
        if (kInRing && outliers && n == 0) {
          wait_barrier(outliers_gathered, 0);
          columns = *columns_gathered;
          if (columns > 0) publish_memory();
        }
        for (int round = 0; kInRing && round * kRoundColumns<T> < columns; ++round, next()) {
          wait_barrier(empty + stage * 8, parity);
          if (round >= kRestRounds) {  // a reader fills it
            arrive(outliers_asked);
            wait_barrier(full + stage * 8, parity ^ 1);
            continue;
          }
          arrive_expecting(full + stage * 8, kTokens * kStep);
          fetch_tile(ring + stage * S::kStage + kRowBytes, maps.rest, token, round * kRoundSlots,
                     full + stage * 8);
        }
      }
    } else if (outliers && own >= 0) {
      Gatherer<kTokens, T> gatherer{p, outlier_rows,
                                    reinterpret_cast<int*>(space + S::kColumnsAt) + own * kRoundSlots, 0};
      constexpr int kColumns = kRoundColumns<T>;
      FirstMarks first_marks;
      wait_for_results();
      first_marks.fetch(p.marks, first_work.first_step, end_of(first_work));
      const uint32_t* const set = p.marks->bits[first_marks.second];
      uint4 bits = first_marks.bits();
      int stage = 0, all = 0, more_rounds = 0;
      uint32_t parity = 0;
      const auto next = [&] {
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      // Until the consumers have begun this item, and those before have left the memory of the end. Each warp
      // waits for that before it writes there, at first only before it says that its part is there: once an
      // item, and before the consumers can begin another.
      const auto wait_for_memory = [&](int n) { wait_barrier(outliers_free, n & 1); };
      const auto list_round = [&](const Work& work, const uint4& first, int from) {
        all = list_columns(set, first, work.first_step * kStep, end_of(work) * kStep, from, kColumns,
                           gatherer.columns);
      };
      Work work;
      if (reader < 0) {
        MarkedColumns marked;
        for (int n = 0; find_work<kPair>(p, n, &work); ++n) {
          bool may_write = n == 0, cleared = false;
          for (int i = 0; i < work.steps; ++i, next()) {
            // an item has the columns of the one before, but for divided ones
            if (i % 32 == 0 &&
                (n == 0 || n == p.rounds || n + 1 == p.rounds || work.steps > 32 || all > kColumns)) {
              const uint4 now = bits;
              Work then;  // the next item
              if (i + 32 < work.steps)
                bits = fetch_marks(set, work.first_step + i + 32, end_of(work));
              else if ((work.steps > 32 || n + 1 == p.rounds) && find_work<kPair>(p, n + 1, &then))
                bits = fetch_marks(set, then.first_step, end_of(then));
              marked.take(now, i == 0 ? 0 : marked.all, work.first_step + i, 0, kColumns, gatherer.columns);
            }
            // one picker for all uses of a stage, which waits for what they leave: it never is two of them
            // ahead, where parities are equal
            if (stage % kPickers != own) continue;
            wait_barrier(empty + stage * 8, parity ^ 1);
            if (marked.groups >> (i % 32) & 1) {
              if (!may_write) wait_for_memory(n);
              may_write = true;
              const int first = __shfl_sync(0xffffffffu, marked.before, i % 32);
              const int behind = first + __shfl_sync(0xffffffffu, marked.own, i % 32);
              wait_barrier(full + stage * 8, parity);
              gatherer.pick(space + stage * S::kStage, first, min(behind, kColumns));
            }
            __syncwarp();
            if (lane == 0) arrive(empty + stage * 8);
            if (!cleared && may_write && i / 32 == (work.steps - 1) / 32) {  // all are known
              gatherer.clear_rest(own, min(marked.all, kColumns));
              cleared = true;
            }
          }
          all = marked.all;
          if (n == 0 || !may_write) wait_for_memory(n);
          if (!cleared) gatherer.clear_rest(own, min(all, kColumns));
          int from = 0;
          do {
            const int here = min(all - from, kColumns);
            if (from > 0) {
              list_round(work, fetch_marks(set, work.first_step, end_of(work)), from);
              wait_barrier(outliers_empty, more_rounds++ & 1);
              gatherer.here = here;
              gatherer.fetch_rows(static_cast<int64_t>(place_of(p, work.item).rows * kBlocks + rank) * kRows,
                                  own);
              gatherer.clear_rest(own, here);
            }
            if (own == 0 && lane == 0)
              *outlier_slots = here * gatherer.kPieces + (from + here < all ? kMore : 0);
            __syncwarp();
            if (lane == 0) arrive(outliers_full);
            if (kInRing && here > 0) {  // the stage with the tokens
              if (stage % kPickers == own) {
                wait_barrier(empty + stage * 8, parity ^ 1);
                if (lane == 0) arrive(empty + stage * 8);
              }
              next();
            }
            from += kColumns;
          } while (from < all);
        }
      } else {
        int gathered = 0, asked = 0;
        if (gathers) {
          // The readers of all blocks gather, and the first of each waits for the others. With 256 tokens
          // blocks need not run at once: it waits a while and then makes all of it itself. All who write a
          // place write the same.
          const int own_share = reader * gridDim.x + blockIdx.x, shares = kReaders * gridDim.x;
          for (bool alone = false;; alone = true) {
            gathered = gatherer.gather_share(set, bits, alone ? 0 : own_share, alone ? 1 : shares);
            if (alone) publish_memory();
            if (alone || gathered == 0) break;
            count_warp(p.gathered);
            if (reader > 0) break;
            const int there = lane == 0 ? wait_for_count(p.gathered, shares, kInRing ? 100 : INT_MAX) : 0;
            if (!kInRing || __shfl_sync(0xffffffffu, there, 0) == shares) break;
          }
          __syncwarp();
          if (kInRing && lane == 0) {
            *columns_gathered = gathered;
            arrive(outliers_gathered);
          }
        }
        for (int n = 0; find_work<kPair>(p, n, &work); ++n) {
          const int64_t first_token = static_cast<int64_t>(place_of(p, work.item).tokens) * kTokens;
          int from = 0;
          do {
            // p.rest has them, of all K
            const bool are_gathered = gathers && n != p.rounds && from < kRestRounds * kColumns;
            if (are_gathered)
              all = gathered;
            else if (n == 0 && from == 0)
              list_round(work, bits, 0);
            else if (n == p.rounds || all > kColumns)  // else they are those of the item before
              list_round(work, fetch_marks(set, work.first_step, end_of(work)), from);
            const int here = gatherer.here = min(all - from, kColumns);
            if (from > 0)
              wait_barrier(outliers_empty, more_rounds++ & 1);
            else if (n > 0)
              wait_for_memory(n);
            const bool waits = from == 0 && n == 0;
            if (kInRing) {
              if (waits) wait_for_memory(n);
              if (lane == 0) arrive(outliers_full);
              if (from == 0) {
                for (int i = 0; i < work.steps; ++i) next();
              }
              if (here > 0) {
                if (!are_gathered) {
                  wait_barrier(outliers_asked, asked++ & 1);
                  gatherer.fetch_tokens(space + stage * S::kStage + kRowBytes, first_token, reader);
                  publish_shared();
                  __syncwarp();
                  if (lane == 0) arrive(full + stage * 8);
                }
                next();
              }
            } else if (are_gathered && here > 0) {
              if (lane == 0 && reader == 0)
                fetch_tile(shared_address(outlier_rows) + kRowBytes, maps.rest, static_cast<int>(first_token),
                           from / kColumns * kRoundSlots, outliers_full);
              if (waits) wait_for_memory(n);
              if (lane == 0 && reader == 0)
                arrive_expecting(outliers_full, kTokens * kStep);
              else if (lane == 0)
                arrive(outliers_full);
            } else {
              gatherer.fetch_tokens(outlier_rows + kRowBytes, first_token, reader);
              publish_shared();
              if (waits) wait_for_memory(n);
              __syncwarp();
              if (lane == 0) arrive(outliers_full);
            }
            from += kColumns;
          } while (from < all);
        }
      }
    }
    __syncwarp();
    if (Work work; !kPair && p.splits > 1 && find_work<kPair>(p, p.rounds, &work)) cluster_meet();
    if (outliers && warp == kConsumers / 32 + kPickers + kReaders)
      p.marks->clear_other(blockIdx.x * 32 + lane, gridDim.x * 32);
  } else {
    take_registers<(kTokens > 128 ? 224 : 168)>();
    wait_for_results();
    const int group = warp / 4;
    char* const staging = space + S::kStagingAt + group * (2 * kStaging);
    float* const scales = reinterpret_cast<float*>(space + S::kScalesAt) + group * kTokens;
    int stage = 0;
    uint32_t parity = 0, outlier_parity = 0;
    const auto release = [&](int of) __attribute__((always_inline)) {
      if (kPair) {
        if (lane < 2) arrive_at(empty + of * 8, lane);
      } else if (lane == 0) {
        arrive(empty + of * 8);
      }
    };
    // 16-bit results that the copy engine writes do so while the next item is multiplied
    constexpr bool kMayFollow = std::is_same_v<T, half_t> || std::is_same_v<T, bf16_t>;
    using R = Results<std::conditional_t<kMayFollow, T, half_t>, kTokens>;
    constexpr int kPeeled = kFewestSteps;
    const bool follows = kMayFollow && p.engine;
    R results;
    bool pending = false;  // of an item whose later parts are not written yet
    int its_row = 0, its_token = 0;
    const auto write_part = [&](int part) __attribute__((always_inline)) {
      if constexpr (kMayFollow) results.go_on(part, maps.y, staging, group, its_row, its_token);
    };
    const auto write_rest = [&]() __attribute__((always_inline)) {
#pragma unroll
      for (int part = 0; part < R::kLater; ++part) write_part(part);
      pending = false;
    };
    Work work;
    for (int n = 0; find_work<kPair>(p, n, &work); ++n) {
      int32_t sums[kTokens / 2];
      const auto multiply_step = [&](bool first) __attribute__((always_inline)) {
        wait_barrier(full + stage * 8, parity);
        const uint32_t at = ring + stage * S::kStage;
        const uint64_t rows = describe_b(at + group * (64 * kStep), 0),
                       tokens = describe_b(at + kRowBytes, 0);
        begin_group();
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_group(sums, rows + ((j * 32) >> 4), tokens + ((j * 32) >> 4), !first || j > 0);
        commit_group();
      };
      Place place;
      int64_t first_row = 0, first_token = 0;
      float scale[(kTokens + kGroup - 1) / kGroup];  // of this thread's tokens
      Ending ending = {};
      const auto fetch_scales = [&]() __attribute__((always_inline)) {
        place = place_of(p, work.item);
        first_row = static_cast<int64_t>(place.rows * kBlocks + rank) * kRows + group * 64;
        first_token = static_cast<int64_t>(place.tokens) * kTokens;
        if constexpr (!kSums) {
#pragma unroll
          for (int i = 0; i < (kTokens + kGroup - 1) / kGroup; ++i)
            scale[i] = p.row_absmax[min(first_token + threadIdx.x % kGroup + i * kGroup, int64_t{p.m} - 1)];
        }
        if constexpr (kMayFollow) fetch_ending(&ending, p.out, p.scb, first_row);
      };
      const auto store_scales = [&]() __attribute__((always_inline)) {
        if constexpr (!kSums) {
          // fp32 results are written without the barriers behind which others have read the scales before
          if constexpr (std::is_same_v<T, float>) group_barrier(group);
          if (threadIdx.x % kGroup == 0) {
            wait_stores<0>();
            if (outliers) arrive(outliers_free);
          }
#pragma unroll
          for (int i = 0; i < (kTokens + kGroup - 1) / kGroup; ++i) {
            const int at = threadIdx.x % kGroup + i * kGroup;
            if (at < kTokens) scales[at] = scale[i] * kInt8Scale;
          }
          group_barrier(group);
        }
      };
      int before = 0;  // the step whose product runs
#pragma unroll
      for (int i = 0; i < kPeeled; ++i) {
        multiply_step(i == 0);
        if (i == 0) fetch_scales();
        if (i < R::kLater && pending) write_part(i);
        if (i == kPeeled - 1) store_scales();
        if (i > 0) {
          wait_group<1>();
          release(before);
        }
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      pending = false;
      for (int i = kPeeled; i < work.steps; ++i) {
        multiply_step(false);
        wait_group<1>();
        release(before);
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      wait_group<0>();
      hold_registers(sums);
      release(before);

      char* const free = space;  // the ring, when an item is divided
      if constexpr (kSums) {
        if (n != p.rounds) {
          write_plain<kTokens>(p.out, p.m, sums, first_row, first_token);
          continue;
        }
        cluster_meet();
        if (p.splits == 2)
          finish_divided<2, kTokens>(p, sums, free, sums_arrived, staging, group, first_row, first_token);
        else if (p.splits == 4)
          finish_divided<4, kTokens>(p, sums, free, sums_arrived, staging, group, first_row, first_token);
        else
          finish_divided<8, kTokens>(p, sums, free, sums_arrived, staging, group, first_row, first_token);
      } else {
        const bool divided = !kPair && n == p.rounds;
        const auto keep_results = [&](const auto& of) __attribute__((always_inline)) {
          its_row = static_cast<int>(first_row);
          its_token = static_cast<int>(first_token);
          if constexpr (kMayFollow) {
            if (p.out.bias)
              results.template begin<true>(of, ending, scales, maps.y, staging, group, its_row, its_token);
            else
              results.template begin<false>(of, ending, scales, maps.y, staging, group, its_row, its_token);
          }
          pending = R::kLater > 0;
        };
        int todo = 0;  // slots of a round, + kMore
        const auto wait_for_round = [&] {
          wait_barrier(outliers_full, outlier_parity);
          outlier_parity ^= 1;
          todo = *outlier_slots;
        };
        if (outliers) wait_for_round();
        if (follows && todo == 0 && !divided) {
          keep_results(sums);
          continue;
        }
        float acc[kTokens / 2];
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float2 pair = *reinterpret_cast<const float2*>(scales + j * 8 + lane % 4 * 2);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            acc[j * 4 + e] = static_cast<float>(sums[j * 4 + e]) * (e % 2 ? pair.y : pair.x);
        }
        hold_registers(acc);
        while (todo > 0) {
          using Half = typename OutlierType<T>::type;
          const int slots = todo % kMore;
          const bool more = todo >= kMore;
          const uint32_t at = shared_address(outlier_rows);
          uint32_t tokens = at + kRowBytes;
          if (kInRing) {
            wait_barrier(full + stage * 8, parity);
            tokens = ring + stage * S::kStage + kRowBytes;
          }
          const auto load = [&](uint32_t(&a)[4], int j) {
            const int r = group * 64 + warp % 4 * 16 + lane % 16;
            load_matrices(a, at + r * kStep + (((j * 2 + lane / 16) ^ (r & 7)) * 16));
          };
          if (slots > 16) {
            uint32_t a[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) load(a[j], j);
            begin_group();
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply_group(acc, a[j], describe_b(tokens, j * 16), true, Half{});
            commit_group();
            wait_group<0>();
            hold_registers(acc);
            hold_registers(a);
          } else {
            uint32_t a[4];
            load(a, 0);
            begin_group();
            multiply_group(acc, a, describe_b(tokens, 0), true, Half{});
            commit_group();
            wait_group<0>();
            hold_registers(acc);
          }
          if (kInRing) {
            release(stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
          }
          __syncwarp();
          if (!more) {
            consumer_barrier();  // both groups have left the memory of the end
            break;
          }
          if (lane == 0) arrive(outliers_empty);
          wait_for_round();
        }
        if (!divided) {
          if (follows)
            keep_results(acc);
          else {
            finish<kTokens>(p, acc, staging, group, first_row, first_token);
            results = {};
          }
          continue;
        }
        results = {};
        cluster_meet();  // nothing more comes, the rings of the cluster are free
        if (p.splits == 2)
          finish_divided<2, kTokens>(p, acc, free, sums_arrived, staging, group, first_row, first_token);
        else if (p.splits == 4)
          finish_divided<4, kTokens>(p, acc, free, sums_arrived, staging, group, first_row, first_token);
        else
          finish_divided<8, kTokens>(p, acc, free, sums_arrived, staging, group, first_row, first_token);
      }
    }
    if (pending) write_rest();
    if (threadIdx.x % kGroup == 0) wait_stores<0>();
  }
  if (kPair) {
    __syncwarp();
    cluster_barrier();  // nobody writes into, or arrives at, a block that has ended
  }
#endif
}

/// How many items fill rounds of whole ones, and how many are left to be divided.
struct Rounds {
  int64_t whole, divided, blocks;
};
Rounds rounds_of(const Launch& on, int64_t m, int64_t n, const Cut& cut) {
  const int64_t tiles = (m + cut.tokens - 1) / cut.tokens;
  if (cut.pair) {
    const int64_t items = (n + 2 * kRows - 1) / (2 * kRows) * tiles;
    return {items, 0, 2 * std::min<int64_t>(items, on.clusters_of(2))};
  }
  const int64_t items = (n + kRows - 1) / kRows * tiles;
  const int64_t clusters = on.clusters_of(cut.splits), blocks = clusters * cut.splits;
  const int64_t left = cut.splits > 1 ? items % blocks : 0;
  if (left == 0 || left > clusters) return {items, 0, std::min(items, blocks)};
  return {items - left, left, items > left ? blocks : left * cut.splits};
}

template <typename T, int kTokens, bool kPair>
cudaError_t launch(const Launch& on, const Product8<T>& product, Cut cut) {
  Gemm8<T> p = {};
  p.out = product.out;
  p.row_absmax = product.row_absmax;
  p.scb = product.scb;
  p.b = product.b;
  p.x = product.x;
  p.marks = product.marks;
  p.threshold = product.threshold;
  p.gathered = product.gathered;
  p.k = product.k;
  p.m = static_cast<int>(product.m);
  p.steps = static_cast<int>(steps_of(product.k));
  const int64_t n = product.out.n, rows = kPair ? 2 * kRows : kRows;
  p.row_groups = static_cast<int>((n + rows - 1) / rows);
  p.token_tiles = (p.m + kTokens - 1) / kTokens;
  p.band = std::min(p.token_tiles, cut.band);
  const Rounds rounds = rounds_of(on, product.m, n, cut);
  if (rounds.divided == 0) cut.splits = 1;
  // with fewer tokens to wait for all blocks pays where an item does not hide its own reading
  const bool one_item = rounds.divided == 0 && rounds.whole == rounds.blocks;
  const bool gathered = kTokens >= 128 || (product.m > 32 && one_item);
  p.rest = product.marks && gathered ? product.rest : nullptr;
  p.whole = static_cast<int>(rounds.whole);
  p.items = static_cast<int>(rounds.whole + rounds.divided);
  p.rounds = rounds.divided ? static_cast<int>(rounds.whole / rounds.blocks) : -1;
  p.splits = cut.splits;
  p.part = (p.steps + p.splits - 1) / p.splits;
  p.whole_lines = n % 8 == 0 && is_aligned(p.out.y, 16) && is_aligned(p.out.residual, 16);
  const int64_t x_bytes = product.m * product.k * static_cast<int64_t>(sizeof(T));
  p.once = x_bytes + product.m * (product.k + n * static_cast<int64_t>(sizeof(T))) <= kKeptBytes;
  p.engine = !std::is_same_v<T, float> && p.whole_lines && !p.out.residual;
  Maps maps = {};
  constexpr int kBoxTokens = kPair ? kTokens / 2 : kTokens;
  cudaError_t error = describe_tiles(&maps.a, DType::i8, product.a, product.m, product.k, kBoxTokens);
  if (error == cudaSuccess) error = describe_tiles(&maps.b, DType::i8, product.b, n, product.k, kRows);
  if constexpr (!std::is_same_v<T, int32_t>) {
    const DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
    if (p.engine && error == cudaSuccess)
      error = describe_tiles(&maps.y, dtype, p.out.y, product.m, n, std::min(kTokens, kStaged));
    if (p.rest && error == cudaSuccess) {
      const DType half = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
      error = describe_tiles(&maps.rest, half, product.rest, product.m, kRestRounds * kRoundSlots, kTokens);
    }
  }
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(rounds.blocks));
  shape.block = dim3(Warps<kTokens>::kThreads);
  shape.shared = Space<kTokens>::kBytes;
  shape.cluster = kPair ? 2 : static_cast<unsigned>(cut.splits);
  // blocks that wait for each other run at once, or, where that is refused (a partition of the device, or a
  // share of it), each reads x for itself; with 256 tokens they need not
  static std::atomic<bool> refused{false};
  shape.together = kTokens <= 128 && p.rest && p.rounds != 0;
  if (shape.together && !refused) {
    error = launch_kernel(on, shape, int8_gemm_kernel<T, kTokens, kPair>, p, maps);
    if (error == cudaSuccess) return error;
    cudaGetLastError();
    refused = true;
  }
  if (shape.together) p.rest = nullptr;
  shape.together = false;
  return launch_kernel(on, shape, int8_gemm_kernel<T, kTokens, kPair>, p, maps);
}

template <typename T>
cudaError_t launch(const Launch& on, const Product8<T>& product, const Cut& cut) {
  if (cut.pair) return launch<T, 256, true>(on, product, cut);
  switch (cut.tokens) {
    case 256:
      return launch<T, 256, false>(on, product, cut);
    case 128:
      return launch<T, 128, false>(on, product, cut);
    case 64:
      return launch<T, 64, false>(on, product, cut);
    default:
      return launch<T, 32, false>(on, product, cut);
  }
}

/// The cut that should end first. Costs are in steps of 256 tokens, as measured: smaller tiles read more,
/// which with many tokens costs clock rate; steps of 64 tokens wait for L2 where all multiprocessors divide
/// K; outlier columns of x take a while to be there; the exchange of sums takes longer behind whole items,
/// and less long with 32 tokens where at most half of the multiprocessors have blocks.
Cut cut_of(const Launch& on, int64_t m, int64_t n, int64_t k) {
  Cut best = {};
  double least = 0.0;
  const int64_t steps = steps_of(k);
  for (const int tokens : {256, 128, 64, 32}) {
    if (tokens > 32 && m <= tokens / 2) continue;
    const double step = tokens == 256   ? 1.0
                        : tokens == 128 ? (m > 512 ? 0.64 : 0.53)
                        : tokens == 64  ? (m > 256 ? 0.5 : 0.35)
                                        : (m > 96 ? 0.34 : 0.3);
    const double start = tokens == 256 && m <= 512 ? 4.1 : tokens == 32 && m > 96 ? 1.0 : 0.0;
    const double end = tokens == 256 ? 4.4 : tokens == 128 ? 3.2 : tokens / 128.0;
    for (const int splits : {1, 2, 4, 8}) {
      if (splits > 1 && steps < kFewestSteps * splits) continue;
      if (on.clusters_of(splits) == 0 || tokens / splits < 16 || (tokens == 256 && splits > 1)) continue;
      Cut cut = {tokens, splits, false, 4096 / tokens};
      const Rounds rounds = rounds_of(on, m, n, cut);
      if (splits > 1 && rounds.divided == 0) continue;
      cut.pair = tokens == 256 && rounds.whole > 2 * rounds.blocks && 2 * on.clusters_of(2) == rounds.blocks;
      const int64_t whole = (rounds.whole + rounds.blocks - 1) / rounds.blocks;
      double cost = start + whole * (steps * step + end);
      if (rounds.divided > 0) {
        const bool few = 2 * rounds.blocks <= on.multiprocessors;
        const bool crowd = tokens == 64 && m > 64 && 4 * rounds.blocks >= 3 * on.multiprocessors;
        const double exchange = tokens >= 128         ? (whole > 0 ? 5.0 : 3.0) + (m <= 512 ? 4.0 : 0.0)
                                : tokens == 32 && few ? 4.5
                                                      : 6.0;
        cost += (steps + splits - 1) / splits * step * (crowd ? 1.7 : 1.0) + end + exchange;
      }
      if (least != 0.0 && cost >= least) continue;
      least = cost;
      best = cut;
    }
  }
  return best;
}

}  // namespace

template <typename T>
cudaError_t int8_gemm_sm90(const Launch& on, const Product8<T>& product) {
  return launch(on, product, cut_of(on, product.m, product.out.n, product.k));
}

template cudaError_t int8_gemm_sm90(const Launch&, const Product8<half_t>&);
template cudaError_t int8_gemm_sm90(const Launch&, const Product8<bf16_t>&);
template cudaError_t int8_gemm_sm90(const Launch&, const Product8<float>&);
template cudaError_t int8_gemm_sm90(const Launch&, const Product8<int32_t>&);

}  // namespace halfbyte::cuda
