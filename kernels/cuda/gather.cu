// Rows of a table by id: float tables, 4-bit tables and int8 tables. Ids outside the table give NaN.
//
// A result is gone over in pieces of a row, up to 16 bytes, whose place follows from their number alone: any
// length of a row keeps all lanes busy. A thread takes kInFlight of them, loaded before one is stored.
#include "strided.cuh"
#include "weight4.cuh"

namespace halfbyte::cuda {
namespace {

/// The pieces of the result, and which row of the table each comes from.
struct Pieces {
  const void* ids;
  bool wide_ids;
  int64_t count;  // of all rows
  int64_t each;   // of a row
  int64_t rows;   // of the table
  Divisor by_each;
  bool narrow;

  struct Place {
    int64_t id;  // -1: not in the table
    int64_t in_row;
  };
  __device__ __forceinline__ Place operator[](int64_t i) const {
    const int64_t row = narrow ? static_cast<int64_t>(by_each.quotient(static_cast<uint32_t>(i)))
                               : static_cast<int64_t>(by_each.quotient(static_cast<uint64_t>(i)));
    const int64_t id =
        wide_ids ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
    return {id >= 0 && id < rows ? id : -1, i - row * each};
  }
};

Pieces pieces_of(const View& ids, int64_t each, int64_t rows) {
  const int64_t count = ids.size() * each;
  return {ids.data, ids.dtype == DType::i64, count, each, rows, divisor_of(each), count <= INT32_MAX};
}

/// y[i] = the piece that load() finds at a place, or NaN.
template <typename T, int N, typename Load>
__device__ __forceinline__ void gather(T* y, const Pieces& pieces, const Load& load) {
  Vec<T, N> piece[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= pieces.count) break;
    const auto place = pieces[strided_index(i)];
    if (place.id >= 0) {
      piece[i] = load(place.id * pieces.each + place.in_row, place.id);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) piece[i].v[j] = from_float<T>(NAN);
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (strided_index(i) >= pieces.count) break;
    *reinterpret_cast<Vec<T, N>*>(y + strided_index(i) * N) = piece[i];
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kStridedThreads)
    gather_kernel(T* __restrict__ y, const T* __restrict__ table, Pieces pieces) {
  gather<T, N>(y, pieces,
               [&](int64_t at, int64_t) { return *reinterpret_cast<const Vec<T, N>*>(table + at * N); });
}

/// N elements are N / 2 bytes of codes and of one block, or one element.
template <typename T, int N>
__global__ void __launch_bounds__(kStridedThreads)
    gather_4bit_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes, Absmax absmax, QuantType type,
                       int log_blocksize, Pieces pieces) {
  __shared__ float book[16];
  if (threadIdx.x < 16) book[threadIdx.x] = kCodebooks[static_cast<int>(type)][threadIdx.x];
  __syncthreads();
  gather<T, N>(y, pieces, [&](int64_t at, int64_t) {
    const float scale = absmax[at * N >> log_blocksize];
    Vec<T, N> out;
    if constexpr (N == 1) {
      const uint32_t byte = codes[at / 2];
      out.v[0] = from_float<T>(book[at % 2 ? byte & 15 : byte >> 4] * scale);
    } else {
      const auto bytes = *reinterpret_cast<const Vec<uint8_t, N / 2>*>(codes + at * (N / 2));
#pragma unroll
      for (int j = 0; j < N; ++j)
        out.v[j] = from_float<T>(book[j % 2 ? bytes.v[j / 2] & 15 : bytes.v[j / 2] >> 4] * scale);
    }
    return out;
  });
}

template <typename T, int N>
__global__ void __launch_bounds__(kStridedThreads)
    gather_8bit_kernel(T* __restrict__ y, const int8_t* __restrict__ codes, const float* __restrict__ scb,
                       Pieces pieces) {
  gather<T, N>(y, pieces, [&](int64_t at, int64_t id) {
    const float scale = scb[id];
    const auto bytes = *reinterpret_cast<const Vec<int8_t, N>*>(codes + at * N);
    Vec<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = from_float<T>(bytes.v[j] * scale * kInt8Scale);
    return out;
  });
}

unsigned gather_blocks(const Pieces& pieces) {
  return blocks_for(pieces.count, kStridedThreads * kInFlight, INT32_MAX);
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
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    constexpr int N = 16 / sizeof(T);
    const auto fits = [&](int count) {
      return cols % count == 0 && is_aligned(y.data, count * sizeof(T)) &&
             is_aligned(table.data, count * sizeof(T));
    };
    const auto run = [&](auto kernel, int count) {
      const Pieces pieces = pieces_of(ids, cols / count, table.shape[0]);
      kernel<<<gather_blocks(pieces), kStridedThreads, 0, stream(queue)>>>(y.as<T>(), table.as<const T>(),
                                                                           pieces);
    };
    if (fits(N))
      run(gather_kernel<T, N>, N);
    else if (fits(N / 2))
      run(gather_kernel<T, N / 2>, N / 2);
    else
      run(gather_kernel<T, 1>, 1);
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
    constexpr int N = 16 / sizeof(T);
    const auto run = [&](auto kernel, int count) {
      const Pieces pieces = pieces_of(ids, w.k / count, w.n);
      kernel<<<gather_blocks(pieces), kStridedThreads, 0, stream(queue)>>>(
          y.as<T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, log2_of(w.blocksize), pieces);
    };
    if (w.k % N == 0 && is_aligned(y.data, 16) && is_aligned(w.codes.data, N / 2))
      run(gather_4bit_kernel<T, N>, N);
    else
      run(gather_4bit_kernel<T, 1>, 1);
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
    constexpr int N = 16 / sizeof(T);
    const int64_t cols = codes.shape[1];
    const auto run = [&](auto kernel, int count) {
      const Pieces pieces = pieces_of(ids, cols / count, codes.shape[0]);
      kernel<<<gather_blocks(pieces), kStridedThreads, 0, stream(queue)>>>(
          y.as<T>(), codes.as<const int8_t>(), scb.as<const float>(), pieces);
    };
    if (cols % N == 0 && is_aligned(y.data, 16) && is_aligned(codes.data, N))
      run(gather_8bit_kernel<T, N>, N);
    else
      run(gather_8bit_kernel<T, 1>, 1);
  });
  return check(cudaGetLastError(), "gather_rows_8bit");
}

}  // namespace halfbyte::cuda
