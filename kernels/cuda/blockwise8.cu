// 8-bit blockwise quantisation with a 256-entry ascending code, and its inverse.
//
// The rule is bitsandbytes': x / absmax is searched from entry 127 in steps 64, 32, ... 1; the final pivot is
// then compared with the midpoint to its neighbour on the side where x lies, strictly, so a tie stays at the
// pivot, which is even. So entry i ends at its midpoint with i + 1, which belongs to the even one of them.
//
// Quantise, blocksizes that are powers of two from 32 to 4096 and many elements: thread blocks that stay, a
// warp's share in registers (blocks.cuh), and one look-up an element in a table over the leading bits of
// x / absmax (Buckets). Any other: a thread block a quantisation block, which is read again from cache after
// its absmax is known, and the search step by step. Dequantise: 16 bytes of values a thread and step.
#include "blocks.cuh"
#include "strided.cuh"
#include "weight4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kMany = 1 << 16;  // elements for which filling the buckets pays
constexpr int kBlocksEach = 4;      // thread blocks that a multiprocessor holds

__device__ __forceinline__ int nearest(const float* code, float x) {
  int pivot = 127, upper = 255, lower = 0;
  float value = code[pivot], above = 1.0f, below = code[0];
#pragma unroll
  for (int step = 64; step > 0; step /= 2) {
    if (x > value) {
      lower = pivot;
      below = value;
      pivot += step;
    } else {
      upper = pivot;
      above = value;
      pivot -= step;
    }
    value = code[pivot];
  }
  if (upper == 255) above = code[255];
  if (lower == 0) below = code[0];
  if (x > value) return x > (above + value) * 0.5f ? upper : pivot;
  return x < (below + value) * 0.5f ? lower : pivot;
}

/// The codes of values of -1 .. 1 by the first 16 bits of the float: sign, exponent, 7 bits of the mantissa.
/// Where a bucket holds no more than one border between two codes, an entry is the code of the bucket's
/// smallest magnitude in the upper half, and in the lower half what makes the upper one the code when the
/// other 16 bits of the value are added (of a negative one: taken away). Magnitudes below 2^-24 share the
/// first bucket, NaN has the last. `fits` is 0 for a map that is too dense for that.
struct Buckets {
  static constexpr int kFirst = 0x3380, kLast = 0x3f80;  // 2^-24, 1 with what rounding adds
  static constexpr int kEachSign = kLast - kFirst + 1;

  uint32_t entry[2 * (kEachSign + 1)];  // of positive values, then of negative ones
  float border[256];
  int fits;

  /// Whether x lies behind the border between codes i and i + 1.
  __device__ __forceinline__ bool passed(int i, float x) const {
    return i % 2 == 0 ? x > border[i] : x >= border[i];
  }
  __device__ __forceinline__ int search(float x) const {
    int low = 0;
    for (int step = 128; step > 0; step /= 2) {
      if (passed(low + step - 1, x)) low += step;
    }
    return low;
  }
  /// The code of x from that of a neighbour.
  __device__ __forceinline__ int walk(int code, float x) const {
    while (code < 255 && passed(code, x)) ++code;
    while (code > 0 && !passed(code - 1, x)) --code;
    return code;
  }

  /// Every thread of the block calls it, and synchronises afterwards.
  __device__ void fill(const float* __restrict__ code) {
    if (threadIdx.x == 0) {
      fits = 1;
      entry[kEachSign] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 255; i += blockDim.x) {
      border[i] = (code[i] + code[i + 1]) * 0.5f;
      if (!(code[i] < code[i + 1])) fits = 0;
    }
    __syncthreads();
    const int run = (kEachSign + blockDim.x / 2 - 1) / (blockDim.x / 2);
    const bool negative = threadIdx.x >= blockDim.x / 2;
    const int begin = threadIdx.x % (blockDim.x / 2) * run, end = min(begin + run, kEachSign);
    const auto value = [&](int at, uint32_t low) {
      return __uint_as_float((negative ? 0x80000000u : 0) | static_cast<uint32_t>(kFirst + at) << 16 | low);
    };
    int last = search(value(begin, 0));
    for (int at = begin; at < end; ++at) {
      const int first = at == 0 ? search(0.0f) : walk(last, value(at, 0));
      last = walk(last, value(at, 0xffff));
      uint32_t most = 0xffff;  // low halves above it are of the next code
      if (last != first) {
        const int crossed = negative ? last : first;
        // the border itself belongs to the even one of its codes
        most = (__float_as_uint(border[crossed]) & 0xffffu) - ((crossed % 2 == 0) == negative ? 1 : 0);
        if (abs(last - first) > 1 || at == 0 || most > 0xffff) fits = 0;
      }
      entry[(negative ? kEachSign + 1 : 0) + at] =
          static_cast<uint32_t>(first) << 16 | (negative ? most : 0xffffu - most);
    }
  }

  /// The code of x is the third byte.
  __device__ __forceinline__ uint32_t find(float x) const {
    const uint32_t bits = __float_as_uint(x), low = bits & 0xffffu;
    const int at = min(max(static_cast<int>(bits & 0x7fffffffu) >> 16, kFirst), kLast + 1) - kFirst;
    const bool negative = x < 0.0f;
    const uint32_t found = entry[negative ? at + kEachSign + 1 : at];
    return negative ? found - low : found + low;
  }
};

/// One of kBlock elements, step by step: for a map that buckets do not fit.
template <typename T>
__device__ __noinline__ void search_share(uint8_t* codes, const Share<T>& share, const float* code, int64_t n,
                                          int64_t block) {
  for (int p = 0; p < kPieces; ++p) {
    const int64_t to = Share<T>::begin(block, p);
    for (int j = 0; j < Share<T>::kEach && to + j < n; ++j) {
      const auto* values = reinterpret_cast<const T*>(&share.pieces[p]);
      codes[to + j] = static_cast<uint8_t>(nearest(code, __fmul_rn(to_float(values[j]), share.scale(p))));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_blocks_kernel(uint8_t* __restrict__ codes, float* __restrict__ absmax, const T* __restrict__ x,
                           const float* __restrict__ code, int64_t n, int log_blocksize, bool wide) {
  using S = Share<T>;
  __shared__ Buckets buckets;
  __shared__ float table[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = code[i];
  buckets.fill(code);
  __syncthreads();
  if (!buckets.fits) {
    for (int64_t block = blockIdx.x; block * S::kBlock < n; block += gridDim.x) {
      S share;
      share.load(x, n, block, wide);
      share.find_absmax(log_blocksize);
      share.store_absmax(absmax, n, block, log_blocksize);
      search_share(codes, share, table, n, block);
    }
    return;
  }
  S share;
  share.load(x, n, blockIdx.x, wide);
  for (int64_t block = blockIdx.x; block * S::kBlock < n; block += gridDim.x) {
    share.find_absmax(log_blocksize);
    share.store_absmax(absmax, n, block, log_blocksize);
    S next;  // under way while the codes of this one are found
    next.load(x, n, block + gridDim.x, wide);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const float scale = share.scale(p);
      Vec<uint32_t, S::kEach / 4> packed;
#pragma unroll
      for (int j = 0; j < S::kEach; j += 4) {
        uint32_t found[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) found[i] = buckets.find(__fmul_rn(share.value(p, j + i), scale));
        packed.v[j / 4] = __byte_perm(__byte_perm(found[0], found[1], 0x0062),
                                      __byte_perm(found[2], found[3], 0x0062), 0x5410);
      }
      const int64_t to = S::begin(block, p);
      if (wide && to + S::kEach <= n) {
        *reinterpret_cast<Vec<uint32_t, S::kEach / 4>*>(codes + to) = packed;
      } else {
#pragma unroll
        for (int j = 0; j < S::kEach; ++j) {
          if (to + j < n) codes[to + j] = static_cast<uint8_t>(packed.v[j / 4] >> (8 * (j % 4)));
        }
      }
    }
    share = next;
  }
}

template <typename T>
__global__ void quantize_kernel(uint8_t* __restrict__ codes, float* __restrict__ absmax,
                                const T* __restrict__ x, const float* __restrict__ code, int64_t n,
                                int64_t blocksize, int64_t blocks) {
  __shared__ float table[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = code[i];
  __syncthreads();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t begin = block * blocksize, end = begin + blocksize < n ? begin + blocksize : n;
    float most = 0.0f;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) most = fmaxf(most, fabsf(to_float(x[i])));
    most = blockDim.x == 32 ? warp_max(most) : block_max(most);
    if (threadIdx.x == 0) absmax[block] = most;
    const float scale = most >= 1.17549435e-38f ? reciprocal(most) : 0.0f;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      codes[i] = static_cast<uint8_t>(nearest(table, to_float(x[i]) * scale));
    }
  }
}

/// `wide`: blocksize is a multiple of 8, y aligned to 16 bytes, codes to 8.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_kernel(T* __restrict__ y, const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                      const float* __restrict__ code, int64_t n, int64_t blocksize, Divisor by_blocksize,
                      bool wide) {
  using S = Share<T>;
  __shared__ float table[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = code[i];
  if (!wide) {
    __syncthreads();
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x)
      y[i] = from_float<T>(table[codes[i]] * absmax[i / blocksize]);
    return;
  }
  Vec<uint8_t, S::kEach> in[kPieces];
  float scale[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int64_t at = S::begin(blockIdx.x, p);
    scale[p] = 0.0f;
    if (at + S::kEach <= n) in[p] = *reinterpret_cast<const Vec<uint8_t, S::kEach>*>(codes + at);
    if (at < n) scale[p] = absmax[by_blocksize.quotient(static_cast<uint64_t>(at))];
  }
  __syncthreads();
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int64_t at = S::begin(blockIdx.x, p);
    if (at + S::kEach <= n) {
      Vec<T, S::kEach> out;
#pragma unroll
      for (int j = 0; j < S::kEach; ++j) out.v[j] = from_float<T>(table[in[p].v[j]] * scale[p]);
      store_vector(y + at, out);
    } else {
      for (int64_t i = at; i < n; ++i) y[i] = from_float<T>(table[codes[i]] * scale[p]);
    }
  }
}

Status check_blockwise(const char* op, View codes, View absmax, View x, View code, int64_t blocksize) {
  const int64_t n = x.size();
  if (blocksize < 1) return refuse(op, "blocksize must be positive");
  if (!is_float(x.dtype) || codes.dtype != DType::u8 || absmax.dtype != DType::f32 ||
      code.dtype != DType::f32) {
    return refuse_dtype(op, "values must be float, codes uint8, absmax and code float32");
  }
  if (codes.size() != n || code.size() != 256 || absmax.size() < (n + blocksize - 1) / blocksize ||
      !x.is_contiguous() || !codes.is_contiguous()) {
    return refuse(op, "codes, absmax and code do not fit the values");
  }
  return {};
}

}  // namespace

Status CudaBackend::quantize_blockwise(Queue queue, View codes, View absmax, View x, View code,
                                       int64_t blocksize) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_blockwise("quantize_blockwise", codes, absmax, x, code, blocksize);
      !status.ok()) {
    return status;
  }
  const int64_t n = x.size();
  if (n == 0) return {};
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  if (is_blocksize(blocksize) && n >= kMany) {
    const bool wide = is_aligned(x.data, 16) && is_aligned(codes.data, 8);
    with_float_type(x.dtype, [&](auto* p) {
      using T = std::remove_pointer_t<decltype(p)>;
      const unsigned resident = launch_.multiprocessors * kBlocksEach;
      quantize_blocks_kernel<T>
          <<<blocks_for(n, Share<T>::kBlock, resident), kQuantizeThreads, 0, stream(queue)>>>(
              codes.as<uint8_t>(), absmax.as<float>(), x.as<const T>(), code.as<const float>(), n,
              log2_of(blocksize), wide);
    });
    return check(cudaGetLastError(), "quantize_blockwise");
  }
  const int threads = blocksize <= 128 ? 32 : blocksize <= 1024 ? 128 : 256;
  with_float_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    quantize_kernel<T><<<blocks_for(blocks, 1, 1 << 16), threads, 0, stream(queue)>>>(
        codes.as<uint8_t>(), absmax.as<float>(), x.as<const T>(), code.as<const float>(), n, blocksize,
        blocks);
  });
  return check(cudaGetLastError(), "quantize_blockwise");
}

Status CudaBackend::dequantize_blockwise(Queue queue, View y, View codes, View absmax, View code,
                                         int64_t blocksize) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_blockwise("dequantize_blockwise", codes, absmax, y, code, blocksize);
      !status.ok()) {
    return status;
  }
  const int64_t n = y.size();
  if (n == 0) return {};
  const bool wide = blocksize % 8 == 0 && is_aligned(y.data, 16) && is_aligned(codes.data, 8);
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    dequantize_kernel<T><<<blocks_for(n, Share<T>::kBlock, INT32_MAX), kQuantizeThreads, 0, stream(queue)>>>(
        y.as<T>(), codes.as<const uint8_t>(), absmax.as<const float>(), code.as<const float>(), n, blocksize,
        divisor_of(blocksize), wide);
  });
  return check(cudaGetLastError(), "dequantize_blockwise");
}

}  // namespace halfbyte::cuda
