// Rows of a table by id: float tables, 4-bit tables and int8 tables. A block a row; ids outside the table
// give NaN.
#include "weight4.cuh"

namespace halfbyte::cuda {
namespace {

struct Ids {
  const void* data;
  bool wide;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

Ids ids_of(const View& ids) { return {ids.data, ids.dtype == DType::i64}; }

template <typename T, int N>
__global__ void gather_kernel(T* __restrict__ y, const T* __restrict__ table, Ids ids, int64_t count,
                              int64_t rows, int64_t cols) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t id = ids[i];
    const bool known = id >= 0 && id < rows;
    for (int64_t at = threadIdx.x * N; at < cols; at += blockDim.x * N) {
      Vec<T, N> value;
      if (known) {
        value = *reinterpret_cast<const Vec<T, N>*>(table + id * cols + at);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) value.v[j] = from_float<T>(NAN);
      }
      *reinterpret_cast<Vec<T, N>*>(y + i * cols + at) = value;
    }
  }
}

template <typename T>
__global__ void gather_4bit_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes, Absmax absmax,
                                   QuantType type, Ids ids, int64_t count, int64_t rows, int64_t cols,
                                   int64_t blocksize) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t id = ids[i];
    for (int64_t at = threadIdx.x; at < cols; at += blockDim.x) {
      if (id < 0 || id >= rows) {
        y[i * cols + at] = from_float<T>(NAN);
        continue;
      }
      const int64_t element = id * cols + at;
      const uint32_t byte = codes[element / 2];
      const uint32_t code = element % 2 ? byte & 15 : byte >> 4;
      y[i * cols + at] =
          from_float<T>(kCodebooks[static_cast<int>(type)][code] * absmax[element / blocksize]);
    }
  }
}

template <typename T>
__global__ void gather_8bit_kernel(T* __restrict__ y, const int8_t* __restrict__ codes,
                                   const float* __restrict__ scb, Ids ids, int64_t count, int64_t rows,
                                   int64_t cols) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t id = ids[i];
    const bool known = id >= 0 && id < rows;
    const float scale = known ? scb[id] : 0.0f;
    for (int64_t at = threadIdx.x; at < cols; at += blockDim.x) {
      y[i * cols + at] = from_float<T>(known ? codes[id * cols + at] * scale * kInt8Scale : NAN);
    }
  }
}

unsigned threads_for(int64_t cols) {
  const int64_t wanted = (cols + 31) / 32 * 32;
  return static_cast<unsigned>(wanted > 256 ? 256 : wanted < 32 ? 32 : wanted);
}

Status check_gather(const char* op, View y, View ids, int64_t cols) {
  if (ids.dtype != DType::i32 && ids.dtype != DType::i64)
    return refuse_dtype(op, "ids must be int32 or int64");
  if (!is_float(y.dtype)) return refuse_dtype(op, "y must be float");
  if (y.size() != ids.size() * cols || !y.is_contiguous() || !ids.is_contiguous()) {
    return refuse(op, "y must be [ids, columns] and contiguous");
  }
  return {};
}

}  // namespace

Status CudaBackend::gather_rows(Queue queue, View y, View table, View ids) {
  if (Status status = enter(); !status.ok()) return status;
  if (table.ndim != 2 || !table.is_contiguous())
    return refuse("gather_rows", "the table must be [V, D], contiguous");
  const int64_t cols = table.shape[1];
  if (Status status = check_gather("gather_rows", y, ids, cols); !status.ok()) return status;
  if (y.dtype != table.dtype) return refuse_dtype("gather_rows", "y and the table must be of one dtype");
  if (y.size() == 0) return {};
  const unsigned blocks = blocks_for(ids.size(), 1, 1 << 20);
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    constexpr int N = 16 / sizeof(T);
    const bool wide = cols % N == 0 && is_aligned(y.data, 16) && is_aligned(table.data, 16);
    const auto run = [&](auto kernel, int64_t steps) {
      kernel<<<blocks, threads_for(steps), 0, stream(queue)>>>(y.as<T>(), table.as<const T>(), ids_of(ids),
                                                               ids.size(), table.shape[0], cols);
    };
    if (wide)
      run(gather_kernel<T, N>, cols / N);
    else
      run(gather_kernel<T, 1>, cols);
  });
  return check(cudaGetLastError(), "gather_rows");
}

Status CudaBackend::gather_rows_4bit(Queue queue, View y, const Weight4& w, View ids) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_weight4("gather_rows_4bit", w); !status.ok()) return status;
  if (Status status = check_gather("gather_rows_4bit", y, ids, w.k); !status.ok()) return status;
  if (w.layout != Layout4::flat) return refuse("gather_rows_4bit", "the table must be in the flat layout");
  if (y.size() == 0) return {};
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    gather_4bit_kernel<T><<<blocks_for(ids.size(), 1, 1 << 20), threads_for(w.k), 0, stream(queue)>>>(
        y.as<T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, ids_of(ids), ids.size(), w.n, w.k,
        w.blocksize);
  });
  return check(cudaGetLastError(), "gather_rows_4bit");
}

Status CudaBackend::gather_rows_8bit(Queue queue, View y, View codes, View scb, View ids) {
  if (Status status = enter(); !status.ok()) return status;
  if (codes.ndim != 2 || codes.dtype != DType::i8 || !codes.is_contiguous() || scb.dtype != DType::f32 ||
      scb.size() != codes.shape[0]) {
    return refuse("gather_rows_8bit", "codes must be int8 [V, D] and scb float32 [V]");
  }
  if (Status status = check_gather("gather_rows_8bit", y, ids, codes.shape[1]); !status.ok()) return status;
  if (y.size() == 0) return {};
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    gather_8bit_kernel<T>
        <<<blocks_for(ids.size(), 1, 1 << 20), threads_for(codes.shape[1]), 0, stream(queue)>>>(
            y.as<T>(), codes.as<const int8_t>(), scb.as<const float>(), ids_of(ids), ids.size(),
            codes.shape[0], codes.shape[1]);
  });
  return check(cudaGetLastError(), "gather_rows_8bit");
}

}  // namespace halfbyte::cuda
