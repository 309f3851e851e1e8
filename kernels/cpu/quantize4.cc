// quantize_4bit and dequantize_4bit (formats.h). One block at a time: its largest magnitude, then its codes,
// while it is in the first cache; blocks are spread over the pool.
//
// A code is found by binary search in the thresholds, laid out as a heap: node 1 is the middle one, the
// children of node i are 2i and 2i + 1. Four steps i = 2i + (x > node[i]) end at 16 + code for NF4; three on
// |x| at 8 + rank for FP4. A comparison with NaN is false, so NaN gets code 0, as in bitsandbytes. Scaling is
// by the reciprocal of absmax. A block without any magnitude that a reciprocal can be taken of (all zero, or
// below 2^-126) becomes all zeros.
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

#ifndef HALFBYTE_QUANTIZE4_TABLES
#define HALFBYTE_QUANTIZE4_TABLES
namespace halfbyte::cpu {

/// Thresholds of either type as a heap, and for FP4 the code of each rank.
struct SearchTable {
  alignas(64) float nodes[16];
  alignas(64) int32_t codes[16];
};

/// Writes sorted[0 .. n) with n = 2^depth - 1 in heap order.
inline void fill_heap(const float* sorted, int n, float* nodes) {
  int node = 1;
  for (int width = n + 1; width > 1; width /= 2) {
    for (int i = width / 2 - 1; i < n; i += width) nodes[node++] = sorted[i];
  }
}

inline SearchTable search_table(QuantType type) {
  SearchTable table = {};
  if (type == QuantType::nf4) {
    fill_heap(kNf4Thresholds, 15, table.nodes);
    return table;
  }
  float ascending[7];
  for (int i = 0; i < 7; ++i) {
    ascending[i] = bits_to_float(kFp4ThresholdBits[6 - i]);
    table.codes[i + 1] = kFp4Codes[6 - i];
  }
  fill_heap(ascending, 7, table.nodes);
  for (int i = 0; i < 8; ++i) table.codes[i + 8] = table.codes[i];
  return table;
}

}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "quantize4.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "blocks4.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

#if HALFBYTE_ISA_LEVEL == 512

template <QuantType type>
struct Encoder {
  __m512 nodes;
  __m512i codes;
  explicit Encoder(const SearchTable& t)
      : nodes(_mm512_load_ps(t.nodes)), codes(_mm512_load_si512(t.codes)) {}

  __m128i lanes(__m512 x) const {
    const __m512i one = _mm512_set1_epi32(1);
    const __m512 key = type == QuantType::nf4 ? x : _mm512_abs_ps(x);
    __m512i node = _mm512_mask_mov_epi32(_mm512_set1_epi32(2), above(key, one), _mm512_set1_epi32(3));
    constexpr int steps = type == QuantType::nf4 ? 3 : 2;
    for (int step = 0; step < steps; ++step) {
      const __mmask16 right = above(key, node);
      node = _mm512_add_epi32(node, node);
      node = _mm512_mask_add_epi32(node, right, node, one);
    }
    if constexpr (type == QuantType::fp4) {
      node = _mm512_permutexvar_epi32(node, codes);
      const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
      node = _mm512_mask_or_epi32(node, negative, node, _mm512_set1_epi32(8));
    }
    return _mm512_cvtepi32_epi8(node);
  }
  __mmask16 above(__m512 key, __m512i node) const {
    return _mm512_cmp_ps_mask(key, _mm512_permutexvar_ps(node, nodes), _CMP_GT_OQ);
  }

  /// 32 elements to 16 bytes.
  template <typename T>
  void encode32(uint8_t* out, const T* x, F scale) const {
    const __m256i bytes = _mm256_and_si256(
        _mm256_set_m128i(lanes(mul(load(x + 16), scale)), lanes(mul(load(x), scale))), _mm256_set1_epi8(15));
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi16_epi8(pairs));
  }
};

#elif HALFBYTE_ISA_LEVEL == 2

template <QuantType type>
struct Encoder {
  __m256 upper, lower;
  __m256i codes;
  explicit Encoder(const SearchTable& t)
      : upper(_mm256_load_ps(t.nodes)),
        lower(_mm256_load_ps(t.nodes + 8)),
        codes(_mm256_load_si256(reinterpret_cast<const __m256i*>(t.codes))) {}

  __m256i lanes(__m256 x) const {
    const __m256 key = type == QuantType::nf4 ? x : abs(x);
    __m256i node = _mm256_set1_epi32(1);
    for (int step = 0; step < 3; ++step) node = descend(key, node, upper);
    // the permute takes the low three bits of a node: the fourth level starts at node 8
    if constexpr (type == QuantType::nf4) return descend(key, node, lower);
    node = _mm256_permutevar8x32_epi32(codes, node);
    const __m256 negative = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_or_si256(node, _mm256_and_si256(_mm256_castps_si256(negative), _mm256_set1_epi32(8)));
  }
  static __m256i descend(__m256 key, __m256i node, __m256 nodes) {
    const __m256 right = _mm256_cmp_ps(key, _mm256_permutevar8x32_ps(nodes, node), _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), _mm256_castps_si256(right));
  }

  template <typename T>
  void encode32(uint8_t* out, const T* x, F scale) const {
    const __m256i a = lanes(mul(load(x), scale)), b = lanes(mul(load(x + 8), scale));
    const __m256i c = lanes(mul(load(x + 16), scale)), d = lanes(mul(load(x + 24), scale));
    const __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    const __m256i bytes = _mm256_and_si256(_mm256_packs_epi16(ab, cd), _mm256_set1_epi8(15));
    // in groups of four: a0 b0 c0 d0 | a1 b1 c1 d1
    const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i pairs = _mm256_maddubs_epi16(ordered, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
  }
};

#else

template <QuantType type>
struct Encoder {
  const SearchTable& t;
  explicit Encoder(const SearchTable& table) : t(table) {}

  uint8_t code(float x) const {
    const float key = type == QuantType::nf4 ? x : __builtin_fabsf(x);
    int node = 1;
    constexpr int steps = type == QuantType::nf4 ? 4 : 3;
    for (int step = 0; step < steps; ++step) node = 2 * node + (key > t.nodes[node]);
    if (type == QuantType::nf4) return static_cast<uint8_t>(node & 15);
    return static_cast<uint8_t>(t.codes[node] | (x < 0.0f ? 8 : 0));
  }

  template <typename T>
  void encode32(uint8_t* out, const T* x, F scale) const {
    float scaled[32];
    for (int i = 0; i < 32; i += W) store(scaled + i, mul(load(x + i), scale));
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<uint8_t>(code(scaled[2 * i]) << 4 | code(scaled[2 * i + 1]));
    }
  }
};

#endif

template <typename T>
static float largest_magnitude(const T* x, int64_t n) {
  // max() gives its second operand when one is NaN: NaN does not count
  F most[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int u = 0; u < 4; ++u) most[u] = max(abs(load(x + i + u * W)), most[u]);
  }
  for (; i + W <= n; i += W) most[0] = max(abs(load(x + i)), most[0]);
  if (i < n) most[0] = max(abs(load_n(x + i, n - i)), most[0]);
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

template <typename T, QuantType type>
static void quantize_blocks(uint8_t* codes, float* absmax, const T* x, int64_t n, int64_t blocksize,
                            int64_t first, int64_t last, const SearchTable& table) {
  const Encoder<type> encoder(table);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * blocksize;
    const int64_t count = n - begin < blocksize ? n - begin : blocksize;
    const T* in = x + begin;
    uint8_t* out = codes + begin / 2;
    const float most = largest_magnitude(in, count);
    __builtin_memcpy(absmax + block, &most, sizeof most);
    const F scale = set1(most >= 1.17549435e-38f ? approximate_reciprocal(most) : 0.0f);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) encoder.encode32(out + i / 2, in + i, scale);
    if (i < count) {
      T rest[32] = {};
      uint8_t packed[16];
      __builtin_memcpy(rest, in + i, static_cast<size_t>(count - i) * sizeof(T));
      encoder.encode32(packed, rest, scale);
      __builtin_memcpy(out + i / 2, packed, static_cast<size_t>((count - i + 1) / 2));
    }
  }
}

static void quantize_run(DType dtype, QuantType type, uint8_t* codes, float* absmax, const void* x, int64_t n,
                         int64_t blocksize, int64_t first, int64_t last, const SearchTable& table) {
  with_float_type(dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    const auto run =
        type == QuantType::nf4 ? quantize_blocks<T, QuantType::nf4> : quantize_blocks<T, QuantType::fp4>;
    run(codes, absmax, static_cast<const T*>(x), n, blocksize, first, last, table);
  });
}

static void dequantize_run(DType dtype, void* y, const Weight4& w, int64_t begin, int64_t end) {
  float code[16];
  values_of(w.type, code);
  with_float_type(dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    expand_range(static_cast<T*>(y) + begin, w, code, begin, end);
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {

Status CpuBackend::quantize_4bit(Queue, View codes, View absmax, View x, QuantType type, int64_t blocksize) {
  const int64_t n = x.size();
  if (!is_blocksize(blocksize)) return refuse("quantize_4bit", "blocksize " + std::to_string(blocksize));
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  if (!is_float(x.dtype)) return refuse_dtype("quantize_4bit", "x must be of a float dtype");
  if (codes.dtype != DType::u8 || absmax.dtype != DType::f32) {
    return refuse_dtype("quantize_4bit", "codes must be uint8 and absmax float32");
  }
  if (!x.is_contiguous()) return refuse("quantize_4bit", "x must be contiguous");
  if (codes.size() != (n + 1) / 2 || absmax.size() != blocks) {
    return refuse("quantize_4bit", "codes or absmax do not have the size that x needs");
  }
  const SearchTable table = search_table(type);
  const auto run = HALFBYTE_PICK(quantize_run);
  parallel_for(blocks, 1 + 8192 / blocksize, [&](int64_t first, int64_t last) {
    run(x.dtype, type, codes.as<uint8_t>(), absmax.as<float>(), x.data, n, blocksize, first, last, table);
  });
  return {};
}

Status CpuBackend::dequantize_4bit(Queue, View y, const Weight4& w) {
  if (Status status = check_weight4("dequantize_4bit", w); !status.ok()) return status;
  const int64_t n = w.n * w.k;
  if (!is_float(y.dtype)) return refuse_dtype("dequantize_4bit", "y must be of a float dtype");
  if (y.size() != n || !y.is_contiguous()) return refuse("dequantize_4bit", "y does not hold the weight");
  const auto run = HALFBYTE_PICK(dequantize_run);
  // whole blocks, so that no two threads make the same table
  const int64_t blocks = (n + w.blocksize - 1) / w.blocksize;
  parallel_for(blocks, 1 + 8192 / w.blocksize, [&](int64_t first, int64_t last) {
    const int64_t end = last * w.blocksize;
    run(y.dtype, y.data, w, first * w.blocksize, end < n ? end : n);
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
