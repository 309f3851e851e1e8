// What the attention kernels share: the problem, which query tokens a block takes, and what a block that has
// seen only a part of the keys leaves for combine_kernel (attention.cu).
//
// Scores are kept in units of log2, so that a weight is one ex2: score * factor, where factor is
// scale * log2(e), or 1 once softcap and ALiBi have made them into such.
//
// No division here that the compiler would make a call: where a warpgroup has given registers away
// (attention_prefill_sm90.cu) there is no room for the called code's.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "ragged.cuh"

namespace halfbyte::cuda {

constexpr int kMaxSplits = 128;

struct Attention {
  const void* sinks;
  const float* alibi;
  DType sinks_dtype;
  int heads, kv_heads, dim, value_dim, block_len;
  int64_t tokens, blocks, q_stride, window;
  float scale, softcap;
  bool causal;

  /// Scores need no more than a positive factor.
  __host__ __device__ bool plain() const { return softcap <= 0.0f && !alibi && scale > 0.0f; }
};

/// Which query tokens the blocks of a launch take.
struct Tiles {
  int tokens = 1;            // of one sequence in a tile, at most
  int64_t count = 0;         // of tiles
  bool by_sequence = false;  // tile i is sequence i, left out where it has more tokens; otherwise see there
  bool fill_rest = false;    // by sequence: zeros for the tokens that no sequence has
  int64_t more_than = -1;    // sequences with as many tokens or fewer are another launch's
};

/// Sums over a part of the keys, of `splits` parts: sums [row][split][value_dim], not divided yet, and
/// state [row][split] = (largest score in units of log2, sum of the weights). A part without keys has
/// the state (-inf, 0) and no sums.
struct Partial {
  float* sums;
  float2* state;
  int splits;
};
inline int64_t partial_bytes(int64_t rows, int splits, int64_t value_dim) {
  return splits > 1 ? rows * splits * (value_dim + 2) * 4 : 0;
}

struct AttentionLaunch {
  Attention problem;
  Ragged batch;
  Tiles tiles;
  Partial partial;
  void* y;
  const void* q;
  const void* keys;
  const void* values;
};

// attention_decode.cu: 16-bit elements, dim and value_dim multiples of 8 and at most 256
cudaError_t launch_decode(const Launch& on, const AttentionLaunch& a, half_t);
cudaError_t launch_decode(const Launch& on, const AttentionLaunch& a, bf16_t);
// attention_prefill.cu: the same, heads / kv_heads at most 128
cudaError_t launch_prefill(const Launch& on, const AttentionLaunch& a, half_t);
cudaError_t launch_prefill(const Launch& on, const AttentionLaunch& a, bf16_t);
// attention_prefill_sm90.cu: the same, where on.wgmma
cudaError_t launch_prefill_sm90(const Launch& on, const AttentionLaunch& a, half_t);
cudaError_t launch_prefill_sm90(const Launch& on, const AttentionLaunch& a, bf16_t);
// attention_general.cu: everything; `wide` where rows begin and end with whole pieces of 16 bytes
cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, float);
cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, half_t);
cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, bf16_t);
/// Whether it has a form that runs there.
bool takes_general(const Launch& on, DType dtype, int64_t widest);
/// The query heads that one of its blocks takes, of `share` that have a key head in common.
inline int general_heads(int64_t share) { return share >= 4 ? 4 : share >= 2 ? 2 : 1; }

/// Those of one tile of queries a block, `blocks` for all of them; for each part of the keys again.
template <typename T, typename Kernel>
cudaError_t launch_tiles(const Launch& on, const AttentionLaunch& a, Kernel kernel, int64_t blocks,
                         int threads, int shared) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(a.partial.splits));
  shape.block = dim3(static_cast<unsigned>(threads));
  shape.shared = static_cast<size_t>(shared);
  return launch_kernel(on, shape, kernel, static_cast<T*>(a.y), a.partial, static_cast<const T*>(a.q),
                       static_cast<const T*>(a.keys), static_cast<const T*>(a.values), a.batch, a.tiles,
                       a.problem);
}

/// Calls body with the width, as a compile-time number, that holds the dimensions of keys and values.
template <typename Body>
cudaError_t with_width(const Attention& p, const Body& body) {
  const int widest = p.dim > p.value_dim ? p.dim : p.value_dim;
  if (widest <= 64) return body(std::integral_constant<int, 64>{});
  if (widest <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

/// A head's sink as a score.
__device__ __forceinline__ float sink_of(const Attention& p, int head) {
  float x;
  switch (p.sinks_dtype) {
    case DType::f16:
      x = __half2float(static_cast<const half_t*>(p.sinks)[head]);
      break;
    case DType::bf16:
      x = __bfloat162float(static_cast<const bf16_t*>(p.sinks)[head]);
      break;
    default:
      x = static_cast<const float*>(p.sinks)[head];
  }
  return x * kLog2E;
}

/// 1 / the sum of a row's weights, its head's sink among them; 0 for a row that has seen no key.
__device__ __forceinline__ float reciprocal_weight(const Attention& p, int head, float most, float weight) {
  if (weight == 0.0f) return 0.0f;
  if (p.sinks) weight += rough_exp2(sink_of(p, head) - most);
  return reciprocal(weight);
}

/// tanh by one power and one reciprocal: to some 1e-7.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - 2.0f * reciprocal(1.0f + rough_exp2(x * (2.0f * kLog2E)));
}
/// A product q k as a score, where the problem is not plain; `cap` is 1 / softcap.
__device__ __forceinline__ float score_of(const Attention& p, float product, float cap, float slope,
                                          float distance) {
  float s = product * p.scale;
  if (p.softcap > 0.0f) s = p.softcap * tanh_of(s * cap);
  return (s + slope * distance) * kLog2E;
}

/// The keys that a query at `position` sees, begin .. end, within the sequence's `length`.
struct Seen {
  int64_t begin, end;
};
__device__ __forceinline__ Seen seen_from(const Attention& p, const Ragged& batch, int position, int length) {
  Seen s{0, p.causal ? int64_t{position} + 1 : int64_t{length}};
  if (position < 0) s.end = 0;
  if (p.window > 0) s.begin = max(int64_t{0}, position - p.window + 1);
  s.end = max(int64_t{0}, min(s.end, static_cast<int64_t>(batch.max_blocks) * p.block_len));
  s.begin = min(s.begin, s.end);
  return s;
}

/// What a row sees of the keys in a block of scores, relative to this lane's first column.
struct Visible {
  int begin, end;
};

/// Finishes kKeys scores of one row of a fragment of C (row g for half 0, g + 8 for half 1): scale, softcap
/// and ALiBi where the problem is not plain, -inf for what the row does not see or what is not `there` (a bit
/// a key). `distance` from the query to this lane's first column.
template <int kKeys>
__device__ __forceinline__ void mask_row(float (&s)[kKeys / 2], int half, const Attention& p, bool plain,
                                         Visible visible, const uint32_t* there, float slope,
                                         float distance) {
  if (!plain) {
    const float cap = p.softcap > 0.0f ? reciprocal(p.softcap) : 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      float& x = s[i / 2 * 4 + half * 2 + i % 2];
      x = score_of(p, x, cap, slope, distance + static_cast<float>(i / 2 * 8 + i % 2));
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const uint32_t valid = there[n / 4] >> (n % 4 * 8 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = s[n * 4 + half * 2 + e];
      const int at = n * 8 + e;
      if (!(valid >> e & 1) || at < visible.begin || at >= visible.end) x = -INFINITY;
    }
  }
}

/// One step of the running softmax of such a row: its scores become weights, `most` and this lane's part of
/// `weight` go on. Returns what the sums so far are to be multiplied by.
template <int kKeys>
__device__ __forceinline__ float soften_row(float (&s)[kKeys / 2], int half, float factor, float& most,
                                            float& weight) {
  float top = -INFINITY;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  top = fmaxf(most, top * factor);
  const float shift = top == -INFINITY ? 0.0f : top;  // before the first key everything is 0 anyway
  const float keep = rough_exp2(most - shift);
  most = top;
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = s[n * 4 + half * 2 + e];
      x = rough_exp2(fmaf(x, factor, -shift));
      sum += x;
    }
  }
  weight = fmaf(weight, keep, sum);
  return keep;
}

/// The weights of 16 keys, `first` on, as a fragment of A.
template <typename T, int kKeys>
__device__ __forceinline__ void fragment_of(uint32_t (&a)[4], const float (&s)[kKeys / 2], int first) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pair_of<T>(s[first / 2 + i * 2], s[first / 2 + i * 2 + 1]);
}

/// A tile of a prefill kernel: `tokens` of `sequence` from `first` on, which has position `position`.
struct PrefillTile {
  int sequence, tokens, position, length;
  int64_t first;
};

/// The block's tile, the longest first; false where there is none for it. Sequence s has the tiles from
/// start / tiles.tokens + s on, enough for whatever it holds; the tokens behind the last sequence are one
/// more, whose outputs are zero.
template <typename T>
__device__ __forceinline__ bool find_tile(PrefillTile& tile, T* y, const Ragged& batch, const Tiles& tiles,
                                          const Attention& p) {
  const int number = static_cast<int>(tiles.count) - 1 - static_cast<int>(blockIdx.x / p.kv_heads);
  int sequence = 0, high = batch.sequences + 1;
  while (high - sequence > 1) {
    const int middle = (sequence + high) / 2;
    if (batch.query_starts[middle] / tiles.tokens + middle <= number)
      sequence = middle;
    else
      high = middle;
  }
  const int start = batch.query_starts[sequence], in_sequence = number - (start / tiles.tokens + sequence);
  const int64_t first = start + static_cast<int64_t>(in_sequence) * tiles.tokens;
  if (start < 0 || in_sequence < 0 || first >= p.tokens) return false;
  if (sequence == batch.sequences) {
    const int share = p.heads / p.kv_heads, first_head = blockIdx.x % p.kv_heads * share;
    for (int64_t t = first; blockIdx.y == 0 && t < min(first + tiles.tokens, p.tokens); ++t) {
      T* to = y + (t * p.heads + first_head) * p.value_dim;
      for (int i = threadIdx.x; i < share * p.value_dim; i += blockDim.x) to[i] = from_float<T>(0.0f);
    }
    return false;
  }
  const int64_t next = batch.query_starts[sequence + 1];
  if (next > p.tokens || first >= next || next - start <= tiles.more_than) return false;
  const int length = batch.lengths[sequence];
  tile = {sequence, static_cast<int>(min(static_cast<int64_t>(tiles.tokens), next - first)),
          length - static_cast<int>(next - first), length, first};
  return true;
}

}  // namespace halfbyte::cuda
