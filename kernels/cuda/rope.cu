// Rotary embeddings and the positions of a ragged batch. Angles are made as transformers makes them: inv_freq
// times position in fp32, then fp32 cosine and sine.
#include "ragged.cuh"

namespace halfbyte::cuda {
namespace {

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

/// A block a token; a thread a pair.
template <typename T>
__global__ void rope_kernel(T* y, const T* x, const float* cos_table, const float* sin_table,
                            const int32_t* positions, int64_t x_stride, int heads, int dim, int half,
                            int64_t table_rows, bool interleaved) {
  const int64_t token = blockIdx.x;
  const int64_t position = positions[token];
  const bool known = position >= 0 && position < table_rows;
  const int rest = dim - 2 * half;
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    const int head = i / half, pair = i % half;
    const int first = interleaved ? 2 * pair : pair, second = interleaved ? 2 * pair + 1 : pair + half;
    const T* in = x + token * x_stride + head * dim;
    T* out = y + (token * heads + head) * dim;
    const float c = known ? cos_table[position * half + pair] : NAN;
    const float s = known ? sin_table[position * half + pair] : NAN;
    const float a = to_float(in[first]), b = to_float(in[second]);
    out[first] = from_float<T>(a * c - b * s);
    out[second] = from_float<T>(b * c + a * s);
  }
  for (int i = threadIdx.x; i < heads * rest; i += blockDim.x) {
    const int head = i / rest, at = 2 * half + i % rest;
    y[(token * heads + head) * dim + at] = x[token * x_stride + head * dim + at];
  }
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
  const int64_t pairs = heads * dim / 2;
  const unsigned threads = static_cast<unsigned>(pairs >= 256 ? 256
                                                 : pairs < 32 ? 32
                                                              : (pairs + 31) / 32 * 32);
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    rope_kernel<T><<<static_cast<unsigned>(tokens), threads, 0, stream(queue)>>>(
        y.as<T>(), x.as<const T>(), cos.as<const float>(), sin.as<const float>(),
        positions.as<const int32_t>(), x.strides[0], static_cast<int>(heads), static_cast<int>(dim),
        static_cast<int>(cos.shape[1]), cos.shape[0], interleaved);
  });
  return check(cudaGetLastError(), "rope");
}

}  // namespace halfbyte::cuda
