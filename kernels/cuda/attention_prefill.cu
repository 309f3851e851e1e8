// Attention of many query tokens over the paged cache, 16-bit, on the tensor cores by mma.sync.
//
// A block takes one tile of query tokens of one sequence with all the query heads of one key head, 128 rows =
// tokens x heads, over its keys (or one part of them where there are few tiles), kKeys at a time:
//
//   q -> shared memory, once;  keys, values -> two stages each, 16-byte asynchronous copies of the next tile
//     while this one is multiplied; where its keys lie was looked up a tile before that
//     row r, piece p of 16 bytes lies at r * row + (p ^ (r % 8)) * 16: no bank is met twice
//   S [128, kKeys] = q k^T  ->  masks, running softmax in registers  ->  O [128, value_dim] += P v
//
// A warp owns its rows from the first product to the last. Tiles are masked only where a row's keys begin or
// end in them; the longest tiles run first. A value that is not finite reaches every row of its tile, seen or
// not.
#include "attention.cuh"

namespace halfbyte::cuda {
namespace {

template <int kDim>
struct PrefillShape {
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kWarps = kDim <= 128 ? 4 : 8;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kBlocks = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int kRows = kRowTiles * 16 * kWarps, kThreads = kWarps * 32;
  static constexpr int kPieces = kDim / 8, kRowBytes = kDim * 2;
  static constexpr int kTileBytes = kKeys * kRowBytes;  // of keys; as many of values
  static constexpr int kShared = kRows * kRowBytes + 4 * kTileBytes;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(PrefillShape<kDim>::kThreads, PrefillShape<kDim>::kBlocks)
    prefill_kernel(T* y, Partial partial, const T* q, const T* keys, const T* values, Ragged batch,
                   Tiles tiles, Attention p) {
  using Shape = PrefillShape<kDim>;
  constexpr int kRowTiles = Shape::kRowTiles, kKeys = Shape::kKeys, kPieces = Shape::kPieces;
  constexpr int kThreads = Shape::kThreads, kRowBytes = Shape::kRowBytes;
  extern __shared__ __align__(128) char shared[];
  __shared__ int slots[4][kKeys];
  __shared__ uint32_t there[4][kKeys / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = lane % 4;
  let_next_start();
  wait_for_results();

  const int share = p.heads / p.kv_heads, kv_head = blockIdx.x % p.kv_heads, first_head = kv_head * share;
  PrefillTile tile;
  if (!find_tile(tile, y, batch, tiles, p)) return;
  const int64_t first = tile.first;
  const int sequence = tile.sequence, length = tile.length, position = tile.position;
  const int rows = tile.tokens * share;

  // The keys that any row sees, and this block's part of them.
  Seen all = seen_from(p, batch, position + tile.tokens - 1, length);
  all.begin = min(seen_from(p, batch, max(position, 0), length).begin, all.end);
  const int parts = static_cast<int>(gridDim.y),
            steps = static_cast<int>((all.end - all.begin + kKeys - 1) / kKeys);
  const int per_part = (steps + parts - 1) / parts,
            first_step = min(steps, static_cast<int>(blockIdx.y) * per_part);
  const int count = min(per_part, steps - first_step);
  const int64_t first_key = all.begin + static_cast<int64_t>(first_step) * kKeys;

  const uint32_t q_at = shared_address(shared), kv_at = q_at + Shape::kRows * kRowBytes;
  const uint32_t key_stride = p.kv_heads * p.dim, value_stride = p.kv_heads * p.value_dim;
  const int piece = threadIdx.x % kPieces;
  constexpr int kAtOnce = kThreads / kPieces;  // rows that the block copies at once
  const bool in_key = piece * 8 < p.dim, in_value = piece * 8 < p.value_dim;
  const T* const key_rows = keys + kv_head * p.dim + piece * 8;
  const T* const value_rows = values + kv_head * p.value_dim + piece * 8;
  const auto look_up = [&](int step) {
    const int64_t key = first_key + static_cast<int64_t>(step) * kKeys + threadIdx.x;
    return step < count && key < all.end
               ? static_cast<int>(batch.slot(sequence, static_cast<int>(key), p.block_len, p.blocks))
               : -1;
  };
  const auto keep_slots = [&](int step, int slot) {  // of whole warps
    slots[step % 4][threadIdx.x] = slot;
    const uint32_t found = __ballot_sync(0xffffffffu, slot >= 0);
    if (lane == 0) there[step % 4][warp] = found;
  };
  const auto fetch = [&](int step) {
    const uint32_t to = kv_at + step % 2 * (2 * Shape::kTileBytes);
#pragma unroll
    for (int i = 0; i < kKeys / kAtOnce; ++i) {
      const int key = i * kAtOnce + threadIdx.x / kPieces, from = slots[step % 4][key];
      const uint32_t at = to + key * kRowBytes + ((piece ^ (key % 8)) * 16);
      const uint64_t line = max(from, 0);
      copy_async(at, key_rows + line * key_stride, from >= 0 && in_key ? 16 : 0);
      copy_async(at + Shape::kTileBytes, value_rows + line * value_stride, from >= 0 && in_value ? 16 : 0);
    }
  };
  if (threadIdx.x < kKeys) {
    keep_slots(0, look_up(0));
    keep_slots(1, look_up(1));
  }
#pragma unroll 4
  for (int i = 0; i < Shape::kRows / kAtOnce; ++i) {
    const int row = i * kAtOnce + threadIdx.x / kPieces, token = row / share, head = row - token * share;
    const bool inside = row < rows && in_key;
    const T* from = q + (first + token) * p.q_stride + (first_head + head) * p.dim + piece * 8;
    copy_async(q_at + row * kRowBytes + ((piece ^ (row % 8)) * 16), inside ? from : q, inside ? 16 : 0);
  }
  __syncthreads();
  if (count > 0) fetch(0);
  commit_copies();

  // Which keys the rows of this thread see, and those that all rows of its warp see, from first_key on.
  const int first_row = warp * kRowTiles * 16;
  const auto own_position = [&](int row) { return position + min(row, rows - 1) / share; };
  const auto from_first = [&](int64_t key) {
    return static_cast<int>(max(int64_t{-1}, min(key - first_key, int64_t{1} << 30)));
  };
  const Seen seen_first = seen_from(p, batch, own_position(first_row), length);
  const Seen seen_last = seen_from(p, batch, own_position(first_row + kRowTiles * 16 - 1), length);
  const int some_begin = from_first(seen_first.begin);
  const int some_end = first_row < rows ? from_first(seen_last.end) : -1;
  const int all_begin = from_first(seen_last.begin), all_end = from_first(seen_first.end);

  float acc[kRowTiles][kDim / 8][4] = {};
  float most[kRowTiles][2], weight[kRowTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) most[i][0] = most[i][1] = -INFINITY;
  const bool plain = p.plain();
  const float factor = plain ? p.scale * kLog2E : 1.0f;

  for (int step = 0; step < count; ++step) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (step + 1 < count) fetch(step + 1);
    commit_copies();
    int slot = -1;
    if (threadIdx.x < kKeys) slot = look_up(step + 2);

    const int key = step * kKeys;
    if (key < some_end && key + kKeys > some_begin) {
      const uint32_t k_at = kv_at + step % 2 * (2 * Shape::kTileBytes), v_at = k_at + Shape::kTileBytes;
      float score[kRowTiles][kKeys / 2] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const int row = first_row + i * 16 + lane % 16;
          load_matrices(a[i], q_at + row * kRowBytes + (((k * 2 + lane / 16) ^ (row % 8)) * 16));
        }
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          const int row = n * 16 + lane % 8 + lane / 16 * 8;
          uint32_t b[4];
          load_matrices(b, k_at + row * kRowBytes + (((k * 2 + lane / 8 % 2) ^ (row % 8)) * 16));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply(reinterpret_cast<float(&)[4]>(score[i][n * 8]), a[i], b[0], b[1], T{});
            multiply(reinterpret_cast<float(&)[4]>(score[i][n * 8 + 4]), a[i], b[2], b[3], T{});
          }
        }
      }

      bool whole = key >= all_begin && key + kKeys <= all_end;
#pragma unroll
      for (int i = 0; i < kKeys / 32; ++i) whole = whole && there[step % 4][i] == 0xffffffffu;
      if (!plain || !whole) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = min(first_row + i * 16 + lane / 4 + half * 8, rows - 1), own = own_position(row);
            const Seen seen = seen_from(p, batch, own, length);
            const int column = key + pair * 2;
            const Visible visible{from_first(seen.begin) - column, from_first(seen.end) - column};
            const float slope = p.alibi ? p.alibi[first_head + row % share] : 0.0f;
            mask_row<kKeys>(score[i], half, p, plain, visible, there[step % 4], slope,
                            static_cast<float>(first_key + column - own));
          }
        }
      }

      float keep[kRowTiles][2];
      bool moved = false;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          keep[i][half] = soften_row<kKeys>(score[i], half, factor, most[i][half], weight[i][half]);
          moved = moved || keep[i][half] != 1.0f;
        }
      }
      if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][n][e] *= keep[i][e / 2];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        const int row = k * 16 + lane % 16;
        uint32_t part[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) fragment_of<T, kKeys>(part[i], score[i], k * 16);
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
          uint32_t b[4];
          load_transposed(b, v_at + row * kRowBytes + (((n * 2 + lane / 16) ^ (row % 8)) * 16));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply(acc[i][n * 2], part[i], b[0], b[1], T{});
            multiply(acc[i][n * 2 + 1], part[i], b[2], b[3], T{});
          }
        }
      }
    }
    if (threadIdx.x < kKeys) keep_slots(step + 2, slot);
  }

  wait_copies<0>();
  __syncthreads();  // the queries' place becomes the results', also where there was no key to wait for
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& total = weight[i][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int row = first_row + i * 16 + lane / 4 + half * 8;
      const int token = row / share, head = first_head + row - token * share;
      if (partial.splits > 1) {
        if (row >= rows) continue;
        const int64_t at = ((first + token) * p.heads + head) * partial.splits + blockIdx.y;
        if (pair == 0) partial.state[at] = make_float2(most[i][half], total);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const int d = n * 8 + pair * 2;
          if (d < p.value_dim && total != 0.0f) {
            *reinterpret_cast<float2*>(partial.sums + at * p.value_dim + d) =
                make_float2(acc[i][n][half * 2], acc[i][n][half * 2 + 1]);
          }
        }
      } else {
        // through the queries' place, whose rows nobody else reads, so that they are written in whole pieces
        const float by = row < rows ? reciprocal_weight(p, head, most[i][half], total) : 0.0f;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const uint32_t both =
              by == 0.0f ? 0u : pair_of<T>(acc[i][n][half * 2] * by, acc[i][n][half * 2 + 1] * by);
          *reinterpret_cast<uint32_t*>(shared + row * kRowBytes + ((n ^ (row % 8)) * 16) + pair * 4) = both;
        }
      }
    }
  }
  if (partial.splits > 1) return;
  __syncwarp();
  constexpr int kLines = 32 / kPieces;
#pragma unroll
  for (int i = 0; i < kRowTiles * 16 / kLines; ++i) {
    const int row = first_row + i * kLines + lane / kPieces, own_piece = lane % kPieces;
    if (row >= rows || own_piece * 8 >= p.value_dim) continue;
    const int token = row / share, head = first_head + row - token * share;
    *reinterpret_cast<uint4*>(y + ((first + token) * p.heads + head) * p.value_dim + own_piece * 8) =
        *reinterpret_cast<const uint4*>(shared + row * kRowBytes + ((own_piece ^ (row % 8)) * 16));
  }
}

template <typename T>
cudaError_t launch(const Launch& on, const AttentionLaunch& a) {
  return with_width(a.problem, [&](auto width) {
    using Shape = PrefillShape<decltype(width)::value>;
    return launch_tiles<T>(on, a, prefill_kernel<T, decltype(width)::value>,
                           a.tiles.count * a.problem.kv_heads, Shape::kThreads, Shape::kShared);
  });
}

}  // namespace

cudaError_t launch_prefill(const Launch& on, const AttentionLaunch& a, half_t) {
  return launch<half_t>(on, a);
}
cudaError_t launch_prefill(const Launch& on, const AttentionLaunch& a, bf16_t) {
  return launch<bf16_t>(on, a);
}

}  // namespace halfbyte::cuda
