// Attention of many query tokens over the paged cache, 16-bit, on the tensor cores of sm_90a by wgmma.
//
// The same tiles as attention_prefill.cu: 128 rows = query tokens of one sequence x heads of one key head. A
// block has two consuming warpgroups of 64 rows each and a producing one:
//
//   producer   looks up where the keys of a tile lie and copies them and their values, 16 bytes at a time,
//              into two stages each, with the 128-byte swizzle that the products read (panels of 64 columns)
//   consumer   S = q k^T of the next tile, both from shared memory, is under way while the weights of this
//              one are multiplied with its values: O += P v, P from registers, v's rows being k
//
// The softmax of one tile and the products of another so overlap within a warpgroup, and the two warpgroups
// fill each other's gaps. The longest tiles run first. Fast where dim and value_dim are near 64, 128 or 256.
#include "attention.cuh"
#include "output_sm90.cuh"
#include "wgmma_attention_sm90.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 128, kThreads = 384, kStages = 2;

template <int kDim>
struct PrefillShape {
  static constexpr int kKeys = kDim <= 128 ? 128 : 64;
  static constexpr int kQueryBytes = kRows * kDim * 2, kTileBytes = kKeys * kDim * 2;
  static constexpr int kBarriersAt = kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr int kShared = kBarriersAt + 4 * kStages * 8;
};

#if HALFBYTE_WGMMA

constexpr int kConsumers = 256;  // threads

/// The place of piece `piece` of row `row` in panels of `rows` rows.
template <int rows>
__device__ __forceinline__ uint32_t place_of(int row, int piece) {
  return piece / 8 * (rows * 128) + row * 128 + ((piece % 8 ^ row % 8) * 16);
}
/// Counts on the barrier once this thread's copies so far are there.
__device__ __forceinline__ void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

#endif

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_kernel(T* y, Partial partial, const T* q, const T* keys, const T* values, Ragged batch, Tiles tiles,
                 Attention p) {
#if HALFBYTE_WGMMA
  using Shape = PrefillShape<kDim>;
  constexpr int kKeys = Shape::kKeys, kPieces = kDim / 8, kTileBytes = Shape::kTileBytes;
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint32_t there[kStages][kKeys / 32];
  const int lane = threadIdx.x % 32, pair = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  let_next_start();
  wait_for_results();

  const int share = p.heads / p.kv_heads, kv_head = blockIdx.x % p.kv_heads, first_head = kv_head * share;
  PrefillTile tile;
  if (!find_tile(tile, y, batch, tiles, p)) return;
  const int64_t first = tile.first;
  const int length = tile.length, position = tile.position, rows = tile.tokens * share;

  // The keys that any row sees, and this block's part of them.
  Seen all = seen_from(p, batch, position + tile.tokens - 1, length);
  all.begin = min(seen_from(p, batch, max(position, 0), length).begin, all.end);
  const int parts = static_cast<int>(gridDim.y),
            steps = static_cast<int>((all.end - all.begin + kKeys - 1) / kKeys);
  const int per_part = (steps + parts - 1) / parts,
            first_step = min(steps, static_cast<int>(blockIdx.y) * per_part);
  const int count = min(per_part, steps - first_step);
  const int64_t first_key = all.begin + static_cast<int64_t>(first_step) * kKeys;

  const uint32_t q_at = shared_address(shared), k_at = q_at + Shape::kQueryBytes,
                 v_at = k_at + kStages * kTileBytes;
  const uint32_t full_k = q_at + Shape::kBarriersAt, full_v = full_k + kStages * 8,
                 empty_k = full_v + kStages * 8, empty_v = empty_k + kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full_k + i * 8, kGroup + kGroup / 32);  // copies of every thread, `there` of every warp
      init_barrier(full_v + i * 8, kGroup);
      init_barrier(empty_k + i * 8, kConsumers / 32);
      init_barrier(empty_v + i * 8, kConsumers / 32);
    }
    publish_barriers();
  }
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, token = row / share;
    const bool inside = row < rows && piece * 8 < p.dim;
    const T* from = q + (first + token) * p.q_stride + (first_head + row - token * share) * p.dim + piece * 8;
    copy_async(q_at + place_of<kRows>(row, piece), inside ? from : q, inside ? 16 : 0);
  }
  commit_copies();
  wait_copies<0>();
  publish_shared();
  __syncthreads();

  if (warp >= kConsumers / 32) {
    give_registers<40>();
    // Each warp looks up and copies kKeys / 4 keys of a tile, kLines at a time.
    constexpr int kOwn = kKeys / 4, kLines = 32 / kPieces > 0 ? 32 / kPieces : 1;
    const int first_own = (warp - kConsumers / 32) * kOwn;
    const int piece = lane % kPieces, line = lane / kPieces;
    const bool in_key = piece * 8 < p.dim, in_value = piece * 8 < p.value_dim;
    const uint32_t key_stride = p.kv_heads * p.dim, value_stride = p.kv_heads * p.value_dim;
    const T* const key_rows = keys + kv_head * p.dim + piece * 8;
    const T* const value_rows = values + kv_head * p.value_dim + piece * 8;
    const auto look_up = [&](int step) {
      const int64_t key = first_key + static_cast<int64_t>(step) * kKeys + first_own + lane;
      return step < count && lane < kOwn && key < all.end
                 ? static_cast<int>(batch.slot(tile.sequence, static_cast<int>(key), p.block_len, p.blocks))
                 : -1;
    };
    int next = look_up(0);
    for (int step = 0; step < count; ++step) {
      const int stage = step % kStages;
      const uint32_t free = (step / kStages & 1) ^ 1;
      const int slot = next;
      next = look_up(step + 1);
      const auto copy = [&](uint32_t to, const T* from, uint32_t stride, bool inside) {
#pragma unroll 8
        for (int i = 0; i < kOwn / kLines; ++i) {
          const int key = i * kLines + line, at = __shfl_sync(0xffffffffu, slot, key);
          copy_async(to + place_of<kKeys>(first_own + key, piece),
                     from + static_cast<uint64_t>(max(at, 0)) * stride, at >= 0 && inside ? 16 : 0);
        }
      };
      wait_barrier(empty_k + stage * 8, free);
      const uint32_t found = __ballot_sync(0xffffffffu, slot >= 0);
      if constexpr (kOwn == 32) {
        if (lane == 0) there[stage][first_own / 32] = found;
      } else {  // two warps a word
        if (lane == 0)
          reinterpret_cast<uint16_t*>(there[stage])[first_own / 16] = static_cast<uint16_t>(found);
      }
      copy(k_at + stage * kTileBytes, key_rows, key_stride, in_key);
      if (lane == 0) arrive(full_k + stage * 8);
      arrive_when_copied(full_k + stage * 8);
      wait_barrier(empty_v + stage * 8, free);
      copy(v_at + stage * kTileBytes, value_rows, value_stride, in_value);
      arrive_when_copied(full_v + stage * 8);
    }
    wait_copies<0>();
    return;
  }
  take_registers<232>();

  const int group = warp / 4, first_row = warp * 16;
  const auto own_position = [&](int row) { return position + min(row, rows - 1) / share; };
  const auto from_first = [&](int64_t key) {
    return static_cast<int>(max(int64_t{-1}, min(key - first_key, int64_t{1} << 30)));
  };
  // which keys all rows of this warp see, from first_key on
  const int all_begin = from_first(seen_from(p, batch, own_position(first_row + 15), length).begin);
  const int all_end = from_first(seen_from(p, batch, own_position(first_row), length).end);
  const bool plain = p.plain();
  const float factor = plain ? p.scale * kLog2E : 1.0f;
  const uint32_t own_q = q_at + group * (64 * 128);

  float acc[kDim / 2] = {}, score[kKeys / 2];
  float most[2] = {-INFINITY, -INFINITY}, weight[2] = {}, keep[2];
  uint32_t part[kKeys / 16][4];

  const auto begin_scores = [&](int step) {
    const int stage = step % kStages;
    wait_barrier(full_k + stage * 8, step / kStages & 1);
    publish_shared();
    begin_group();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply_shared(score, describe_b(own_q + k / 4 * (kRows * 128), k % 4 * 16),
                      describe_b(k_at + stage * kTileBytes + k / 4 * (kKeys * 128), k % 4 * 16), k > 0, T{});
    }
    commit_group();
  };
  const auto begin_values = [&](int step) {
    const int stage = step % kStages;
    wait_barrier(full_v + stage * 8, step / kStages & 1);
    publish_shared();
    begin_group();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      multiply_rows_of_k(acc, part[k],
                         describe_rows_of_k(v_at + stage * kTileBytes + k * (16 * 128), kKeys * 128), T{});
    }
    commit_group();
  };
  const auto soften = [&](int step) {
    const int key = step * kKeys, stage = step % kStages;
    bool whole = key >= all_begin && key + kKeys <= all_end;
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) whole = whole && there[stage][i] == 0xffffffffu;
    if (!plain || !whole) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + lane / 4 + half * 8, rows - 1), own = own_position(row);
        const Seen seen = seen_from(p, batch, own, length);
        const int column = key + pair * 2;
        const Visible visible{from_first(seen.begin) - column, from_first(seen.end) - column};
        const float slope = p.alibi ? p.alibi[first_head + row % share] : 0.0f;
        mask_row<kKeys>(score, half, p, plain, visible, there[stage], slope,
                        static_cast<float>(first_key + column - own));
      }
    }
    __syncwarp();
    if (lane == 0) arrive(empty_k + stage * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keep[half] = soften_row<kKeys>(score, half, factor, most[half], weight[half]);
  };
  const auto weights_to_fragments = [&]() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) fragment_of<T, kKeys>(part[k], score, k * 16);
  };

  if (count > 0) {
    begin_scores(0);
    wait_group<0>();
    hold_registers(score);
    soften(0);
    weights_to_fragments();
    for (int step = 1; step < count; ++step) {
      begin_scores(step);
      begin_values(step - 1);
      wait_group<1>();
      hold_registers(score);
      soften(step);
      wait_group<0>();
      hold_registers(acc);
      hold_fragments(part);
      if (lane == 0) arrive(empty_v + (step - 1) % kStages * 8);
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) acc[e] *= keep[e / 2 % 2];
      weights_to_fragments();
    }
    begin_values(count - 1);
    wait_group<0>();
    hold_registers(acc);
    hold_fragments(part);
  }

  float by[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& total = weight[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = first_row + lane / 4 + half * 8;
    const int token = row / share, head = first_head + row - token * share;
    by[half] = row < rows ? reciprocal_weight(p, head, most[half], total) : 0.0f;
    if (partial.splits > 1 && row < rows) {
      const int64_t at = ((first + token) * p.heads + head) * partial.splits + blockIdx.y;
      if (pair == 0) partial.state[at] = make_float2(most[half], total);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = n * 8 + pair * 2;
        if (d < p.value_dim && total != 0.0f) {
          *reinterpret_cast<float2*>(partial.sums + at * p.value_dim + d) =
              make_float2(acc[n * 4 + half * 2], acc[n * 4 + half * 2 + 1]);
        }
      }
    }
  }
  if (partial.splits > 1) return;
  // through the queries' place, so that rows are written in whole pieces
  group_barrier(group);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(shared + place_of<kRows>(first_row + lane / 4 + half * 8, n) + pair * 4) =
          by[half] == 0.0f
              ? 0u
              : pair_of<T>(acc[n * 4 + half * 2] * by[half], acc[n * 4 + half * 2 + 1] * by[half]);
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int row = first_row + i / kPieces, piece = i % kPieces;
    if (row >= rows || piece * 8 >= p.value_dim) continue;
    const int token = row / share, head = first_head + row - token * share;
    *reinterpret_cast<uint4*>(y + ((first + token) * p.heads + head) * p.value_dim + piece * 8) =
        *reinterpret_cast<const uint4*>(shared + place_of<kRows>(row, piece));
  }
#endif
}

template <typename T>
cudaError_t launch(const Launch& on, const AttentionLaunch& a) {
  return with_width(a.problem, [&](auto width) {
    using Shape = PrefillShape<decltype(width)::value>;
    return launch_tiles<T>(on, a, wgmma_kernel<T, decltype(width)::value>, a.tiles.count * a.problem.kv_heads,
                           kThreads, Shape::kShared);
  });
}

}  // namespace

cudaError_t launch_prefill_sm90(const Launch& on, const AttentionLaunch& a, half_t) {
  return launch<half_t>(on, a);
}
cudaError_t launch_prefill_sm90(const Launch& on, const AttentionLaunch& a, bf16_t) {
  return launch<bf16_t>(on, a);
}

}  // namespace halfbyte::cuda
