// The LLM.int8() forward: y = int8 product of the quantised rows of x and the weight, scaled, plus the
// outlier columns in x's precision, bias and residual. The steps:
//
//   few rows  one launch that reads the weight at the rate of the memory, int8_gemv.cu; not for bnb_exact and
//             odd K
//   quantise  int8_rows.cu: codes, absmax, and a list of the outlier columns, whose codes are 0; or marks of
//             them alone, where the product multiplies what their codes leave of x
//   multiply  from kFewest rows on, where K and alignment suit the tensor cores: all the rest in one kernel,
//             int8_gemm_sm90.cu, which takes marks, or int8_gemm_sm80.cu
//   else      int32 sums, some rows at a time, and finish_kernel, which scales them and adds the outlier
//             columns: 64 columns x 16 rows of y a block, outlier columns through shared memory 32 at a time.
//             It can round as bitsandbytes does
//
// The count of outlier columns is read on the device only, so a threshold does not change the sequence of
// launches; the list holds up to K columns, so any count is right.
#include <algorithm>

#include "cublaslt.h"
#include "int8_gemv.cuh"
#include "int8_product.cuh"
#include "int8_rows.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kFewest = 5;               // rows of x that the tensor cores are worth
constexpr int64_t kGemv = 8, kGemvLong = 4;  // rows up to which int8_gemv beats int8_gemm_sm90,
constexpr int64_t kLongK = 14336;            // the latter from this K on
constexpr int64_t kMostOutliers32 = 1024;
constexpr int64_t kSumBytes = int64_t{64} << 20;  // of int32 sums at a time
constexpr int kRows = 16, kColumns = 64, kChunk = 32;

bool takes_gemv(const Launch& on, const View& x, int64_t k) {
  const int64_t m = x.rows();
  const bool gemm_is_faster = on.wgmma && x.dtype != DType::f32 && m > (k < kLongK ? kGemv : kGemvLong);
  return int8_gemv_takes(on, m, k) && !gemm_is_faster;
}

/// Tensor cores round sums down at every step: too much for float32 when thousands of outlier columns come.
bool takes_gemm(const Launch& on, const View& x, int64_t k, const void* weight, bool threshold,
                bool bnb_exact) {
  if (bnb_exact || on.arch < 80 || x.rows() < kFewest || k == 0 || k % 16 != 0 || !is_aligned(weight, 16))
    return false;
  return x.dtype != DType::f32 || !threshold || k <= kMostOutliers32;
}

/// Rows whose sums are made at a time.
int64_t sum_rows(int64_t m, int64_t n) {
  constexpr int64_t kMost = int64_t{65535} * kRows / 256 * 256;  // of a grid of finish_kernel
  const int64_t fitting = std::max<int64_t>(kSumBytes / 4 / std::max<int64_t>(n, 1) / 256 * 256, 256);
  return std::min({m, fitting, kMost});
}

/// Where the parts of the workspace start. Outlier columns and sums are never needed together.
struct Parts {
  size_t codes, row_absmax, list, gathered, rest, sums, product, total;
};

Parts parts_of(int64_t m, int64_t n, int64_t k, bool threshold) {
  Parts p{};
  size_t at = 0;
  const auto take = [&](int64_t bytes) {
    const size_t begin = at;
    at += round_up(static_cast<size_t>(bytes));
    return begin;
  };
  p.codes = take(m * k);
  p.row_absmax = take(m * 4);
  p.list = take(threshold ? (k + 1) * 4 : 0);
  p.gathered = take(threshold ? 4 : 0);
  const size_t behind = at;
  p.rest = take(threshold ? m * kRestRounds * kRoundSlots * 2 : 0);
  p.total = at;
  at = behind;
  p.sums = take(sum_rows(m, n) * n * 4);
  p.product = take(m > 8 && has_cublaslt() ? static_cast<int64_t>(kCublasWorkspace) : 0);
  p.total = std::max(p.total, at);
  return p;
}

__device__ __forceinline__ float round_half(float x) { return __half2float(__float2half_rn(x)); }

template <typename T>
__global__ void __launch_bounds__(256)
    finish_kernel(Output<T> out, const int32_t* __restrict__ acc, const T* __restrict__ x,
                  const int8_t* __restrict__ weight, const float* __restrict__ row_absmax,
                  const float* __restrict__ scb, const int32_t* __restrict__ list, int64_t m, int64_t k,
                  bool exact) {
  __shared__ float xs[kRows][kChunk + 1], ws[kColumns][kChunk + 1];
  const int64_t first_row = blockIdx.y * int64_t{kRows}, first_column = blockIdx.x * int64_t{kColumns};
  const int column = threadIdx.x % kColumns, row_group = threadIdx.x / kColumns;  // 4 groups of 4 rows
  const int count = list ? list[0] : 0;
  float outliers[4] = {};
  for (int start = 0; start < count; start += kChunk) {
    const int here = min(kChunk, count - start);
    for (int i = threadIdx.x; i < kColumns * kChunk; i += 256) {
      const int r = i / kChunk, c = i % kChunk;
      float value = 0.0f;
      if (c < here && first_column + r < out.n) {
        value = weight[(first_column + r) * k + list[1 + start + c]] * scb[first_column + r] * kInt8Scale;
        if (exact) value = to_float(from_float<T>(value));
      }
      ws[r][c] = value;
    }
    for (int i = threadIdx.x; i < kRows * kChunk; i += 256) {
      const int r = i / kChunk, c = i % kChunk;
      xs[r][c] =
          c < here && first_row + r < m ? to_float(x[(first_row + r) * k + list[1 + start + c]]) : 0.0f;
    }
    __syncthreads();
    for (int c = 0; c < here; ++c) {
      const float w = ws[column][c];
#pragma unroll
      for (int i = 0; i < 4; ++i) outliers[i] = fmaf(xs[row_group * 4 + i][c], w, outliers[i]);
    }
    __syncthreads();
  }
  const int64_t n = first_column + column;
  if (n >= out.n) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + row_group * 4 + i;
    if (row >= m) continue;
    const float scaled =
        __fmul_rn(__fmul_rn(static_cast<float>(acc[row * out.n + n]), row_absmax[row]), scb[n]);
    if (!exact) {
      out.store(row, n, fmaf(scaled, kInt8ProductScale, outliers[i]));
      continue;
    }
    // bitsandbytes: float16 product, bias inside it only when the bias is float16, then the model's dtype,
    // then outliers
    const bool fused = out.bias && out.bias_dtype == DType::f16;
    float value = round_half(fmaf(scaled, kInt8ProductScale, fused ? out.bias_at(n) : 0.0f));
    if (out.bias && !fused) value = round_half(value + round_half(out.bias_at(n)));
    value = to_float(from_float<T>(value));
    if (count > 0) value = to_float(from_float<T>(value + outliers[i]));
    if (out.residual) value += to_float(out.residual[row * out.n + n]);
    out.y[row * out.n + n] = from_float<T>(value);
  }
}

View part(const View& workspace, size_t at, DType dtype, int64_t size) {
  View v;
  v.data = workspace.as<char>() + at;
  v.dtype = dtype;
  v.ndim = 1;
  v.shape[0] = size;
  v.strides[0] = 1;
  return v;
}

/// What the second step gets.
struct Layer {
  View y, x, weight, scb;
  Epilogue epilogue;
  View codes, row_absmax;
  const int32_t* list;  // null without a threshold, and where there are
  ColumnMarks* marks;   // marks instead
  uint32_t* gathered;   // see Product8
  float threshold;
  int64_t m, n, k;
  bool bnb_exact;
};

template <typename T>
cudaError_t multiply(const Launch& on, const Layer& layer, const Parts& parts, const View& workspace) {
  Product8<T> product = {};
  product.out = output_of<T>(layer.y, layer.epilogue);
  product.a = layer.codes.as<const int8_t>();
  product.b = layer.weight.as<const int8_t>();
  product.row_absmax = layer.row_absmax.as<const float>();
  product.scb = layer.scb.as<const float>();
  product.x = layer.x.as<const T>();
  product.m = layer.m;
  product.k = layer.k;
  product.list = layer.list;
  product.marks = layer.marks;
  product.threshold = layer.threshold;
  if (!on.wgmma) return int8_gemm_sm80(on, product);
  product.gathered = layer.gathered;
  product.rest = reinterpret_cast<typename OutlierType<T>::type*>(workspace.as<char>() + parts.rest);
  return int8_gemm_sm90(on, product);
}

template <typename T>
cudaError_t multiply_and_finish(const Launch& on, const Layer& layer, const Parts& parts,
                                const View& workspace) {
  const int64_t n = layer.n, k = layer.k, most = sum_rows(layer.m, n);
  int32_t* const sums = part(workspace, parts.sums, DType::i32, most * n).as<int32_t>();
  for (int64_t first = 0; first < layer.m; first += most) {
    const int64_t rows = std::min(most, layer.m - first);
    const cudaError_t error =
        int8_product(on, sums, layer.codes.as<const int8_t>() + first * k, layer.weight.as<const int8_t>(),
                     rows, n, k, workspace.as<char>() + parts.product, parts.total - parts.product);
    if (error != cudaSuccess) return error;
    Output<T> out = output_of<T>(layer.y, layer.epilogue);
    out.y += first * n;
    if (out.residual) out.residual += first * n;
    const dim3 grid(static_cast<unsigned>((n + kColumns - 1) / kColumns),
                    static_cast<unsigned>((rows + kRows - 1) / kRows));
    finish_kernel<T><<<grid, 256, 0, on.stream>>>(
        out, sums, layer.x.as<const T>() + first * k, layer.weight.as<const int8_t>(),
        layer.row_absmax.as<const float>() + first, layer.scb.as<const float>(), layer.list, rows, k,
        layer.bnb_exact);
  }
  return cudaGetLastError();
}

}  // namespace

size_t CudaBackend::linear_8bit_workspace(const View& x, const View& weight, float threshold) const {
  if (weight.ndim != 2) return 0;
  return parts_of(x.rows(), weight.shape[0], weight.shape[1], threshold > 0.0f).total;
}

Status CudaBackend::linear_8bit(Queue queue, View y, View x, View weight, View scb, const Epilogue& epilogue,
                                float threshold, bool bnb_exact, View workspace) {
  if (weight.ndim != 2 || weight.dtype != DType::i8 || !weight.is_contiguous() || scb.dtype != DType::f32 ||
      scb.size() != weight.shape[0] || !scb.is_contiguous()) {
    return refuse("linear_8bit", "the weight must be int8 [N, K] with scb float32 [N]");
  }
  const int64_t m = x.rows(), n = weight.shape[0], k = weight.shape[1];
  if (Status status = check_linear("linear_8bit", y, x, n, k, epilogue); !status.ok()) return status;
  if (y.size() == 0) return {};
  Launch on;
  if (!bnb_exact && takes_gemv(launch_, x, k) && is_aligned(x.data, 16) && is_aligned(weight.data, 16)) {
    if (Status status = enter_early(queue, &on, {y}, {weight}); !status.ok()) return status;
    return with_float_type(x.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      const Linear8<T> layer{output_of<T>(y, epilogue),
                             x.as<const T>(),
                             weight.as<const int8_t>(),
                             scb.as<const float>(),
                             m,
                             k,
                             threshold};
      return check(int8_gemv(on, layer), "linear_8bit");
    });
  }
  if (threshold > 0.0f && k > ColumnMarks::kMostColumns) {
    return refuse("linear_8bit", "with a threshold x may have at most " +
                                     std::to_string(ColumnMarks::kMostColumns) + " columns, not " +
                                     std::to_string(k));
  }
  const Parts parts = parts_of(m, n, k, threshold > 0.0f);
  if (static_cast<size_t>(workspace.size()) < parts.total)
    return refuse("linear_8bit", "the workspace is too small");
  if (Status status = enter_early(queue, &on, {y}, {weight}); !status.ok()) return status;

  const bool gemm = takes_gemm(on, x, k, weight.data, threshold > 0.0f, bnb_exact);
  Layer layer = {y,       x,       weight,    scb, epilogue, {}, {},       nullptr,
                 nullptr, nullptr, threshold, m,   n,        k,  bnb_exact};
  layer.codes = part(workspace, parts.codes, DType::i8, m * k);
  layer.row_absmax = part(workspace, parts.row_absmax, DType::f32, m);
  int32_t* list = nullptr;
  if (threshold > 0.0f && gemm && on.wgmma) {
    layer.marks = marks(queue);
    layer.gathered = reinterpret_cast<uint32_t*>(workspace.as<char>() + parts.gathered);
  } else if (threshold > 0.0f) {
    layer.list = list = part(workspace, parts.list, DType::i32, k + 1).as<int32_t>();
  }
  const Int8Rows rows{x.data,
                      x.dtype,
                      m,
                      k,
                      bnb_exact,
                      layer.codes.as<int8_t>(),
                      layer.row_absmax.as<float>(),
                      threshold,
                      marks(queue),
                      list,
                      nullptr,
                      layer.gathered};
  if (Status status = check(int8_rows(on, rows), "linear_8bit"); !status.ok()) return status;
  on.early = on.arch >= 90;  // what the weight is was settled before the first step
  const cudaError_t error = with_float_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return gemm ? multiply<T>(on, layer, parts, workspace)
                : multiply_and_finish<T>(on, layer, parts, workspace);
  });
  if (error != cudaSuccess && layer.marks) forget_marks(on, layer.marks);
  return check(error, "linear_8bit");
}

}  // namespace halfbyte::cuda
