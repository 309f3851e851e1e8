// Attention of few query tokens over a long paged cache, 16-bit: flash-decoding on the tensor cores.
//
// A block takes one tile of query tokens (one token, or the few of one sequence), up to 16 rows = tokens x
// query heads of one key head, over one part of the tile's keys. Its warps take turns at steps of 16 keys:
//
//   cache [blocks, block_len, kv_heads, dim] -> 16-byte asynchronous copies -> the warp's own ring of steps
//     key row r, piece p of 16 bytes lies at r * row + (p ^ (r % 8)) * 16: no bank is met twice
//   S [16 rows, 16 keys] = q k^T (mma m16n8k16)  ->  running softmax  ->  O [16 rows, value_dim] += P v
//
// A warp waits for nothing but its own copies; at the end the block's warps are joined, and combine_kernel
// joins the parts. Keys and values are read once for all rows, so the time is that of the bytes whatever the
// number of heads that share a key head.
#include "attention.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRows = 16, kStep = 16;  // rows and keys of a product

template <int kDim>
struct DecodeShape {
  static constexpr int kWarps = 4;
  static constexpr int kPieces = kDim / 8, kRowBytes = kDim * 2;
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;
  static constexpr int kBlocks = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int kStepBytes = kStep * kRowBytes;                  // of keys; as many of values
  static constexpr int kRing = kWarps * kStages * 2 * kStepBytes;
  static constexpr int kSumStride = kDim + 8;  // floats between the rows of a warp's sums
  static constexpr int kSums = kWarps * kRows * kSumStride * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(DecodeShape<kDim>::kWarps * 32, DecodeShape<kDim>::kBlocks)
    decode_kernel(T* y, Partial partial, const T* q, const T* keys, const T* values, Ragged batch,
                  Tiles tiles, Attention p) {
  using Shape = DecodeShape<kDim>;
  constexpr int kWarps = Shape::kWarps, kStages = Shape::kStages, kPieces = Shape::kPieces;
  extern __shared__ __align__(128) char shared[];
  __shared__ float2 states[kWarps][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, pair = lane % 4;
  let_next_start();
  wait_for_results();

  const int share = p.heads / p.kv_heads, head_blocks = (share + kRows - 1) / kRows;
  const int kv_head = blockIdx.x % p.kv_heads, head_block = blockIdx.x / p.kv_heads % head_blocks;
  const int64_t tile = blockIdx.x / (p.kv_heads * head_blocks);
  const int first_head = kv_head * share + head_block * kRows;
  const int heads = min(kRows, share - head_block * kRows);

  // the tile: `tokens` of sequence `sequence` from `first` on, which has position `position`
  int64_t first = tile;
  int tokens = 1, sequence, position, length = 0;
  if (tiles.by_sequence) {
    const int64_t start = batch.query_starts[tile], next = batch.query_starts[tile + 1];
    length = batch.lengths[tile];
    if (tile == 0 && blockIdx.y == 0 && tiles.fill_rest) {
      // tokens behind the last sequence have no keys
      for (int64_t t = max(0, batch.query_starts[batch.sequences]); t < p.tokens; ++t) {
        T* to = y + (t * p.heads + first_head) * p.value_dim;
        for (int i = threadIdx.x; i < heads * p.value_dim; i += kWarps * 32) to[i] = from_float<T>(0.0f);
      }
    }
    if (start < 0 || next > p.tokens || next <= start || next - start > tiles.tokens) return;
    first = start;
    tokens = static_cast<int>(next - start);
    sequence = static_cast<int>(tile);
    position = length - tokens;
  } else {
    // mostly every sequence has one token: what that needs is asked for at once
    const bool likely = tile < batch.sequences;
    const int start = likely ? batch.query_starts[tile] : -1,
              next = likely ? batch.query_starts[tile + 1] : -1;
    length = likely ? batch.lengths[tile] : 0;
    sequence = static_cast<int>(tile);
    position = length - 1;
    if (start != tile || next != tile + 1) {
      const Ragged::Place place = batch.locate(tile);
      sequence = place.sequence;
      position = place.position;
      length = sequence >= 0 ? batch.lengths[sequence] : 0;
    }
  }
  const int rows = tokens * heads;
  Seen all{0, 0};
  if (sequence >= 0) {
    all = seen_from(p, batch, position + tokens - 1, length);
    all.begin = min(seen_from(p, batch, max(position, 0), length).begin, all.end);
  }
  // the part of this block, in steps; a part has a step for each warp at least
  const int parts = static_cast<int>(gridDim.y),
            steps = static_cast<int>((all.end - all.begin + kStep - 1) / kStep);
  const int per_part = max(kWarps, (steps + parts - 1) / parts);
  const int first_step = min(steps, static_cast<int>(blockIdx.y) * per_part);
  const int last_step = min(steps, first_step + per_part);
  const int64_t first_key = all.begin + static_cast<int64_t>(first_step + warp) * kStep;  // of this warp
  const int count = first_step + warp < last_step ? (last_step - first_step - warp + kWarps - 1) / kWarps : 0;

  // The queries as fragments; rows behind the last are copies of it.
  uint32_t query[kDim / 16][4];
  const int row_token[2] = {min(row, rows - 1) / heads, min(row + 8, rows - 1) / heads};
  const int row_head[2] = {first_head + min(row, rows - 1) % heads,
                           first_head + min(row + 8, rows - 1) % heads};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* from = q + (first + row_token[half]) * p.q_stride + static_cast<int64_t>(row_head[half]) * p.dim;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = k * 16 + j * 8 + pair * 2;
        query[k][half + j * 2] = at < p.dim ? *reinterpret_cast<const uint32_t*>(from + at) : 0u;
      }
    }
  }

  // The ring. Lanes 0..15 look up where a step's keys lie, one step ahead of the copies.
  const uint32_t ring = shared_address(shared) + warp * (kStages * 2 * Shape::kStepBytes);
  const uint32_t key_stride = p.kv_heads * p.dim, value_stride = p.kv_heads * p.value_dim;
  const T* const key_rows = keys + kv_head * p.dim;
  const T* const value_rows = values + kv_head * p.value_dim;
  const auto look_up = [&](int step) {
    const int64_t key = first_key + static_cast<int64_t>(step) * (kWarps * kStep) + lane;
    return step < count && lane < kStep && key < all.end
               ? static_cast<int>(batch.slot(sequence, static_cast<int>(key), p.block_len, p.blocks))
               : -1;
  };
  uint64_t valid = 0;  // 16 bits a step in the ring: the keys that are there
  int slot = look_up(0);
  const auto fetch = [&](int step) {
    valid = valid << 16 | (__ballot_sync(0xffffffffu, slot >= 0) & 0xffffu);
    const uint32_t to = ring + step % kStages * (2 * Shape::kStepBytes);
    constexpr int kAtOnce = 32 / kPieces > 0 ? 32 / kPieces : 1;
    const int piece = lane % kPieces;
#pragma unroll
    for (int i = 0; i < kStep / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kPieces;
      const int from = __shfl_sync(0xffffffffu, slot, key);
      const uint32_t at = to + key * Shape::kRowBytes + ((piece ^ (key % 8)) * 16);
      const uint64_t line = max(from, 0);
      copy_async(at, key_rows + line * key_stride + piece * 8, from >= 0 && piece * 8 < p.dim ? 16 : 0);
      copy_async(at + Shape::kStepBytes, value_rows + line * value_stride + piece * 8,
                 from >= 0 && piece * 8 < p.value_dim ? 16 : 0);
    }
    slot = look_up(step + 1);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count)
      fetch(s);
    else
      valid <<= 16;
    commit_copies();
  }

  float acc[kDim / 8][4] = {};
  float most[2] = {-INFINITY, -INFINITY}, weight[2] = {};
  const bool plain = p.plain();
  const float factor = plain ? p.scale * kLog2E : 1.0f;
  // rows of several tokens do not see the same keys
  const bool differ = tokens > 1;
  for (int step = 0; step < count; ++step) {
    __syncwarp();  // all lanes have read what is overwritten now
    if (step + kStages - 1 < count)
      fetch(step + kStages - 1);
    else
      valid <<= 16;
    commit_copies();
    wait_copies<kStages - 1>();
    __syncwarp();
    const uint32_t k_at = ring + step % kStages * (2 * Shape::kStepBytes), v_at = k_at + Shape::kStepBytes;
    float score[kStep / 2] = {};
    {
      const int key = lane % 8 + lane / 16 * 8, piece = lane / 8 % 2;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t b[4];
        load_matrices(b, k_at + key * Shape::kRowBytes + (((k * 2 + piece) ^ (key % 8)) * 16));
        multiply(reinterpret_cast<float(&)[4]>(score[0]), query[k], b[0], b[1], T{});
        multiply(reinterpret_cast<float(&)[4]>(score[4]), query[k], b[2], b[3], T{});
      }
    }
    const int64_t key = first_key + static_cast<int64_t>(step) * (kWarps * kStep);
    const uint32_t there = static_cast<uint32_t>(valid >> (16 * (kStages - 1))) & 0xffffu;
    if (!plain || there != 0xffffu || differ) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = position + row_token[half];
        const Seen seen = differ ? seen_from(p, batch, own, length) : all;
        const float slope = p.alibi ? p.alibi[row_head[half]] : 0.0f;
        const int64_t first_column = key + pair * 2;
        const Visible visible{
            static_cast<int>(max(int64_t{-1}, min(seen.begin - first_column, int64_t{kStep}))),
            static_cast<int>(max(int64_t{-1}, min(seen.end - first_column, int64_t{kStep})))};
        mask_row<kStep>(score, half, p, plain, visible, &there, slope,
                        static_cast<float>(first_column - own));
      }
    }
    float keep[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keep[half] = soften_row<kStep>(score, half, factor, most[half], weight[half]);
    uint32_t part[4];
    fragment_of<T, kStep>(part, score, 0);
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] *= keep[e / 2];
      }
    }
    {
      const int from = lane % 16, piece = lane / 16;
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_transposed(b, v_at + from * Shape::kRowBytes + (((n * 2 + piece) ^ (from % 8)) * 16));
        multiply(acc[n * 2], part, b[0], b[1], T{});
        multiply(acc[n * 2 + 1], part, b[2], b[3], T{});
      }
    }
  }

  // join the warps: what each keeps of its sums first, then the sums through shared memory
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weight[half] += __shfl_xor_sync(0xffffffffu, weight[half], 1);
    weight[half] += __shfl_xor_sync(0xffffffffu, weight[half], 2);
    if (pair == 0) states[warp][row + half * 8] = make_float2(most[half], weight[half]);
  }
  wait_copies<0>();
  __syncthreads();  // the ring's memory is free
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, states[w][row + half * 8].x);
    const float keep =
        most[half] == -INFINITY ? (weight[half] == 0.0f ? 0.0f : weight[half]) : rough_exp2(most[half] - top);
    float* to = sums + (warp * kRows + row + half * 8) * Shape::kSumStride + pair * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) =
          make_float2(acc[n][half * 2] * keep, acc[n][half * 2 + 1] * keep);
    }
  }
  __syncthreads();
  for (int r = warp; r < rows; r += kWarps) {
    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, states[w][r].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 s = states[w][r];
      if (s.y != 0.0f) total += s.x == -INFINITY ? s.y : s.y * rough_exp2(s.x - top);
    }
    const int64_t token = first + r / heads;
    const int head = first_head + r % heads;
    const float by = partial.splits > 1 ? 1.0f : reciprocal_weight(p, head, top, total);
    const int64_t at =
        ((tiles.by_sequence ? tile * tiles.tokens + r / heads : token) * p.heads + head) * partial.splits +
        blockIdx.y;
    if (partial.splits > 1 && lane == 0) partial.state[at] = make_float2(top, total);
    if (partial.splits > 1 && total == 0.0f) continue;
    for (int d = lane; d < p.value_dim; d += 32) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums[(w * kRows + r) * Shape::kSumStride + d];
      if (partial.splits > 1)
        partial.sums[at * p.value_dim + d] = sum;
      else
        y[(token * p.heads + head) * p.value_dim + d] = from_float<T>(total == 0.0f ? 0.0f : sum * by);
    }
  }
}

template <typename T>
cudaError_t launch(const Launch& on, const AttentionLaunch& a) {
  const Attention& p = a.problem;
  const int share = p.heads / p.kv_heads;
  return with_width(a.problem, [&](auto width) {
    using Shape = DecodeShape<decltype(width)::value>;
    return launch_tiles<T>(on, a, decode_kernel<T, decltype(width)::value>,
                           a.tiles.count * p.kv_heads * ((share + kRows - 1) / kRows), Shape::kWarps * 32,
                           Shape::kShared);
  });
}

}  // namespace

cudaError_t launch_decode(const Launch& on, const AttentionLaunch& a, half_t) {
  return launch<half_t>(on, a);
}
cudaError_t launch_decode(const Launch& on, const AttentionLaunch& a, bf16_t) {
  return launch<bf16_t>(on, a);
}

}  // namespace halfbyte::cuda
