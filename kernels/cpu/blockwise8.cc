// 8-bit blockwise: x / absmax of its block, rounded to the nearest entry of an ascending 256-entry code
// (formats.h has the dynamic maps). Any block size; blocks are spread over the pool, and a block longer than
// a piece is one thread's.
//
// The nearest entry, and on ties the one with the even index, as bitsandbytes' search gives it: code(x) is
// the number of bounds b with x > b, where bound j lies halfway between the entries j and j + 1, or just
// below that when j is odd. The 255 bounds are laid out as a heap and searched in eight steps. A comparison
// with NaN is false, so NaN gets code 0. A block without any magnitude that a reciprocal can be taken of
// counts as all zeros.
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#define HALFBYTE_FILE "blockwise8.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

#if HALFBYTE_ISA_LEVEL == 512

/// 16 searches at once, all of the heap in registers.
struct Search {
  __m512 nodes[16];
  explicit Search(const float* heap) {
    for (int i = 0; i < 16; ++i) nodes[i] = _mm512_loadu_ps(heap + 16 * i);
  }

  static __m512i descend(__m512 x, __m512i node, __m512 bound) {
    const __mmask16 right = _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
    node = _mm512_add_epi32(node, node);
    return _mm512_mask_add_epi32(node, right, node, _mm512_set1_epi32(1));
  }

  void codes(uint8_t* out, __m512 x) const {
    __m512i node = _mm512_set1_epi32(1);
    for (int level = 0; level < 4; ++level) node = descend(x, node, _mm512_permutexvar_ps(node, nodes[0]));
    node = descend(x, node, _mm512_permutexvar_ps(node, nodes[1]));
    node = descend(x, node, _mm512_permutex2var_ps(nodes[2], node, nodes[3]));
    {
      // nodes 64 .. 127: bit 5 chooses the pair of registers
      const __mmask16 upper = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
      const __m512 bound = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(nodes[4], node, nodes[5]),
                                                _mm512_permutex2var_ps(nodes[6], node, nodes[7]));
      node = descend(x, node, bound);
    }
    const __mmask16 bit5 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(64));
    const __m512 low = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(nodes[8], node, nodes[9]),
                                            _mm512_permutex2var_ps(nodes[10], node, nodes[11]));
    const __m512 high = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(nodes[12], node, nodes[13]),
                                             _mm512_permutex2var_ps(nodes[14], node, nodes[15]));
    node = descend(x, node, _mm512_mask_blend_ps(bit6, low, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(node));
  }
};

#elif HALFBYTE_ISA_LEVEL == 2

struct Search {
  const float* heap;
  __m256 first, second;
  explicit Search(const float* h) : heap(h), first(_mm256_loadu_ps(h)), second(_mm256_loadu_ps(h + 8)) {}

  static __m256i descend(__m256 x, __m256i node, __m256 bound) {
    const __m256 right = _mm256_cmp_ps(x, bound, _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), _mm256_castps_si256(right));
  }

  void codes(uint8_t* out, __m256 x) const {
    __m256i node = _mm256_set1_epi32(1);
    for (int level = 0; level < 3; ++level) node = descend(x, node, _mm256_permutevar8x32_ps(first, node));
    node = descend(x, node, _mm256_permutevar8x32_ps(second, node));
    for (int level = 4; level < 8; ++level) node = descend(x, node, _mm256_i32gather_ps(heap, node, 4));
    const __m256i bytes = _mm256_and_si256(node, _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
  }
};

#else

struct Search {
  const float* heap;
  explicit Search(const float* h) : heap(h) {}

  void codes(uint8_t* out, F x) const {
    for (int i = 0; i < W; ++i) {
      int node = 1;
      for (int level = 0; level < 8; ++level) node = 2 * node + (x.v[i] > heap[node]);
      out[i] = static_cast<uint8_t>(node);
    }
  }
};

#endif

template <typename T>
static float largest_magnitude(const T* x, int64_t n) {
  F most = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) most = max(abs(load(x + i)), most);
  if (i < n) most = max(abs(load_n(x + i, n - i)), most);
  return reduce_max(most);
}

template <typename T>
static void quantize_blocks(uint8_t* codes, float* absmax, const T* x, int64_t n, int64_t blocksize,
                            int64_t first, int64_t last, const float* heap) {
  const Search search(heap);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * blocksize;
    const int64_t count = n - begin < blocksize ? n - begin : blocksize;
    const float most = largest_magnitude(x + begin, count);
    __builtin_memcpy(absmax + block, &most, sizeof most);
    const F scale = set1(most >= 1.17549435e-38f ? approximate_reciprocal(most) : 0.0f);
    int64_t i = 0;
    for (; i + W <= count; i += W) search.codes(codes + begin + i, mul(load(x + begin + i), scale));
    if (i < count) {
      uint8_t rest[W];
      search.codes(rest, mul(load_n(x + begin + i, count - i), scale));
      __builtin_memcpy(codes + begin + i, rest, static_cast<size_t>(count - i));
    }
  }
}

static void quantize_run(DType dtype, uint8_t* codes, float* absmax, const void* x, int64_t n,
                         int64_t blocksize, int64_t first, int64_t last, const float* heap) {
  with_float_type(dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    quantize_blocks(codes, absmax, static_cast<const T*>(x), n, blocksize, first, last, heap);
  });
}

static inline F pick(const float* code, const uint8_t* codes) {
#if HALFBYTE_ISA_LEVEL == 512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), code, 4);
#elif HALFBYTE_ISA_LEVEL == 2
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_i32gather_ps(code, _mm256_cvtepu8_epi32(bytes), 4);
#else
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = code[codes[i]];
  return r;
#endif
}

template <typename T>
static void dequantize_range(T* y, const uint8_t* codes, const float* absmax, const float* code,
                             int64_t blocksize, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t block = at / blocksize;
    const int64_t block_end = (block + 1) * blocksize;
    const int64_t stop = block_end < end ? block_end : end;
    float value;
    __builtin_memcpy(&value, absmax + block, sizeof value);
    const F scale = set1(value);
    for (; at + W <= stop; at += W) store(y + at, mul(pick(code, codes + at), scale));
    if (at < stop) {
      uint8_t rest[W] = {};
      __builtin_memcpy(rest, codes + at, static_cast<size_t>(stop - at));
      store_n(y + at, mul(pick(code, rest), scale), stop - at);
      at = stop;
    }
  }
}

static void dequantize_run(DType dtype, void* y, const uint8_t* codes, const float* absmax, const float* code,
                           int64_t blocksize, int64_t begin, int64_t end) {
  with_float_type(dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    dequantize_range(static_cast<T*>(y), codes, absmax, code, blocksize, begin, end);
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

/// The 255 bounds between the entries as a heap: node 1 is the middle one, the children of node i are 2i and
/// 2i + 1.
void fill_bounds(const float* code, float* heap) {
  int node = 1;
  for (int width = 256; width > 1; width /= 2) {
    for (int j = width / 2 - 1; j < 255; j += width) {
      const float middle = (code[j] + code[j + 1]) * 0.5f;
      heap[node++] = j % 2 == 0 ? middle : std::nextafter(middle, -INFINITY);
    }
  }
}

Status check(const char* op, const View& values, const View& codes, const View& absmax, const View& code,
             int64_t blocksize) {
  if (blocksize < 1) return refuse(op, "blocksize " + std::to_string(blocksize));
  if (!is_float(values.dtype) || codes.dtype != DType::u8 || absmax.dtype != DType::f32 ||
      code.dtype != DType::f32) {
    return refuse_dtype(op, "values must be float, codes uint8, absmax and code float32");
  }
  const int64_t n = values.size();
  if (codes.size() != n || absmax.size() != (n + blocksize - 1) / blocksize || code.size() != 256) {
    return refuse(op, "codes, absmax or code do not have the size that the values need");
  }
  for (const View* v : {&values, &codes, &absmax, &code}) {
    if (!v->is_contiguous()) return refuse(op, "operands must be contiguous");
  }
  return {};
}

}  // namespace

Status CpuBackend::quantize_blockwise(Queue, View codes, View absmax, View x, View code, int64_t blocksize) {
  if (Status status = check("quantize_blockwise", x, codes, absmax, code, blocksize); !status.ok())
    return status;
  float entries[256];
  alignas(64) float heap[256] = {};
  std::memcpy(entries, code.data, sizeof entries);
  fill_bounds(entries, heap);
  const int64_t n = x.size();
  const auto run = HALFBYTE_PICK(quantize_run);
  parallel_for((n + blocksize - 1) / blocksize, 1 + 4096 / blocksize, [&](int64_t first, int64_t last) {
    run(x.dtype, codes.as<uint8_t>(), absmax.as<float>(), x.data, n, blocksize, first, last, heap);
  });
  return {};
}

Status CpuBackend::dequantize_blockwise(Queue, View y, View codes, View absmax, View code,
                                        int64_t blocksize) {
  if (Status status = check("dequantize_blockwise", y, codes, absmax, code, blocksize); !status.ok())
    return status;
  float entries[256];
  std::memcpy(entries, code.data, sizeof entries);
  const auto run = HALFBYTE_PICK(dequantize_run);
  parallel_for(y.size(), 8192, [&](int64_t begin, int64_t end) {
    run(y.dtype, y.data, codes.as<uint8_t>(), absmax.as<float>(), entries, blocksize, begin, end);
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
