// Attention of every dtype and size, without tensor cores: float32, and what the other kernels do not take.
//
// A block makes one query token's outputs for up to kHeads query heads of one key head, over one part of its
// keys.
//   8 lanes share a key, so a warp looks at 4 keys at once and a block of 4 warps at 16: a lane holds every
//   eighth 16-byte piece of a row, scores need 3 shuffles a head, and each group of 8 lanes keeps its own
//   running maximum. Rows come through asynchronous copies, several keys ahead.
// Keys and values are read once for all kHeads heads; a prompt reads its keys again for every token, from L2.
// Where a block cannot have the room for that many rows ahead it runs in a tight form.
#include "attention.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 4, kGroups = kWarps * 4;  // groups of 8 lanes in a block
/// This lane's part of a row: pieces lane, lane + 8, ... of N elements; zeros behind the end.
template <typename T, int E, int N>
struct Slice {
  Vec<T, N> piece[E / N];

  __device__ __forceinline__ void load(const T* row, int length, int lane) {
#pragma unroll
    for (int i = 0; i < E / N; ++i) {
      const int at = (i * 8 + lane) * N;
      if (at < length)
        piece[i] = *reinterpret_cast<const Vec<T, N>*>(row + at);
      else
        clear(piece[i]);
    }
  }
  __device__ __forceinline__ void clear(Vec<T, N>& p) {
#pragma unroll
    for (int j = 0; j < N; ++j) p.v[j] = from_float<T>(0.0f);
  }
  __device__ __forceinline__ float operator[](int e) const { return to_float(piece[e / N].v[e % N]); }
};

/// The ring in shared memory through which a block's keys and values come, and the sums of its groups after
/// them; E elements of a row a lane. The tight form takes 64 KiB at most, all that a block has on sm_75.
template <typename T, int E, bool kTight>
struct Ring {
  static constexpr int kRowBytes = E * static_cast<int>(sizeof(T));
  /// Keys of a group in a batch: one step of the softmax.
  static constexpr int kAhead = !kTight && kRowBytes <= 128 ? 2 : 1;
  static constexpr int kBatches = kTight ? (kRowBytes <= 64 ? 2 : 1) : kRowBytes <= 32 ? 4 : 2;
  static constexpr int kBytes = kWarps * 32 * kRowBytes * 2 * kAhead * kBatches;
  static constexpr int kSums = kGroups * 8 * E, kStates = 2 * kGroups;  // floats
  /// The groups' states are static, or where that would be too much lie behind the sums.
  static constexpr int kStatic = kTight ? 0 : kStates * 4;
  static constexpr int kNeeded = (kTight ? kSums + kStates : kSums) * 4;
  static constexpr int kDynamic = kBytes > kNeeded ? kBytes : kNeeded;
  static_assert(kDynamic + kStatic <= (kTight ? 64 << 10 : 160 << 10));
};

/// Bytes that a block can have on every device that runs code for `arch`: 86, 89, 120 are the smallest
/// but 75.
__host__ __device__ constexpr int least_shared(int arch) {
  return (arch < 80 ? 64 : arch >= 90 && arch < 120 ? 227 : 99) << 10;
}

/// Whether code for `arch` has the tight form.
template <typename T, int E>
__host__ __device__ constexpr bool has_tight(int arch) {
  return Ring<T, E, false>::kDynamic + Ring<T, E, false>::kStatic > least_shared(arch);
}

#ifdef __CUDA_ARCH__
constexpr int kCode = __CUDA_ARCH__ / 10;
#else
constexpr int kCode = 0;
#endif

/// A piece into the ring, or zeros: asynchronously where it is 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void copy_piece(Vec<T, N>* to, const T* from, bool there) {
  if constexpr (sizeof(Vec<T, N>) == 16) {
    copy_async(shared_address(to), from, there ? 16 : 0);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to->v[j] = there ? from[j] : from_float<T>(0.0f);
  }
}

template <typename T, int E, int N, int kHeads, bool kTight>
__global__ void __launch_bounds__(kWarps * 32)
    attention_kernel(T* y, Partial partial, const T* q, const T* keys, const T* values, Ragged batch,
                     Attention p) {
  using R = Ring<T, E, kTight>;
  if (kTight && !has_tight<T, E>(kCode)) return;  // nobody starts it
  let_next_start();
  wait_for_results();
  const int share = p.heads / p.kv_heads, head_blocks = (share + kHeads - 1) / kHeads;
  const int64_t token = blockIdx.x / (p.kv_heads * head_blocks);
  const int in_token = blockIdx.x % (p.kv_heads * head_blocks);
  const int kv_head = in_token / head_blocks, first_head = kv_head * share + in_token % head_blocks * kHeads;
  const int heads_here = min(kHeads, (kv_head + 1) * share - first_head);
  const int lane = threadIdx.x % 8, group = threadIdx.x / 8;

  const Ragged::Place place = batch.locate(token);
  const int length = place.sequence < 0 ? 0 : batch.lengths[place.sequence];
  int64_t begin = 0, end = p.causal ? place.position + 1 : length;
  if (place.sequence < 0 || place.position < 0) end = 0;
  if (p.window > 0 && end > 0) begin = max(int64_t{0}, static_cast<int64_t>(place.position) - p.window + 1);
  end = min(end, static_cast<int64_t>(batch.max_blocks) * p.block_len);
  begin = min(begin, max(end, int64_t{0}));
  const int64_t part = (end - begin + partial.splits - 1) / partial.splits;
  begin += blockIdx.y * part;
  end = min(end, begin + part);

  float query[kHeads][E];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first_head + min(h, heads_here - 1);
    Slice<T, E, N> slice;
    slice.load(q + token * p.q_stride + static_cast<int64_t>(head) * p.dim, p.dim, lane);
#pragma unroll
    for (int i = 0; i < E; ++i) query[h][i] = slice[i] * p.scale;
  }
  float acc[kHeads][E] = {};
  float most[kHeads], weight[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    most[h] = -INFINITY;
    weight[h] = 0.0f;
  }
  const unsigned mask = 0xffu << (threadIdx.x % 32 / 8 * 8);
  // Rows travel through a ring in shared memory that hides their latency without registers. A lane reads back
  // only what it has copied itself, so nothing is to be synchronised but its own copies.
  constexpr int kAhead = R::kAhead, kBatches = R::kBatches;
  constexpr int kPieces = E / N;
  using Piece = Vec<T, N>;
  extern __shared__ __align__(16) char ring_bytes[];
  Piece* const ring = reinterpret_cast<Piece*>(ring_bytes) + threadIdx.x;
  const auto place_in_ring = [&](int batch, int key, int row, int piece) {
    return ring + ((((batch % kBatches) * kAhead + key) * 2 + row) * kPieces + piece) * (kWarps * 32);
  };
  const int64_t batches =
      end > begin + group ? (end - begin - group + kGroups * kAhead - 1) / (kGroups * kAhead) : 0;
  const auto slot_of = [&](int64_t b, int i) {
    const int64_t key = begin + group + (b * kAhead + i) * kGroups;
    return key < end ? batch.slot(place.sequence, static_cast<int>(key), p.block_len, p.blocks) : int64_t{-1};
  };
  const auto fetch = [&](int64_t b) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t slot = slot_of(b, i), row = (slot < 0 ? 0 : slot) * p.kv_heads + kv_head;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int at = (piece * 8 + lane) * N;
        copy_piece(place_in_ring(static_cast<int>(b), i, 0, piece), keys + row * p.dim + at,
                   slot >= 0 && at < p.dim);
        copy_piece(place_in_ring(static_cast<int>(b), i, 1, piece), values + row * p.value_dim + at,
                   slot >= 0 && at < p.value_dim);
      }
    }
  };
#pragma unroll
  for (int b = 0; b < kBatches - 1; ++b) {
    if (b < batches) fetch(b);
    commit_copies();
  }
  for (int64_t b = 0; b < batches; ++b) {
    if (b + kBatches - 1 < batches) fetch(b + kBatches - 1);
    commit_copies();
    wait_copies<kBatches - 1>();
    Slice<T, E, N> k[kAhead], v[kAhead];
    bool there[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      there[i] = slot_of(b, i) >= 0;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        k[i].piece[piece] = *place_in_ring(static_cast<int>(b), i, 0, piece);
        v[i].piece[piece] = *place_in_ring(static_cast<int>(b), i, 1, piece);
      }
    }
    const int64_t first = begin + group + b * kAhead * kGroups;
    // all the scores first, then one step of the running softmax for the kAhead keys together
    float score[kHeads][kAhead];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        score[h][i] = 0.0f;
#pragma unroll
        for (int e = 0; e < E; ++e) score[h][i] = fmaf(query[h][e], k[i][e], score[h][i]);
      }
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) score[h][i] += __shfl_xor_sync(mask, score[h][i], step);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = most[h];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float& s = score[h][i];
        if (p.softcap > 0.0f) s = p.softcap * tanhf(s / p.softcap);
        if (p.alibi && h < heads_here)
          s += p.alibi[first_head + h] * static_cast<float>(first + i * kGroups - place.position);
        if (!there[i]) s = -INFINITY;
        top = s > top || s != s ? s : top;  // NaN stays
      }
      // before the first key with a weight everything is 0: any finite shift will do
      const float shift = top == -INFINITY ? 0.0f : top;
      const float keep = __expf(most[h] - shift);
      most[h] = top;
      weight[h] *= keep;
#pragma unroll
      for (int e = 0; e < E; ++e) acc[h][e] *= keep;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float add = __expf(score[h][i] - shift);
        weight[h] += add;
#pragma unroll
        for (int e = 0; e < E; ++e) acc[h][e] = fmaf(add, v[i][e], acc[h][e]);
      }
    }
  }

  // join the groups: maxima and weights first, then the sums, head by head through shared memory
  __shared__ float own_most_of[kGroups], own_weight_of[kGroups];
  float* const sums = reinterpret_cast<float*>(ring_bytes);  // [kGroups][8 * E]
  float* const group_most = kTight ? sums + R::kSums : own_most_of;
  float* const group_weight = kTight ? group_most + kGroups : own_weight_of;
  const auto group_keep = [&](int g, float top) {  // NaN where all its scores are
    return group_most[g] == -INFINITY ? group_weight[g] : __expf(group_most[g] - top);
  };
  wait_copies<0>();
  __syncthreads();  // the ring's memory is free
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads_here) break;
    float own_most = 0.0f, own_weight = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i == h) {
        own_most = most[i];
        own_weight = weight[i];
#pragma unroll
        for (int e = 0; e < E; ++e) sums[group * 8 * E + (e / N * 8 + lane) * N + e % N] = acc[i][e];
      }
    }
    if (lane == 0) {
      group_most[group] = own_most;
      group_weight[group] = own_weight;
    }
    __syncthreads();
    float top = -INFINITY, total = 0.0f;
    for (int g = 0; g < kGroups; ++g) top = fmaxf(top, group_most[g]);
    for (int g = 0; g < kGroups; ++g) {
      if (group_weight[g] != 0.0f) total += group_weight[g] * group_keep(g, top);
    }
    const int head = first_head + h;
    const int64_t row = token * p.heads + head, part_row = row * partial.splits + blockIdx.y;
    const float by = partial.splits > 1 ? 1.0f : reciprocal_weight(p, head, top * kLog2E, total);
    if (partial.splits > 1 && threadIdx.x == 0) partial.state[part_row] = make_float2(top * kLog2E, total);
    for (int d = threadIdx.x; d < p.value_dim; d += blockDim.x) {
      float sum = 0.0f;
      for (int g = 0; g < kGroups; ++g) {
        if (group_weight[g] != 0.0f) sum += sums[g * 8 * E + d] * group_keep(g, top);
      }
      if (partial.splits == 1)
        y[row * p.value_dim + d] = from_float<T>(total == 0.0f ? 0.0f : sum * by);
      else if (total != 0.0f)
        partial.sums[part_row * p.value_dim + d] = sum;
    }
    __syncthreads();
  }
}

template <typename T, int E, int N, int kHeads, bool kTight>
cudaError_t launch_form(const Launch& on, const AttentionLaunch& a) {
  const Attention& p = a.problem;
  const int share = p.heads / p.kv_heads;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(p.tokens * p.kv_heads * ((share + kHeads - 1) / kHeads)), a.partial.splits);
  shape.block = dim3(kWarps * 32);
  shape.shared = Ring<T, E, kTight>::kDynamic;
  return launch_kernel(on, shape, attention_kernel<T, E, N, kHeads, kTight>, static_cast<T*>(a.y), a.partial,
                       static_cast<const T*>(a.q), static_cast<const T*>(a.keys),
                       static_cast<const T*>(a.values), a.batch, p);
}

/// Calls body with the elements of a row a lane, as a compile-time number, for heads of up to `widest`.
template <typename Body>
auto with_elements(int64_t widest, const Body& body) {
  if (widest <= 64) return body(std::integral_constant<int, 8>{});
  if (widest <= 128) return body(std::integral_constant<int, 16>{});
  if (widest <= 256) return body(std::integral_constant<int, 32>{});
  return body(std::integral_constant<int, 64>{});
}

template <typename T, int E, bool kTight>
bool has_room(const Launch& on) {
  using R = Ring<T, E, kTight>;
  return R::kDynamic + R::kStatic <= on.block_shared && (!kTight || has_tight<T, E>(on.code));
}

template <typename T>
cudaError_t launch(const Launch& on, const AttentionLaunch& a, bool wide) {
  constexpr int N = 16 / sizeof(T);
  const Attention& p = a.problem;
  const int at_once = general_heads(p.heads / p.kv_heads), widest = p.dim > p.value_dim ? p.dim : p.value_dim;
  return with_elements(widest, [&](auto elements) {
    constexpr int E = decltype(elements)::value;
    const auto start = [&](auto heads, auto each) {
      constexpr int H = decltype(heads)::value, kEach = decltype(each)::value;
      return has_room<T, E, false>(on) ? launch_form<T, E, kEach, H, false>(on, a)
                                       : launch_form<T, E, kEach, H, true>(on, a);
    };
    const auto run = [&](auto heads) {
      if constexpr (E % N == 0) {
        if (wide) return start(heads, std::integral_constant<int, N>{});
      }
      return start(heads, std::integral_constant<int, 1>{});
    };
    if constexpr (E <= 16) {
      if (at_once == 4) return run(std::integral_constant<int, 4>{});
      if (at_once == 2) return run(std::integral_constant<int, 2>{});
    }
    return run(std::integral_constant<int, 1>{});
  });
}

}  // namespace

bool takes_general(const Launch& on, DType dtype, int64_t widest) {
  return with_float_type(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return with_elements(widest, [&](auto elements) {
      constexpr int E = decltype(elements)::value;
      return has_room<T, E, false>(on) || has_room<T, E, true>(on);
    });
  });
}

cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, float) {
  return launch<float>(on, a, wide);
}
cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, half_t) {
  return launch<half_t>(on, a, wide);
}
cudaError_t launch_general(const Launch& on, const AttentionLaunch& a, bool wide, bf16_t) {
  return launch<bf16_t>(on, a, wide);
}

}  // namespace halfbyte::cuda
