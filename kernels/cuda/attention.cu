// Attention over the paged cache: which kernel takes which tokens, and writing into the cache.
//
//   16-bit, sizes that are multiples of 8, up to 256   few tokens of a sequence: attention_decode.cu
//                                                      many: attention_prefill.cu, attention_prefill_sm90.cu
//   float32 and everything else                        attention_general.cu
//
// Only shapes decide. Where there are more tokens than sequences both tensor-core kernels are launched and
// each leaves the other's sequences alone. Where the tokens alone do not fill the device the keys are cut
// into parts (flash-decoding), whose sums go to the workspace and are joined by combine_kernel.
#include "attention.cuh"

namespace halfbyte::cuda {
namespace {

/// Joins the parts of a row. A block a row; its warps share the parts. The sums of the first parts are asked
/// for together with the states, whether or not they turn out to be there.
template <typename T>
__global__ void __launch_bounds__(128)
    combine_kernel(T* y, Partial partial, Ragged batch, Tiles tiles, Attention p) {
  constexpr int kAhead = 8, kPerLane = kMaxSplits / 32;
  __shared__ float weights[kMaxSplits], sums[4][128];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  let_next_start();
  wait_for_results();
  const int64_t row = blockIdx.x;
  const int head = static_cast<int>(row % p.heads);
  int64_t token = row / p.heads;
  float own[kAhead][4];
  const auto read = [&](int part, int column) {  // kAhead of this warp's parts from `part` on
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float* from = partial.sums + (row * partial.splits + part + j * 4) * p.value_dim;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = column + i * 32 + lane;
        own[j][i] = part + j * 4 < partial.splits && d < p.value_dim ? from[d] : 0.0f;
      }
    }
  };
  read(warp, 0);
  float2 state[kPerLane];
  float top = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int s = i * 32 + lane;
    state[i] = s < partial.splits ? partial.state[row * partial.splits + s] : make_float2(-INFINITY, 0.0f);
    top = fmaxf(top, state[i].x);
  }
  if (tiles.by_sequence) {
    const int64_t sequence = token / tiles.tokens, start = batch.query_starts[sequence],
                  next = batch.query_starts[sequence + 1];
    token = start + token % tiles.tokens;
    if (start < 0 || next > p.tokens || token >= next || next - start > tiles.tokens) return;
  } else if (tiles.more_than >= 0) {
    const int sequence = batch.locate(token).sequence;
    if (sequence < 0) return;
    if (batch.query_starts[sequence + 1] - batch.query_starts[sequence] <= tiles.more_than) return;
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float2 part = state[i];
    const float keep = part.y == 0.0f ? 0.0f : part.x == -INFINITY ? part.y : rough_exp2(part.x - top);
    total += part.y * keep;
    if (warp == 0) weights[i * 32 + lane] = keep;
  }
  total = warp_sum(total);
  __syncthreads();
  const float by = reciprocal_weight(p, head, top, total);
  for (int first = 0; first < p.value_dim; first += 128) {
    float joined[4] = {};
    for (int part = warp; part < partial.splits; part += 4 * kAhead) {
      if (first > 0 || part != warp) read(part, first);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float keep = part + j * 4 < partial.splits ? weights[part + j * 4] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) joined[i] = keep != 0.0f ? fmaf(own[j][i], keep, joined[i]) : joined[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp][i * 32 + lane] = joined[i];
    __syncthreads();
    const int d = threadIdx.x;
    if (first + d < p.value_dim) {
      const float sum = sums[0][d] + sums[1][d] + sums[2][d] + sums[3][d];
      y[(token * p.heads + head) * p.value_dim + first + d] = from_float<T>(total == 0.0f ? 0.0f : sum * by);
    }
    __syncthreads();
  }
}

/// A block a token: copies its key and value rows to their slots.
template <typename T>
__global__ void write_kernel(T* keys, T* values, const T* k, const T* v, Ragged batch, int kv_heads, int dim,
                             int value_dim, int block_len, int64_t blocks, int64_t k_stride,
                             int64_t v_stride) {
  let_next_start();
  wait_for_results();
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

/// The parts into which the keys are cut so that `blocks` blocks become about `wanted`, each with `least`
/// keys at least where the caches are full.
int parts_for(int64_t blocks, int64_t wanted, int64_t capacity, int64_t least) {
  const int64_t parts = blocks > 0 ? wanted / blocks : 1, most = (capacity + least - 1) / least;
  const int64_t n = parts < most ? parts : most;
  return static_cast<int>(n < 1 ? 1 : n > kMaxSplits ? kMaxSplits : n);
}

/// Who does what; a launch of no tiles is none.
struct Plan {
  Tiles decode, prefill, general;
  int decode_splits = 1, prefill_splits = 1, general_splits = 1;
  int64_t decode_rows = 0, prefill_rows = 0, general_rows = 0;  // with partial sums

  size_t bytes(int64_t value_dim) const {
    return static_cast<size_t>(partial_bytes(decode_rows, decode_splits, value_dim) +
                               partial_bytes(prefill_rows, prefill_splits, value_dim) +
                               partial_bytes(general_rows, general_splits, value_dim));
  }
};

Plan plan_general(const View& q, const View& key_cache, const RaggedBatch& batch, int multiprocessors) {
  const int64_t kv_heads = key_cache.shape[2], share = q.shape[1] / (kv_heads > 0 ? kv_heads : 1);
  const int64_t at_once = general_heads(share), tokens = q.shape[0];
  const int64_t blocks = tokens * kv_heads * ((share + at_once - 1) / at_once);
  Plan plan;
  plan.general.count = tokens;
  plan.general_splits =
      parts_for(blocks, multiprocessors * 4 + blocks - 1, batch.block_table.cols() * key_cache.shape[1], 256);
  plan.general_rows = tokens * q.shape[1];
  return plan;
}

/// Whether the tensor-core kernels take it, addresses aside.
bool fits_tensor(const Launch& on, const View& q, const View& key_cache, const View& value_cache,
                 const RaggedBatch& batch) {
  const int64_t dim = key_cache.shape[3], value_dim = value_cache.shape[3], kv_heads = key_cache.shape[2];
  const int64_t widest = dim > value_dim ? dim : value_dim;
  return on.arch >= 80 && size_of(q.dtype) == 2 && dim % 8 == 0 && value_dim % 8 == 0 && widest > 0 &&
         widest <= 256 && (widest <= 128 || on.shared >= (132 << 10)) && kv_heads > 0 && q.shape[1] > 0 &&
         batch.lengths.size() > 0 && key_cache.shape[0] * key_cache.shape[1] <= INT32_MAX &&
         kv_heads * widest <= INT32_MAX;
}

/// For what attention_decode.cu and attention_prefill.cu take.
Plan plan_tensor(const Launch& on, const View& q, const View& key_cache, const View& value_cache,
                 const RaggedBatch& batch) {
  const int64_t widest =
      key_cache.shape[3] > value_cache.shape[3] ? key_cache.shape[3] : value_cache.shape[3];
  const int64_t tokens = q.shape[0], sequences = batch.lengths.size(), heads = q.shape[1];
  const int64_t kv_heads = key_cache.shape[2], share = heads / kv_heads;
  const int64_t capacity = batch.block_table.cols() * key_cache.shape[1];
  const int64_t blocks_at_once = on.multiprocessors * (widest <= 64 ? 3 : widest <= 128 ? 2 : 1);
  const int64_t few = share < 16 ? 16 / share : 1;  // tokens that a tile of the decode kernel holds
  Plan plan;
  const bool by_token = tokens <= sequences || share > 128, only_few = by_token || tokens <= few;
  if (only_few || sequences > 1) {
    plan.decode.by_sequence = !by_token;
    plan.decode.tokens = by_token ? 1 : static_cast<int>(few);
    plan.decode.count = by_token ? tokens : sequences;
    plan.decode.fill_rest = only_few;
    plan.decode_rows = plan.decode.count * plan.decode.tokens * heads;
    plan.decode_splits =
        parts_for(plan.decode.count * kv_heads * ((share + 15) / 16), blocks_at_once, capacity, 128);
  }
  if (!only_few) {
    plan.prefill.tokens = static_cast<int>(128 / share);
    plan.prefill.count = tokens / plan.prefill.tokens + sequences + 1;
    plan.prefill.more_than = sequences > 1 ? few : 0;
    plan.prefill_rows = tokens * heads;
    const int64_t tiles = (tokens + plan.prefill.tokens - 1) / plan.prefill.tokens;
    plan.prefill_splits =
        parts_for(tiles * kv_heads, on.wgmma ? on.multiprocessors : blocks_at_once, capacity, 256);
  }
  return plan;
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

template <typename T>
cudaError_t launch_combine(const Launch& on, const AttentionLaunch& a, int64_t rows) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(rows));
  shape.block = dim3(128);
  return launch_kernel(on, shape, combine_kernel<T>, static_cast<T*>(a.y), a.partial, a.batch, a.tiles,
                       a.problem);
}

/// The launches of a plan, one after the other.
template <typename T>
cudaError_t launch_plan(Launch on, AttentionLaunch a, const Plan& plan, bool wide, char* workspace) {
  const auto run = [&](const Tiles& tiles, int splits, int64_t rows, const auto& kernel) {
    if (tiles.count == 0) return cudaSuccess;
    a.tiles = tiles;
    a.partial = {reinterpret_cast<float*>(workspace) + 2 * rows * splits,
                 reinterpret_cast<float2*>(workspace), splits};
    if (splits > 1) workspace += partial_bytes(rows, splits, a.problem.value_dim);
    cudaError_t error = kernel(a);
    on.early = on.arch >= 90;  // all of them wait for the one in front
    if (error == cudaSuccess && splits > 1) error = launch_combine<T>(on, a, rows);
    return error;
  };
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(T) == 2) {
    error = run(plan.decode, plan.decode_splits, plan.decode_rows,
                [&](const AttentionLaunch& l) { return launch_decode(on, l, T{}); });
    if (error != cudaSuccess) return error;
    error = run(plan.prefill, plan.prefill_splits, plan.prefill_rows, [&](const AttentionLaunch& l) {
      return on.wgmma ? launch_prefill_sm90(on, l, T{}) : launch_prefill(on, l, T{});
    });
    if (error != cudaSuccess) return error;
  }
  return run(plan.general, plan.general_splits, plan.general_rows,
             [&](const AttentionLaunch& l) { return launch_general(on, l, wide, T{}); });
}

}  // namespace

Status CudaBackend::paged_write(Queue queue, View key_cache, View value_cache, View k, View v,
                                const RaggedBatch& batch) {
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
  Launch on;
  if (Status status = enter_early(queue, &on, {key_cache, value_cache}); !status.ok()) return status;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(k.shape[0]));
  shape.block = dim3(256);
  const cudaError_t error = with_float_type(k.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    return launch_kernel(on, shape, write_kernel<T>, key_cache.as<T>(), value_cache.as<T>(), k.as<const T>(),
                         v.as<const T>(), ragged_of(batch), static_cast<int>(k.shape[1]),
                         static_cast<int>(k.shape[2]), static_cast<int>(v.shape[2]),
                         static_cast<int>(key_cache.shape[1]), key_cache.shape[0], k.strides[0],
                         v.strides[0]);
  });
  return check(error, "paged_write");
}

size_t CudaBackend::paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                              const RaggedBatch& batch) const {
  if (q.ndim != 3 || key_cache.ndim != 4 || value_cache.ndim != 4 || batch.block_table.ndim != 2) return 0;
  const int64_t value_dim = value_cache.shape[3];
  const size_t general = plan_general(q, key_cache, batch, launch_.multiprocessors).bytes(value_dim);
  // which of the two it will be depends on addresses too
  if (!fits_tensor(launch_, q, key_cache, value_cache, batch)) return general;
  const size_t tensor = plan_tensor(launch_, q, key_cache, value_cache, batch).bytes(value_dim);
  return general > tensor ? general : tensor;
}

Status CudaBackend::paged_attention(Queue queue, View y, View q, View key_cache, View value_cache,
                                    const RaggedBatch& batch, const AttentionOptions& options,
                                    View workspace) {
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
  const View &slopes = options.alibi_slopes, &sinks = options.sinks;
  if (slopes && (slopes.dtype != DType::f32 || slopes.size() != q.shape[1] || !slopes.is_contiguous()))
    return refuse("paged_attention", "alibi_slopes must be contiguous float32 [heads]");
  if (sinks && (!is_float(sinks.dtype) || sinks.size() != q.shape[1] || !sinks.is_contiguous()))
    return refuse("paged_attention", "sinks must be contiguous float [heads]");
  const int64_t dim = q.shape[2], value_dim = value_cache.shape[3];
  if (dim > 512 || value_dim > 512)
    return Status::error(Code::unsupported, "paged_attention: head_dim above 512");
  AttentionLaunch a{};
  Attention& p = a.problem;
  p.sinks = sinks ? sinks.data : nullptr;
  p.sinks_dtype = sinks ? sinks.dtype : DType::f32;
  p.alibi = slopes ? slopes.as<const float>() : nullptr;
  p.heads = static_cast<int>(q.shape[1]);
  p.kv_heads = static_cast<int>(key_cache.shape[2]);
  p.dim = static_cast<int>(dim);
  p.value_dim = static_cast<int>(value_dim);
  p.block_len = static_cast<int>(key_cache.shape[1]);
  p.tokens = q.shape[0];
  p.blocks = key_cache.shape[0];
  p.q_stride = q.strides[0];
  p.window = options.window;
  p.scale = options.scale;
  p.softcap = options.softcap;
  p.causal = options.causal;
  a.batch = ragged_of(batch);
  a.y = y.data;
  a.q = q.data;
  a.keys = key_cache.data;
  a.values = value_cache.data;
  const int64_t piece = 16 / size_of(q.dtype), widest = dim > value_dim ? dim : value_dim;
  const bool wide = dim % piece == 0 && value_dim % piece == 0 && p.q_stride % piece == 0 &&
                    is_aligned(q.data, 16) && is_aligned(y.data, 16) && is_aligned(key_cache.data, 16) &&
                    is_aligned(value_cache.data, 16);
  const Plan plan = wide && fits_tensor(launch_, q, key_cache, value_cache, batch)
                        ? plan_tensor(launch_, q, key_cache, value_cache, batch)
                        : plan_general(q, key_cache, batch, launch_.multiprocessors);
  if (plan.general.count > 0 && !takes_general(launch_, q.dtype, widest)) {
    return Status::error(Code::unsupported,
                         "paged_attention: heads of " + std::to_string(widest) +
                             " elements need more shared memory than the " +
                             std::to_string(launch_.block_shared >> 10) + " KiB of a block on " + name() +
                             ", and the code for sm_" + std::to_string(launch_.code) +
                             " that runs there has no form for less; build it with HALFBYTE_CUDA_ARCHS for "
                             "this GPU");
  }
  if (static_cast<size_t>(workspace.size()) < plan.bytes(value_dim))
    return refuse("paged_attention", "the workspace is too small");
  Launch on;
  if (Status status = enter_early(queue, &on, {y}); !status.ok()) return status;
  const cudaError_t error = with_float_type(q.dtype, [&](auto* t) {
    return launch_plan<std::remove_pointer_t<decltype(t)>>(on, a, plan, wide, workspace.as<char>());
  });
  return check(error, "paged_attention");
}

}  // namespace halfbyte::cuda
