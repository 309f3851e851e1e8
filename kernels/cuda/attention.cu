// Attention over the paged cache, and writing into it.
//
// A block makes one query token's outputs for up to kHeads query heads of one key head, over one of `splits`
// parts of its keys (flash-decoding): partial sums with their maximum and weight go to the workspace and
// combine_kernel joins them. With one split the block finishes by itself.
//   8 lanes share a key, so a warp looks at 4 keys at once and a block of 4 warps at 16: a lane holds every
//   eighth 16-byte piece of a row, scores need 3 shuffles a head, and each group of 8 lanes keeps its own
//   running maximum. Rows come through asynchronous copies, several keys ahead.
// Keys and values are read once for all kHeads heads. Fast for decoding with long caches (memory-bound); a
// prompt reads its keys again for every token, from L2.
#include "mma.cuh"
#include "ragged.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 4, kGroups = kWarps * 4;  // groups of 8 lanes in a block
constexpr int kMaxSplits = 64;

struct Problem {
  const void* sinks;
  const float* alibi;
  DType sinks_dtype;
  int heads, kv_heads, dim, value_dim, block_len, splits;
  int64_t tokens, blocks, q_stride, window;
  float scale, softcap;
  bool causal;
};

__device__ __forceinline__ float sink_of(const Problem& p, int head) {
  switch (p.sinks_dtype) {
    case DType::f16:
      return __half2float(static_cast<const half_t*>(p.sinks)[head]);
    case DType::bf16:
      return __bfloat162float(static_cast<const bf16_t*>(p.sinks)[head]);
    default:
      return static_cast<const float*>(p.sinks)[head];
  }
}

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

/// The ring in shared memory through which a block's keys and values come; E elements of a row a lane.
template <typename T, int E>
struct Ring {
  static constexpr int kRowBytes = E * static_cast<int>(sizeof(T));
  static constexpr int kAhead =
      kRowBytes <= 128 ? 2 : 1;  // keys of a group in a batch: one step of the softmax
  static constexpr int kBatches = kRowBytes <= 32 ? 4 : 2;
  static constexpr int kBytes = kWarps * 32 * kRowBytes * 2 * kAhead * kBatches;
  static_assert(kBytes <= 160 << 10, "the ring must fit a multiprocessor");
};

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

template <typename T, int E, int N, int kHeads>
__global__ void __launch_bounds__(kWarps * 32)
    attention_kernel(T* y, float* partial, const T* q, const T* keys, const T* values, Ragged batch,
                     Problem p) {
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
  const int64_t part = (end - begin + p.splits - 1) / p.splits;
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
  constexpr int kAhead = Ring<T, E>::kAhead, kBatches = Ring<T, E>::kBatches;
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
  __shared__ float group_most[kGroups], group_weight[kGroups];
  wait_copies<0>();
  __syncthreads();                                           // the ring's memory is free
  float* const sums = reinterpret_cast<float*>(ring_bytes);  // [kGroups][8 * E]
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
      total += group_most[g] == -INFINITY ? 0.0f : group_weight[g] * __expf(group_most[g] - top);
    }
    const int head = first_head + h;
    float divisor = total;
    if (p.splits == 1 && p.sinks) {
      const float sink = sink_of(p, head);
      divisor = top == -INFINITY ? 0.0f : total + __expf(sink - top);
    }
    float* to = partial + ((token * p.heads + head) * p.splits + blockIdx.y) * (p.value_dim + 2);
    for (int d = threadIdx.x; d < p.value_dim; d += blockDim.x) {
      float sum = 0.0f;
      for (int g = 0; g < kGroups; ++g) {
        if (group_most[g] != -INFINITY) sum += sums[g * 8 * E + d] * __expf(group_most[g] - top);
      }
      if (p.splits == 1)
        y[(token * p.heads + head) * p.value_dim + d] = from_float<T>(divisor == 0.0f ? 0.0f : sum / divisor);
      else
        to[2 + d] = sum;
    }
    if (p.splits > 1 && threadIdx.x == 0) {
      to[0] = total == total ? top : total;  // NaN is not "no key"
      to[1] = total;
    }
    __syncthreads();
  }
}

/// A block a token and head.
template <typename T>
__global__ void combine_kernel(T* y, const float* partial, Problem p) {
  const int64_t row = blockIdx.x;
  const int step = p.value_dim + 2;
  const float* from = partial + row * p.splits * step;
  float top = -INFINITY;
  for (int s = 0; s < p.splits; ++s) top = fmaxf(top, from[s * step]);
  float total = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    if (from[s * step] != -INFINITY) total += from[s * step + 1] * __expf(from[s * step] - top);
  }
  if (p.sinks && top != -INFINITY) total += __expf(sink_of(p, static_cast<int>(row % p.heads)) - top);
  for (int d = threadIdx.x; d < p.value_dim; d += blockDim.x) {
    float sum = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      if (from[s * step] != -INFINITY) sum += from[s * step + 2 + d] * __expf(from[s * step] - top);
    }
    y[row * p.value_dim + d] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
}

/// A block a token: copies its key and value rows to their slots.
template <typename T>
__global__ void write_kernel(T* keys, T* values, const T* k, const T* v, Ragged batch, int kv_heads, int dim,
                             int value_dim, int block_len, int64_t blocks, int64_t k_stride,
                             int64_t v_stride) {
  const int64_t token = blockIdx.x;
  const Ragged::Place place = batch.locate(token);
  if (place.sequence < 0) return;
  const int64_t slot = batch.slot(place.sequence, place.position, block_len, blocks);
  if (slot < 0) return;
  for (int i = threadIdx.x; i < kv_heads * dim; i += blockDim.x)
    keys[slot * kv_heads * dim + i] = k[token * k_stride + i];
  for (int i = threadIdx.x; i < kv_heads * value_dim; i += blockDim.x) {
    values[slot * kv_heads * value_dim + i] = v[token * v_stride + i];
  }
}

int heads_at_once(int64_t share) { return share >= 4 ? 4 : share >= 2 ? 2 : 1; }

int splits_for(const View& q, const View& key_cache, const RaggedBatch& batch, int multiprocessors) {
  const int64_t kv_heads = key_cache.shape[2], share = q.shape[1] / (kv_heads > 0 ? kv_heads : 1);
  const int64_t at_once = heads_at_once(share);
  const int64_t blocks = q.shape[0] * kv_heads * ((share + at_once - 1) / at_once);
  const int64_t capacity = batch.block_table.cols() * key_cache.shape[1];
  int64_t splits = blocks > 0 ? (multiprocessors * 4 + blocks - 1) / blocks : 1;
  if (splits > (capacity + 255) / 256) splits = (capacity + 255) / 256;
  return static_cast<int>(splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits);
}

Status check_caches(const char* op, const View& key_cache, const View& value_cache) {
  if (key_cache.ndim != 4 || value_cache.ndim != 4 || !key_cache.is_contiguous() ||
      !value_cache.is_contiguous()) {
    return refuse(op, "the caches must be [blocks, block_len, kv_heads, head_dim], contiguous");
  }
  for (int d = 0; d < 3; ++d) {
    if (key_cache.shape[d] != value_cache.shape[d]) return refuse(op, "the caches differ in shape");
  }
  return {};
}

template <typename T, int E, int N, int kHeads>
cudaError_t launch_attention(cudaStream_t stream, View y, View partial, View q, View keys, View values,
                             const Ragged& batch, const Problem& p) {
  constexpr int kRing = Ring<T, E>::kBytes;
  constexpr int kSums = kGroups * 8 * E * 4;
  constexpr int shared = kRing > kSums ? kRing : kSums;
  const auto kernel = attention_kernel<T, E, N, kHeads>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const int share = p.heads / p.kv_heads;
  const dim3 grid(static_cast<unsigned>(p.tokens * p.kv_heads * ((share + kHeads - 1) / kHeads)), p.splits);
  kernel<<<grid, kWarps * 32, shared, stream>>>(y.as<T>(), p.splits > 1 ? partial.as<float>() : nullptr,
                                                q.as<const T>(), keys.as<const T>(), values.as<const T>(),
                                                batch, p);
  if (p.splits > 1) {
    combine_kernel<T><<<static_cast<unsigned>(p.tokens * p.heads), 128, 0, stream>>>(
        y.as<T>(), partial.as<const float>(), p);
  }
  return cudaGetLastError();
}

}  // namespace

Status CudaBackend::paged_write(Queue queue, View key_cache, View value_cache, View k, View v,
                                const RaggedBatch& batch) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_ragged("paged_write", batch); !status.ok()) return status;
  if (Status status = check_caches("paged_write", key_cache, value_cache); !status.ok()) return status;
  if (k.ndim != 3 || v.ndim != 3 || k.shape[0] != v.shape[0] || k.shape[1] != key_cache.shape[2] ||
      v.shape[1] != key_cache.shape[2] || k.shape[2] != key_cache.shape[3] ||
      v.shape[2] != value_cache.shape[3]) {
    return refuse("paged_write", "k and v must be [tokens, kv_heads, head_dim] as in the caches");
  }
  for (const View& t : {key_cache, value_cache, k, v}) {
    if (t.dtype != k.dtype || !is_float(t.dtype))
      return refuse_dtype("paged_write", "operands must be of one float dtype");
  }
  for (const View& t : {k, v}) {
    if (t.size() > 0 &&
        ((t.shape[2] > 1 && t.strides[2] != 1) || (t.shape[1] > 1 && t.strides[1] != t.shape[2]))) {
      return refuse("paged_write", "the heads of k and v must be contiguous");
    }
  }
  if (k.shape[0] == 0 || key_cache.size() == 0) return {};
  with_float_type(k.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    write_kernel<T><<<static_cast<unsigned>(k.shape[0]), 256, 0, stream(queue)>>>(
        key_cache.as<T>(), value_cache.as<T>(), k.as<const T>(), v.as<const T>(), ragged_of(batch),
        static_cast<int>(k.shape[1]), static_cast<int>(k.shape[2]), static_cast<int>(v.shape[2]),
        static_cast<int>(key_cache.shape[1]), key_cache.shape[0], k.strides[0], v.strides[0]);
  });
  return check(cudaGetLastError(), "paged_write");
}

size_t CudaBackend::paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                              const RaggedBatch& batch) const {
  if (q.ndim != 3 || key_cache.ndim != 4 || value_cache.ndim != 4 || batch.block_table.ndim != 2) return 0;
  const int splits = splits_for(q, key_cache, batch, launch_.multiprocessors);
  return splits == 1 ? 0
                     : static_cast<size_t>(q.shape[0] * q.shape[1] * splits * (value_cache.shape[3] + 2)) * 4;
}

Status CudaBackend::paged_attention(Queue queue, View y, View q, View key_cache, View value_cache,
                                    const RaggedBatch& batch, const AttentionOptions& options,
                                    View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_ragged("paged_attention", batch); !status.ok()) return status;
  if (Status status = check_caches("paged_attention", key_cache, value_cache); !status.ok()) return status;
  if (q.ndim != 3 || y.ndim != 3 || !y.is_contiguous() || q.shape[2] != key_cache.shape[3] ||
      y.shape[0] != q.shape[0] || y.shape[1] != q.shape[1] || y.shape[2] != value_cache.shape[3] ||
      key_cache.shape[2] == 0 || q.shape[1] % key_cache.shape[2] != 0) {
    return refuse("paged_attention", "q, y and the caches do not fit");
  }
  for (const View& t : {y, key_cache, value_cache}) {
    if (t.dtype != q.dtype || !is_float(t.dtype))
      return refuse_dtype("paged_attention", "operands must be of one float dtype");
  }
  if (y.size() == 0) return {};
  if ((q.shape[2] > 1 && q.strides[2] != 1) || (q.shape[1] > 1 && q.strides[1] != q.shape[2])) {
    return refuse("paged_attention", "the heads of q must be contiguous");
  }
  const int64_t dim = q.shape[2], value_dim = value_cache.shape[3],
                widest = dim > value_dim ? dim : value_dim;
  if (widest > 512) return Status::error(Code::unsupported, "paged_attention: head_dim above 512");
  Problem p{};
  p.sinks = options.sinks ? options.sinks.data : nullptr;
  p.sinks_dtype = options.sinks ? options.sinks.dtype : DType::f32;
  p.alibi = options.alibi_slopes ? options.alibi_slopes.as<const float>() : nullptr;
  p.heads = static_cast<int>(q.shape[1]);
  p.kv_heads = static_cast<int>(key_cache.shape[2]);
  p.dim = static_cast<int>(dim);
  p.value_dim = static_cast<int>(value_dim);
  p.block_len = static_cast<int>(key_cache.shape[1]);
  p.splits = workspace ? splits_for(q, key_cache, batch, launch_.multiprocessors) : 1;
  p.tokens = q.shape[0];
  p.blocks = key_cache.shape[0];
  p.q_stride = q.strides[0];
  p.window = options.window;
  p.scale = options.scale;
  p.softcap = options.softcap;
  p.causal = options.causal;
  if (p.splits > 1 && workspace.size() < p.tokens * p.heads * p.splits * (p.value_dim + 2) * 4) {
    return refuse("paged_attention", "the workspace is too small");
  }
  const int at_once = heads_at_once(p.heads / p.kv_heads);
  cudaError_t error = cudaSuccess;
  with_float_type(q.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr int N = 16 / sizeof(T);
    const bool wide = dim % N == 0 && value_dim % N == 0 && p.q_stride % N == 0 && is_aligned(q.data, 16) &&
                      is_aligned(key_cache.data, 16) && is_aligned(value_cache.data, 16);
    const auto run = [&](auto heads, auto elements) {
      constexpr int H = decltype(heads)::value, E = decltype(elements)::value;
      if constexpr (E % N == 0) {
        if (wide) {
          error = launch_attention<T, E, N, H>(stream(queue), y, workspace, q, key_cache, value_cache,
                                               ragged_of(batch), p);
          return;
        }
      }
      error = launch_attention<T, E, 1, H>(stream(queue), y, workspace, q, key_cache, value_cache,
                                           ragged_of(batch), p);
    };
    const auto by_heads = [&](auto elements) {
      if (at_once == 4)
        run(std::integral_constant<int, 4>{}, elements);
      else if (at_once == 2)
        run(std::integral_constant<int, 2>{}, elements);
      else
        run(std::integral_constant<int, 1>{}, elements);
    };
    if (widest <= 64)
      by_heads(std::integral_constant<int, 8>{});
    else if (widest <= 128)
      by_heads(std::integral_constant<int, 16>{});
    else if (widest <= 256)
      run(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
    else
      run(std::integral_constant<int, 1>{}, std::integral_constant<int, 64>{});
  });
  return check(error, "paged_attention");
}

}  // namespace halfbyte::cuda
