// Rotary embeddings and the positions of a ragged batch. Angles are made as transformers makes them: inv_freq
// times position in fp32, then fp32 cosine and sine.
#include "ragged.cuh"
#include "strided.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void tables_kernel(float* cos_table, float* sin_table, const float* inv_freq, int64_t half,
                              int64_t n, float scale) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const float angle = __fmul_rn(static_cast<float>(i / half), inv_freq[i % half]);
    cos_table[i] = cosf(angle) * scale;
    sin_table[i] = sinf(angle) * scale;
  }
}

__global__ void positions_kernel(int32_t* positions, Ragged batch, int64_t tokens) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (token < tokens) positions[token] = batch.locate(token).position;
}

/// What a thread rotates: N pairs of a head of a token, or (numbers behind those) copies N elements that are
/// not rotated. The positions of a token's pieces are neighbours, so that its angles come from the cache.
struct Turns {
  int64_t x_stride, table_rows, count;
  int heads, dim, half;
  int pairs, rest;  // pieces of a head: with pairs, and without
  Divisor by_head, by_token;
  bool narrow;
};

template <typename T, int N, bool interleaved>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(T* y, const T* x, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                const int32_t* __restrict__ positions, Turns turns) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= turns.count) return;
  const int each = turns.pairs + turns.rest;
  const int64_t row = turns.narrow ? static_cast<int64_t>(turns.by_head.quotient(static_cast<uint32_t>(i)))
                                   : static_cast<int64_t>(turns.by_head.quotient(static_cast<uint64_t>(i)));
  const int64_t token = turns.narrow
                            ? static_cast<int64_t>(turns.by_token.quotient(static_cast<uint32_t>(row)))
                            : static_cast<int64_t>(turns.by_token.quotient(static_cast<uint64_t>(row)));
  const int at = static_cast<int>(i - row * each), head = static_cast<int>(row - token * turns.heads);
  const T* in = x + token * turns.x_stride + static_cast<int64_t>(head) * turns.dim;
  T* out = y + row * turns.dim;
  using V = Vec<T, N>;
  if (at >= turns.pairs) {
    const int from = 2 * turns.half + (at - turns.pairs) * N;
    *reinterpret_cast<V*>(out + from) = *reinterpret_cast<const V*>(in + from);
    return;
  }
  const int pair = at * N;
  const int first = interleaved ? 2 * pair : pair, second = interleaved ? 2 * pair + N : pair + turns.half;
  union {
    V vectors[2];
    T values[2 * N];
  } x2;
  x2.vectors[0] = *reinterpret_cast<const V*>(in + first);
  x2.vectors[1] = *reinterpret_cast<const V*>(in + second);
  const int64_t position = positions[token];
  const bool known = position >= 0 && position < turns.table_rows;
  constexpr int kStep = N < 4 ? N : 4;
#pragma unroll
  for (int k = 0; k < N; k += kStep) {
    Vec<float, kStep> c, s;
    if (known) {
      c = *reinterpret_cast<const Vec<float, kStep>*>(cos_table + position * turns.half + pair + k);
      s = *reinterpret_cast<const Vec<float, kStep>*>(sin_table + position * turns.half + pair + k);
    } else {
#pragma unroll
      for (int j = 0; j < kStep; ++j) c.v[j] = s.v[j] = NAN;
    }
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      T& left = x2.values[interleaved ? 2 * (k + j) : k + j];
      T& right = x2.values[interleaved ? 2 * (k + j) + 1 : N + k + j];
      const float l = to_float(left), r = to_float(right);
      left = from_float<T>(l * c.v[j] - r * s.v[j]);
      right = from_float<T>(r * c.v[j] + l * s.v[j]);
    }
  }
  *reinterpret_cast<V*>(out + first) = x2.vectors[0];
  *reinterpret_cast<V*>(out + second) = x2.vectors[1];
}

}  // namespace

Status CudaBackend::rope_tables(Queue queue, View cos, View sin, View inv_freq, float scale) {
  if (Status status = enter(); !status.ok()) return status;
  if (cos.dtype != DType::f32 || sin.dtype != DType::f32 || inv_freq.dtype != DType::f32) {
    return refuse_dtype("rope_tables", "tables and inv_freq must be float32");
  }
  if (cos.ndim != 2 || cos.shape[1] != inv_freq.size() || sin.size() != cos.size()) {
    return refuse("rope_tables", "tables must be [positions, inv_freq]");
  }
  if (cos.size() == 0) return {};
  tables_kernel<<<blocks_for(cos.size(), 256), 256, 0, stream(queue)>>>(
      cos.as<float>(), sin.as<float>(), inv_freq.as<const float>(), inv_freq.size(), cos.size(), scale);
  return check(cudaGetLastError(), "rope_tables");
}

Status CudaBackend::ragged_positions(Queue queue, View positions, const RaggedBatch& batch) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_ragged("ragged_positions", batch); !status.ok()) return status;
  if (positions.dtype != DType::i32) return refuse_dtype("ragged_positions", "positions must be int32");
  const int64_t tokens = positions.size();
  if (tokens == 0) return {};
  positions_kernel<<<blocks_for(tokens, 256), 256, 0, stream(queue)>>>(positions.as<int32_t>(),
                                                                       ragged_of(batch), tokens);
  return check(cudaGetLastError(), "ragged_positions");
}

Status CudaBackend::rope(Queue queue, View y, View x, View cos, View sin, View positions, bool interleaved) {
  if (Status status = enter(); !status.ok()) return status;
  if (y.ndim != 3 || x.ndim != 3 || y.size() != x.size() || !y.is_contiguous()) {
    return refuse("rope", "x and y must be [tokens, heads, head_dim]");
  }
  const int64_t tokens = x.shape[0], heads = x.shape[1], dim = x.shape[2];
  if (y.dtype != x.dtype || !is_float(x.dtype) || cos.dtype != DType::f32 || sin.dtype != DType::f32 ||
      positions.dtype != DType::i32) {
    return refuse_dtype("rope", "x and y must be of one float dtype, tables float32, positions int32");
  }
  if (cos.ndim != 2 || cos.shape[1] * 2 > dim || sin.size() != cos.size() || positions.size() < tokens) {
    return refuse("rope", "tables or positions do not fit x");
  }
  if (x.size() == 0) return {};
  if ((dim > 1 && x.strides[2] != 1) || (heads > 1 && x.strides[1] != dim)) {
    return refuse("rope", "the heads of x must be contiguous");
  }
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    constexpr int N = 16 / sizeof(T);
    const int64_t half = cos.shape[1], rest = dim - 2 * half;
    const bool wide = half % N == 0 && rest % N == 0 && x.strides[0] % N == 0 && is_aligned(x.data, 16) &&
                      is_aligned(y.data, 16) && is_aligned(cos.data, 16) && is_aligned(sin.data, 16);
    const auto run = [&](auto kernel, int64_t count) {
      const int64_t each = half / count + rest / count;
      const Turns turns{x.strides[0],
                        cos.shape[0],
                        tokens * heads * each,
                        static_cast<int>(heads),
                        static_cast<int>(dim),
                        static_cast<int>(half),
                        static_cast<int>(half / count),
                        static_cast<int>(rest / count),
                        divisor_of(each),
                        divisor_of(heads),
                        tokens * heads * each <= INT32_MAX};
      kernel<<<blocks_for(turns.count, kThreads, INT32_MAX), kThreads, 0, stream(queue)>>>(
          y.as<T>(), x.as<const T>(), cos.as<const float>(), sin.as<const float>(),
          positions.as<const int32_t>(), turns);
    };
    if (interleaved)
      wide ? run(rope_kernel<T, N, true>, N) : run(rope_kernel<T, 1, true>, 1);
    else
      wide ? run(rope_kernel<T, N, false>, N) : run(rope_kernel<T, 1, false>, 1);
  });
  return check(cudaGetLastError(), "rope");
}

}  // namespace halfbyte::cuda
