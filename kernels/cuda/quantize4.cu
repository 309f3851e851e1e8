// NF4 / FP4 blockwise quantise and dequantise.
//
// Quantise: a warp holds 1024 elements of 16 bits, or 512 of 32, in registers, four 16-byte loads a lane
// (blocks.cuh). A code is found by one look-up and one compare (Steps); look-ups are shuffles, the table
// lives in the lanes of each warp.
// Dequantise: four times 16 bytes out of 4 (16-bit values) or 2 bytes of codes a lane, the codebook in the
// lanes as well. Both move 2 + 0.5 + 4 / blocksize bytes an element of 16 bits and run at the memory's rate.
#include "blocks.cuh"
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

/// The number of thresholds below a value of -1 .. 1 (of magnitudes 0 .. 1 for FP4). Of 31 equal buckets over
/// that range none holds two thresholds: the number is that of the bucket's beginning, plus one where the
/// value is above the threshold inside. The bucket is the rounded product with `width`, taken as the low bits
/// of a float of 2^23 and more; the last entry is that of NaN, whose number is 0.
struct Steps {
  float threshold[32];
  uint32_t below[32];
};

constexpr float kRounder = 8388608.0f;  // 2^23: a float's unit is 1 from here on
template <QuantType type>
constexpr float kWidth = type == QuantType::nf4 ? 15.0f : 28.0f;

constexpr double threshold_of(QuantType type, int i) {
  if (type == QuantType::nf4) return kNf4Thresholds[i];
  const uint32_t bits = kFp4ThresholdBits[6 - i];
  double value = 1.0 + (bits & 0x7fffffu) / 8388608.0;
  for (uint32_t exponent = bits >> 23; exponent < 127; ++exponent) value /= 2;
  return value;
}
template <QuantType type>
constexpr Steps make_steps() {
  constexpr int kCount = type == QuantType::nf4 ? 15 : 7, kFirst = type == QuantType::nf4 ? -15 : 0;
  Steps steps{};
  for (int bucket = 0; bucket < 32; ++bucket) {
    const double begin = (bucket + kFirst - 0.5) / kWidth<type>, end = (bucket + kFirst + 0.5) / kWidth<type>;
    steps.threshold[bucket] = 2.0f;  // above every value
    for (int i = 0; i < kCount && bucket < 31; ++i) {
      const double threshold = threshold_of(type, i);
      // the product's rounding cannot carry a value that lies so far from a bucket's end over it
      if (threshold > begin - 1e-4 && threshold < begin + 1e-4) throw "a threshold at the end of a bucket";
      if (threshold < begin) {
        ++steps.below[bucket];
      } else if (threshold < end) {
        if (steps.threshold[bucket] != 2.0f) throw "two thresholds in a bucket";
        steps.threshold[bucket] = static_cast<float>(threshold);
      }
    }
  }
  return steps;
}
__device__ constexpr Steps kSteps[2] = {make_steps<QuantType::nf4>(), make_steps<QuantType::fp4>()};

/// codes + amount where a > b, as one predicated addition: the compiler would make two instructions of it,
/// and a bf16 weight is quantised at three quarters of the rate at which a multiprocessor issues.
template <int amount>
__device__ __forceinline__ uint32_t add_where_above(uint32_t codes, float a, float b) {
  asm("{\n.reg .pred above;\nsetp.gt.f32 above, %1, %2;\n@above add.u32 %0, %0, %3;\n}\n"
      : "+r"(codes)
      : "f"(a), "f"(b), "n"(amount));
  return codes;
}

/// `codes` and the code of x behind them, in the low four bits. FP4's come as their rank among magnitudes.
template <QuantType type>
__device__ __forceinline__ uint32_t append(uint32_t codes, float x, float threshold, uint32_t below) {
  const float value = type == QuantType::nf4 ? x : fabsf(x);
  const float first = type == QuantType::nf4 ? kRounder + kWidth<type> : kRounder;
  const int bucket = __float_as_int(fmaf(value, kWidth<type>, first));
  codes = codes * 16 + __shfl_sync(0xffffffffu, below, bucket);
  codes = add_where_above<1>(codes, value, __shfl_sync(0xffffffffu, threshold, bucket));
  return type == QuantType::fp4 ? add_where_above<8>(codes, 0.0f, x) : codes;
}

template <typename T, QuantType type>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_kernel(uint8_t* __restrict__ codes, float* __restrict__ absmax, const T* __restrict__ x,
                    int64_t n, int log_blocksize, bool wide) {
  using S = Share<T>;
  const float threshold = kSteps[static_cast<int>(type)].threshold[threadIdx.x % 32];
  const uint32_t below = kSteps[static_cast<int>(type)].below[threadIdx.x % 32];
  const int64_t bytes = (n + 1) / 2;
  S share;
  share.load(x, n, blockIdx.x, wide);
  share.find_absmax(log_blocksize);
  share.store_absmax(absmax, n, blockIdx.x, log_blocksize);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float scale = share.scale(p);
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < S::kEach; ++j)
      packed = append<type>(packed, __fmul_rn(share.value(p, j), scale), threshold, below);
    // rank 2, 3, 6, 7 of the magnitudes are codes 6, 7, 2, 3
    if (type == QuantType::fp4) packed ^= (packed & 0x22222222u) << 1;
    // the first element is in the highest nibble: the bytes turn round
    using Packed = std::conditional_t<S::kEach == 8, uint32_t, uint16_t>;
    const auto turned = static_cast<Packed>(__byte_perm(packed, 0, S::kEach == 8 ? 0x0123 : 0x4401));
    const int64_t to = S::begin(blockIdx.x, p) / 2;
    if (wide && to + static_cast<int64_t>(sizeof(Packed)) <= bytes) {
      *reinterpret_cast<Packed*>(codes + to) = turned;
    } else {
      for (int i = 0; i < S::kEach / 2 && to + i < bytes; ++i)
        codes[to + i] = static_cast<uint8_t>(turned >> (8 * i));
    }
  }
}

/// `wide`: y is aligned to 16 bytes, codes to 4. Every thread block but the last is whole then; any other
/// goes element by element, apart, so that no load or store of a whole one depends on a question.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes, Absmax absmax, QuantType type,
                      int64_t n, int log_blocksize, bool wide) {
  using S = Share<T>;
  using Packed = std::conditional_t<S::kEach == 8, uint32_t, uint16_t>;
  const float* book = kCodebooks[static_cast<int>(type)];
  const int64_t first = blockIdx.x * S::kBlock, end = first + S::kBlock;
  if (!wide || end > n) {
    for (int64_t i = first + threadIdx.x; i < end && i < n; i += kQuantizeThreads) {
      const uint32_t byte = codes[i / 2];
      y[i] = from_float<T>(book[i % 2 ? byte & 15 : byte >> 4] * absmax[i >> log_blocksize]);
    }
    return;
  }
  // lane and code agree in the low 4 bits, so that a code needs no mask
  const float value = book[threadIdx.x % 16];
  uint32_t packed[kPieces];
  float scale[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    packed[p] = *reinterpret_cast<const Packed*>(codes + S::begin(blockIdx.x, p) / 2);
    scale[p] = absmax[S::begin(blockIdx.x, p) >> log_blocksize];
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    Vec<T, S::kEach> out;
#pragma unroll
    for (int j = 0; j < S::kEach; ++j) {
      const uint32_t code = packed[p] >> (j / 2 * 8 + (j % 2 ? 0 : 4));
      out.v[j] = from_float<T>(__shfl_sync(0xffffffffu, value, code) * scale[p]);
    }
    store_vector(y + S::begin(blockIdx.x, p), out);
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
  const bool wide = is_aligned(x.data, 16) && is_aligned(codes.data, 4);
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const auto kernel =
        type == QuantType::nf4 ? quantize_kernel<T, QuantType::nf4> : quantize_kernel<T, QuantType::fp4>;
    kernel<<<blocks_for(n, Share<T>::kBlock, INT32_MAX), kQuantizeThreads, 0, stream(queue)>>>(
        codes.as<uint8_t>(), absmax.as<float>(), x.as<const T>(), n, log2_of(blocksize), wide);
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
  const bool wide = is_aligned(y.data, 16) && is_aligned(w.codes.data, 4);
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    dequantize_kernel<T><<<blocks_for(n, Share<T>::kBlock, INT32_MAX), kQuantizeThreads, 0, stream(queue)>>>(
        y.as<T>(), w.codes.as<const uint8_t>(), absmax_of(w), w.type, n, log2_of(w.blocksize), wide);
  });
  return check(cudaGetLastError(), "dequantize_4bit");
}

}  // namespace halfbyte::cuda
