// NF4 / FP4 blockwise quantise and dequantise.
//
// Quantise: a thread holds 8 consecutive elements (one 16-byte load of a 16-bit type) and makes 4 bytes of
// codes. blocksize / 8 neighbouring threads share a block: up to 256 elements the absmax is a reduction
// inside the warp, above that the thread block (of blocksize / 8 threads) reduces through shared memory.
// Dequantise: 8 elements a thread, 4 bytes of codes in, 16 or 32 bytes out; the codebook is looked up in
// shared memory, 16 entries repeated for each lane so that no two lanes of a warp meet in a bank. Bytes: 2 +
// 0.5 + 4 / blocksize an element for a 16-bit type.
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kPerThread = 8;

__device__ constexpr float kThresholds[15] = {
    kNf4Thresholds[0],  kNf4Thresholds[1],  kNf4Thresholds[2],  kNf4Thresholds[3],  kNf4Thresholds[4],
    kNf4Thresholds[5],  kNf4Thresholds[6],  kNf4Thresholds[7],  kNf4Thresholds[8],  kNf4Thresholds[9],
    kNf4Thresholds[10], kNf4Thresholds[11], kNf4Thresholds[12], kNf4Thresholds[13], kNf4Thresholds[14]};
__device__ constexpr uint32_t kMagnitudeBits[7] = {
    kFp4ThresholdBits[0], kFp4ThresholdBits[1], kFp4ThresholdBits[2], kFp4ThresholdBits[3],
    kFp4ThresholdBits[4], kFp4ThresholdBits[5], kFp4ThresholdBits[6]};
__device__ constexpr uint32_t kMagnitudeCodes[7] = {kFp4Codes[0], kFp4Codes[1], kFp4Codes[2], kFp4Codes[3],
                                                    kFp4Codes[4], kFp4Codes[5], kFp4Codes[6]};

/// NF4 thresholds lie more than 1/16 apart, so of 32 equal buckets over -1 .. 1 none holds two of them: the
/// code is the number of thresholds below the bucket, plus one compare with the threshold inside it. (None
/// lies so close to a bucket's end that the rounding of x * 16 + 16 could matter.) Ties go to the lower code,
/// NaN to 0.
struct Buckets {
  float2 entry[32][32];  // [bucket][lane]: threshold, or +inf; codes below it as bits

  __device__ __forceinline__ void fill() {
    for (int i = threadIdx.x; i < 32 * 32; i += blockDim.x) {
      const float begin = (i / 32 - 16) / 16.0f, end = (i / 32 - 15) / 16.0f;
      float threshold = INFINITY;
      int below = 0;
      for (int t = 0; t < 15; ++t) {
        if (kThresholds[t] < begin)
          ++below;
        else if (kThresholds[t] < end)
          threshold = kThresholds[t];
      }
      entry[i / 32][i % 32] = make_float2(threshold, __int_as_float(below));
    }
  }
  __device__ __forceinline__ uint32_t code(float x, int lane) const {
    const int bucket = min(max(__float2int_rd(fmaf(x, 16.0f, 16.0f)), 0), 31);
    const float2 e = entry[bucket][lane];
    return __float_as_int(e.y) + (x > e.x ? 1 : 0);
  }
};

__device__ __forceinline__ uint32_t fp4_code(float x) {
  const float a = fabsf(x);
  uint32_t code = 0;
#pragma unroll
  for (int i = 6; i >= 0; --i) {
    if (a > __uint_as_float(kMagnitudeBits[i])) code = kMagnitudeCodes[i];
  }
  return code + (x < 0.0f ? 8u : 0u);
}

/// The part-th run of blockDim.x * kPerThread elements.
template <typename T, QuantType type>
__device__ __forceinline__ void quantize_part(uint8_t* codes, float* absmax, const T* x, int64_t n,
                                              int blocksize, bool wide, int64_t part,
                                              const Buckets& buckets) {
  const int64_t begin = (part * blockDim.x + threadIdx.x) * kPerThread;
  float v[kPerThread];
  if (wide && begin + kPerThread <= n) {
    const auto in = *reinterpret_cast<const Vec<T, kPerThread>*>(x + begin);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) v[j] = to_float(in.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) v[j] = begin + j < n ? to_float(x[begin + j]) : 0.0f;
  }
  float most = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) most = fmaxf(most, fabsf(v[j]));
  const int sharers = blocksize / kPerThread;
  if (sharers <= 32) {
    for (int step = sharers / 2; step > 0; step /= 2)
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  } else {
    most = block_max(most);
  }
  if (begin >= n) return;
  if (begin % blocksize == 0) absmax[begin / blocksize] = most;
  // a block of zeros, or of numbers too small to be scaled, has codes of 0.0 (NaN goes to code 0)
  const float scale = most >= 1.17549435e-38f ? reciprocal(most) : 0.0f;
  uint32_t packed = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const float at = v[j] * scale;
    const uint32_t code = type == QuantType::nf4 ? buckets.code(at, threadIdx.x % 32) : fp4_code(at);
    packed |= code << ((j / 2) * 8 + (j % 2 ? 0 : 4));
  }
  const int64_t bytes = (n + 1) / 2, to = begin / 2;
  if (to + 4 <= bytes && is_aligned(codes, 4)) {
    *reinterpret_cast<uint32_t*>(codes + to) = packed;
  } else {
    for (int j = 0; j < 4 && to + j < bytes; ++j) codes[to + j] = static_cast<uint8_t>(packed >> (8 * j));
  }
}

template <typename T, QuantType type>
__global__ void quantize_kernel(uint8_t* __restrict__ codes, float* __restrict__ absmax,
                                const T* __restrict__ x, int64_t n, int blocksize, bool wide) {
  __shared__ Buckets buckets;
  if (type == QuantType::nf4) {
    buckets.fill();
    __syncthreads();
  }
  const int64_t parts = (n + blockDim.x * kPerThread - 1) / (blockDim.x * kPerThread);
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    quantize_part<T, type>(codes, absmax, x, n, blocksize, wide, part, buckets);
  }
}

template <typename T>
__global__ void dequantize_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes, Absmax absmax,
                                  QuantType type, int64_t n, int log_blocksize, bool wide) {
  __shared__ float table[16][32];
  for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x)
    table[i / 32][i % 32] = kCodebooks[static_cast<int>(type)][i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int64_t begin = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kPerThread; begin < n;
       begin += static_cast<int64_t>(gridDim.x) * blockDim.x * kPerThread) {
    const float scale = absmax[begin >> log_blocksize];
    if (wide && begin + kPerThread <= n) {
      const uint32_t packed = *reinterpret_cast<const uint32_t*>(codes + begin / 2);
      Vec<T, kPerThread> out;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        out.v[j] = from_float<T>(table[(packed >> ((j / 2) * 8 + (j % 2 ? 0 : 4))) & 15][lane] * scale);
      }
      *reinterpret_cast<Vec<T, kPerThread>*>(y + begin) = out;
    } else {
      for (int64_t i = begin; i < n && i < begin + kPerThread; ++i) {
        const uint32_t byte = codes[i / 2];
        y[i] = from_float<T>(table[i % 2 ? byte & 15 : byte >> 4][lane] * scale);
      }
    }
  }
}

}  // namespace

Status CudaBackend::quantize_4bit(Queue queue, View codes, View absmax, View x, QuantType type,
                                  int64_t blocksize) {
  if (Status status = enter(); !status.ok()) return status;
  const int64_t n = x.size();
  if (!is_blocksize(blocksize))
    return refuse("quantize_4bit", "blocksize must be a power of two from 32 to 4096");
  if (!is_float(x.dtype) || codes.dtype != DType::u8 || absmax.dtype != DType::f32) {
    return refuse_dtype("quantize_4bit", "x must be float, codes uint8, absmax float32");
  }
  if (codes.size() < (n + 1) / 2 || absmax.size() < (n + blocksize - 1) / blocksize || !x.is_contiguous()) {
    return refuse("quantize_4bit", "codes or absmax are too short for x, or x is not contiguous");
  }
  if (n == 0) return {};
  const int threads = blocksize > 256 ? static_cast<int>(blocksize / kPerThread) : 256;
  const int64_t blocks = (n + threads * int64_t{kPerThread} - 1) / (threads * int64_t{kPerThread});
  const bool wide = is_aligned(x.data, size_of(x.dtype) * kPerThread);
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const auto run = [&](auto kernel) {
      kernel<<<blocks_for(blocks, 1, launch_.multiprocessors * (2048 / threads) * 2), threads, 0,
               stream(queue)>>>(codes.as<uint8_t>(), absmax.as<float>(), x.as<const T>(), n,
                                static_cast<int>(blocksize), wide);
    };
    if (type == QuantType::nf4)
      run(quantize_kernel<T, QuantType::nf4>);
    else
      run(quantize_kernel<T, QuantType::fp4>);
  });
  return check(cudaGetLastError(), "quantize_4bit");
}

Status CudaBackend::dequantize_4bit(Queue queue, View y, const Weight4& w) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_weight4("dequantize_4bit", w); !status.ok()) return status;
  const int64_t n = w.n * w.k;
  if (y.size() != n || !y.is_contiguous())
    return refuse("dequantize_4bit", "y must be contiguous with n * k elements");
  if (!is_float(y.dtype)) return refuse_dtype("dequantize_4bit", "y must be float");
  if (n == 0) return {};
  if (w.layout == Layout4::tiled)
    return check(dequantize_tiled(stream(queue), y, tiled_of(w)), "dequantize_4bit");
  const bool wide = is_aligned(y.data, size_of(y.dtype) * kPerThread) && is_aligned(w.codes.data, 4);
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    dequantize_kernel<T><<<blocks_for(n, 256 * kPerThread * 4), 256, 0, stream(queue)>>>(
        y.as<T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, n, log2_of(w.blocksize), wide);
  });
  return check(cudaGetLastError(), "dequantize_4bit");
}

}  // namespace halfbyte::cuda
