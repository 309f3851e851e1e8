// What the int8 kernels need beyond simd.h: integers to and from float vectors, and rounding to a float
// dtype. Included in the per-ISA part of a file (per_isa.h) after simd.h, so it has no include guard.

namespace halfbyte::cpu::HALFBYTE_ISA {

/// W signed bytes as floats.
static inline F load_bytes(const int8_t* p) {
#if HALFBYTE_ISA_LEVEL == 512
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif HALFBYTE_ISA_LEVEL == 2
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
#endif
}

/// W int32 as floats, rounded to nearest even.
static inline F load_ints(const int32_t* p) {
#if HALFBYTE_ISA_LEVEL == 512
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(p));
#elif HALFBYTE_ISA_LEVEL == 2
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  int32_t v[W];
  __builtin_memcpy(v, p, sizeof v);
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = static_cast<float>(v[i]);
  return r;
#endif
}

/// W values of -127 .. 127 to bytes, rounded to nearest even.
static inline void store_bytes(int8_t* p, F x) {
#if HALFBYTE_ISA_LEVEL == 512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#elif HALFBYTE_ISA_LEVEL == 2
  const __m256i ints = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  // adding 1.5 * 2^23 leaves the rounded integer in the low bits, whatever its sign
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(float_to_bits(x.v[i] + 12582912.0f) & 0xffu);
#endif
}

/// x where |x| < limit, else 0; NaN gives 0.
static inline F keep_below(F x, F limit) {
#if HALFBYTE_ISA_LEVEL == 512
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), limit, _CMP_LT_OQ), x);
#elif HALFBYTE_ISA_LEVEL == 2
  return _mm256_and_ps(_mm256_cmp_ps(abs(x), limit, _CMP_LT_OQ), x);
#else
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = __builtin_fabsf(x.v[i]) < limit.v[i] ? x.v[i] : 0.0f;
  return r;
#endif
}

/// Bit i is set where |x[i]| >= limit.
static inline uint32_t bits_from(F x, F limit) {
#if HALFBYTE_ISA_LEVEL == 512
  return _mm512_cmp_ps_mask(_mm512_abs_ps(x), limit, _CMP_GE_OQ);
#elif HALFBYTE_ISA_LEVEL == 2
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(abs(x), limit, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(__builtin_fabsf(x.v[i]) >= limit.v[i]) << i;
  return bits;
#endif
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
