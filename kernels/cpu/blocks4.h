// Reading 4-bit blocks (formats.h) in any range of the flattened weight. Included in the per-ISA part of a
// file after simd.h, so it has no include guard. common.h comes before.
//
// A block has 16 possible values: they are made once, rounded to the result's dtype, and each code picks one.
// AVX-512 picks with a permute, AVX2 with byte shuffles (16-bit results) or two permutes (fp32).

namespace halfbyte::cpu::HALFBYTE_ISA {

static inline float float_at(const View& v, int64_t i) {
  float value;
  __builtin_memcpy(&value, v.as<const char>() + i * 4, sizeof value);
  return value;
}

/// The fp32 scale of a block; a nested one is two roundings, as in dequantising it on its own.
static inline float absmax_of(const Weight4& w, int64_t block) {
  if (!w.nested_absmax) return float_at(w.absmax, block);
  const float value = float_at(w.nested_code, w.absmax.as<uint8_t>()[block]);
  const float scale = float_at(w.nested_absmax, block / kNestedBlocksize);
  return value * scale + float_at(w.offset, 0);
}

/// The codebook as kernels multiply with it: FP4's code 8 is a negative zero here.
static inline void values_of(QuantType type, float* values) {
  __builtin_memcpy(values, codebook(type), 16 * sizeof(float));
  if (type == QuantType::fp4) values[8] = -0.0f;
}

/// The 16 values of one block.
template <typename T>
struct BlockTable {
  alignas(64) T values[16];
  BlockTable(const float* code, float absmax) {
    const F scale = set1(absmax);
    for (int i = 0; i < 16; i += W) store(values + i, mul(load(code + i), scale));
  }
};

/// y[0 .. 2 * bytes) from whole bytes of codes.
template <typename T>
static inline void expand_bytes(T* y, const uint8_t* codes, int64_t bytes, const BlockTable<T>& table) {
  int64_t i = 0;
#if HALFBYTE_ISA_LEVEL >= 2
  const __m128i low_half = _mm_set1_epi8(15);
#if HALFBYTE_ISA_LEVEL == 512
  const __m512 single = _mm512_loadu_ps(table.values);
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.values));
  const __m512i pair = _mm512_broadcast_i64x4(entries);
#else
  const __m256 first = _mm256_loadu_ps(reinterpret_cast<const float*>(table.values));
  __m256 second = first;
  __m256i low_bytes = _mm256_setzero_si256(), high_bytes = low_bytes;
  if constexpr (sizeof(T) == 4) {
    second = _mm256_loadu_ps(reinterpret_cast<const float*>(table.values) + 8);
  } else {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.values));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.values + 8));
    const __m128i byte = _mm_set1_epi16(255);
    low_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    high_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
#endif
  for (; i + 16 <= bytes; i += 16) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), low_half);
    const __m128i odd = _mm_and_si128(packed, low_half);
    const __m128i index0 = _mm_unpacklo_epi8(even, odd);
    const __m128i index1 = _mm_unpackhi_epi8(even, odd);
    T* out = y + 2 * i;
#if HALFBYTE_ISA_LEVEL == 512
    if constexpr (sizeof(T) == 4) {
      _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index0), single));
      _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index1), single));
    } else {
      const __m512i index = _mm512_cvtepu8_epi16(_mm256_set_m128i(index1, index0));
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, pair));
    }
#else
    if constexpr (sizeof(T) == 4) {
      const __m128i parts[4] = {index0, _mm_srli_si128(index0, 8), index1, _mm_srli_si128(index1, 8)};
      for (int part = 0; part < 4; ++part) {
        const __m256i index = _mm256_cvtepu8_epi32(parts[part]);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        _mm256_storeu_ps(reinterpret_cast<float*>(out) + 8 * part,
                         _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index),
                                          _mm256_permutevar8x32_ps(second, index), upper));
      }
    } else {
      const __m256i index = _mm256_set_m128i(index1, index0);
      const __m256i low = _mm256_shuffle_epi8(low_bytes, index);
      const __m256i high = _mm256_shuffle_epi8(high_bytes, index);
      const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
#endif
  }
#endif
  for (; i < bytes; ++i) {
    __builtin_memcpy(y + 2 * i, table.values + (codes[i] >> 4), sizeof(T));
    __builtin_memcpy(y + 2 * i + 1, table.values + (codes[i] & 15), sizeof(T));
  }
}

/// y[0 .. end - begin) = elements begin .. end-1 of the flattened weight. `code` comes from values_of().
template <typename T>
static inline void expand_range(T* y, const Weight4& w, const float* code, int64_t begin, int64_t end) {
  const uint8_t* codes = w.codes.as<uint8_t>();
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  for (int64_t at = begin; at < end;) {
    const int64_t block = at >> shift;
    const int64_t block_end = (block + 1) << shift;
    const int64_t stop = block_end < end ? block_end : end;
    const BlockTable<T> table(code, absmax_of(w, block));
    if (at & 1) {
      __builtin_memcpy(y, table.values + (codes[at / 2] & 15), sizeof(T));
      ++y;
      ++at;
    }
    const int64_t bytes = (stop - at) / 2;
    if (bytes > 0) expand_bytes(y, codes + at / 2, bytes, table);
    y += 2 * bytes;
    at += 2 * bytes;
    if (at < stop) {
      __builtin_memcpy(y, table.values + (codes[at / 2] >> 4), sizeof(T));
      ++y;
      ++at;
    }
  }
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
