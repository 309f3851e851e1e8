// y = x W^T + bias + residual with a 4-bit weight in bitsandbytes' layout as it is.
//
//   M <= kMostVectors   weight-streaming kernels: codes and absmax are read once for up to 8 rows of x.
//                       `stream_kernel` where a lane's 8 codes lie in one block and a row on whole words (K %
//                       32 = 0); `element_kernel` for every other K.
//   larger M            the weight is dequantised to x's dtype in the workspace, then the dense product runs.
//
// stream_kernel   a warp makes kRows outputs; a lane holds 8 consecutive k (4 bytes of codes a row), a warp
// 256, and
//                 kSteps such runs are loaded ahead. The codebook sits in shared memory once per lane, so a
//                 look-up never meets another in a bank. Products of a run are summed before absmax scales
//                 them: fp32 throughout, exact for every dtype.
#include "output.cuh"
#include "weight4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 4;          // weight rows a warp works on at once, sharing the loads of x
constexpr int kMostVectors = 16;  // rows of x up to which streaming beats dequantising

template <typename T, int M>
__global__ void __launch_bounds__(kWarps * 32)
    stream_kernel(Output<T> out, const T* __restrict__ x, const uint8_t* __restrict__ codes, Absmax absmax,
                  QuantType type, int64_t k, int64_t rows_of_x, int log_blocksize) {
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t first_row = (blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32) * kRows;
  const int64_t first_x = blockIdx.y * static_cast<int64_t>(M);
  if (first_row >= out.n) return;
  constexpr int kSteps = 4;
  float acc[kRows][M] = {};
  for (int64_t start = lane * 8; start < k; start += 256 * kSteps) {
    uint32_t packed[kSteps][kRows];
    float scale[kSteps][kRows];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t at = start + s * 256;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t element = (first_row + r < out.n ? first_row + r : out.n - 1) * k + at;
        packed[s][r] = at < k ? *reinterpret_cast<const uint32_t*>(codes + element / 2) : 0;
        scale[s][r] = at < k ? absmax[element >> log_blocksize] : 0.0f;
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t at = start + s * 256;
      if (at >= k) break;
      float part[kRows][M] = {};
      Vec<T, 8> in[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int64_t row = first_x + m < rows_of_x ? first_x + m : rows_of_x - 1;
        in[m] = *reinterpret_cast<const Vec<T, 8>*>(x + row * k + at);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = table[(packed[s][r] >> ((i / 2) * 8 + (i % 2 ? 0 : 4))) & 15][lane];
#pragma unroll
          for (int m = 0; m < M; ++m) part[r][m] = fmaf(value, to_float(in[m].v[i]), part[r][m]);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) acc[r][m] = fmaf(part[r][m], scale[s][r], acc[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float total = warp_sum(acc[r][m]);
      if (lane == 0 && first_row + r < out.n && first_x + m < rows_of_x)
        out.store(first_x + m, first_row + r, total);
    }
  }
}

/// Any K: rows may start in the middle of a byte or a block. A warp makes one output element.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    element_kernel(Output<T> out, const T* __restrict__ x, const uint8_t* __restrict__ codes, Absmax absmax,
                   QuantType type, int64_t k, int log_blocksize) {
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32, m = blockIdx.y;
  if (row >= out.n) return;
  float acc = 0.0f;
  for (int64_t at = lane; at < k; at += 32) {
    const int64_t element = row * k + at;
    const uint32_t byte = codes[element / 2];
    const float value = table[element % 2 ? byte & 15 : byte >> 4][lane] * absmax[element >> log_blocksize];
    acc = fmaf(value, to_float(x[m * k + at]), acc);
  }
  const float total = warp_sum(acc);
  if (lane == 0) out.store(m, row, total);
}

View dense_view(const Weight4& w, DType dtype, void* data) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = 2;
  v.shape[0] = w.n;
  v.shape[1] = v.strides[0] = w.k;
  v.strides[1] = 1;
  return v;
}

}  // namespace

size_t CudaBackend::linear_4bit_workspace(const View& x, const Weight4& w) const {
  if (x.rows() <= kMostVectors) return 0;
  const View dense = dense_view(w, x.dtype, nullptr);
  return round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype))) + linear_workspace(x, dense);
}

Status CudaBackend::linear_4bit(Queue queue, View y, View x, const Weight4& w, const Epilogue& epilogue,
                                View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_weight4("linear_4bit", w); !status.ok()) return status;
  const int64_t rows = x.rows();
  if (Status status = check_linear("linear_4bit", y, x, w.n, w.k, epilogue); !status.ok()) return status;
  if (y.size() == 0) return {};
  if (rows > kMostVectors && w.k > 0) {
    const View dense = dense_view(w, x.dtype, workspace.data);
    const size_t used = round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype)));
    if (static_cast<size_t>(workspace.size()) < linear_4bit_workspace(x, w)) {
      return refuse("linear_4bit", "the workspace is too small");
    }
    if (Status status = dequantize_4bit(queue, dense, w); !status.ok()) return status;
    View rest = workspace;
    rest.data = workspace.as<char>() + used;
    rest.shape[0] -= static_cast<int64_t>(used);
    return linear(queue, y, x, dense, epilogue, rest);
  }
  const int log_blocksize = log2_of(w.blocksize);
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const Output<T> out = output_of<T>(y, epilogue);
    const auto stream_rows = [&](auto kernel, int64_t m) {
      const dim3 grid(blocks_for(w.n, kWarps * kRows, INT32_MAX), static_cast<unsigned>((rows + m - 1) / m));
      kernel<<<grid, kWarps * 32, 0, stream(queue)>>>(out, x.as<const T>(), w.codes.as<const uint8_t>(),
                                                      absmax_of(w), w.type, w.k, rows, log_blocksize);
    };
    if (w.k % 32 == 0 && w.k > 0 && is_aligned(w.codes.data, 4) && is_aligned(x.data, 32)) {
      if (rows == 1)
        stream_rows(stream_kernel<T, 1>, 1);
      else if (rows == 2)
        stream_rows(stream_kernel<T, 2>, 2);
      else if (rows <= 4)
        stream_rows(stream_kernel<T, 4>, 4);
      else
        stream_rows(stream_kernel<T, 8>, 8);
    } else {
      const dim3 grid(blocks_for(w.n, kWarps, INT32_MAX), static_cast<unsigned>(rows));
      element_kernel<T><<<grid, kWarps * 32, 0, stream(queue)>>>(
          out, x.as<const T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, w.k, log_blocksize);
    }
  });
  return check(cudaGetLastError(), "linear_4bit");
}

}  // namespace halfbyte::cuda
