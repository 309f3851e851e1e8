// One float vector type per instruction set: F, of W lanes, with loads from and stores to every float dtype.
// Kernels are written once against it. Included in the per-ISA part of a file (per_isa.h), so it has no
// include guard.
//
//   plain  W = 4, arrays that the compiler may vectorise for the base instruction set
//   avx2   W = 8      avx512  W = 16
//
// All levels give the same result for elementwise work: fma() is fused on every one of them, and nothing else
// is contracted (-ffp-contract=off). Sums differ by their order.

namespace halfbyte::cpu::HALFBYTE_ISA {

using halfbyte::BF16;
using halfbyte::F16;

#if HALFBYTE_ISA_LEVEL == 0

constexpr int W = 4;
struct F {
  float v[W];
};
#define HALFBYTE_EACH(expression)                    \
  F r;                                               \
  for (int i = 0; i < W; ++i) r.v[i] = (expression); \
  return r

static inline F set1(float x) { HALFBYTE_EACH(x); }
static inline F load(const float* p) {
  F r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
static inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
static inline F load(const BF16* p) { HALFBYTE_EACH(bf16_to_float(p[i].bits)); }
static inline F load(const F16* p) { HALFBYTE_EACH(f16_to_float(p[i].bits)); }
static inline void store(BF16* p, F x) {
  for (int i = 0; i < W; ++i) p[i].bits = float_to_bf16(x.v[i]);
}
static inline void store(F16* p, F x) {
  for (int i = 0; i < W; ++i) p[i].bits = float_to_f16(x.v[i]);
}
static inline F add(F a, F b) { HALFBYTE_EACH(a.v[i] + b.v[i]); }
static inline F sub(F a, F b) { HALFBYTE_EACH(a.v[i] - b.v[i]); }
static inline F mul(F a, F b) { HALFBYTE_EACH(a.v[i] * b.v[i]); }
static inline F div(F a, F b) { HALFBYTE_EACH(a.v[i] / b.v[i]); }
/// a * b + c with one rounding.
static inline F fma(F a, F b, F c) { HALFBYTE_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
/// Second operand when either is NaN, as x86 does.
static inline F max(F a, F b) { HALFBYTE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F min(F a, F b) { HALFBYTE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
/// a where it is NaN, else b.
static inline F nan_of(F a, F b) { HALFBYTE_EACH(a.v[i] == a.v[i] ? b.v[i] : a.v[i]); }
static inline F abs(F a) { HALFBYTE_EACH(__builtin_fabsf(a.v[i])); }
static inline F sqrt(F a) { HALFBYTE_EACH(__builtin_sqrtf(a.v[i])); }
static inline F round(F a) { HALFBYTE_EACH(__builtin_rintf(a.v[i])); }
/// 2^n for an integral n in -126 .. 127.
static inline F exp2i(F n) {
  HALFBYTE_EACH(bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23));
}
static inline float reduce_add(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
static inline float reduce_max(F a) {
  float m = a.v[0];
  for (int i = 1; i < W; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
#undef HALFBYTE_EACH

#elif HALFBYTE_ISA_LEVEL == 2

constexpr int W = 8;
using F = __m256;

static inline F set1(float x) { return _mm256_set1_ps(x); }
static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline F load(const BF16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline F load(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(BF16* p, F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline void store(F16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F nan_of(F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
static inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
static inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F exp2i(F n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline float reduce_add(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float reduce_max(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

constexpr int W = 16;
using F = __m512;

static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F load(const BF16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline F load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(BF16* p, F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, quiet)));
}
static inline void store(F16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F nan_of(F a, F b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
static inline F abs(F a) { return _mm512_abs_ps(a); }
static inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
static inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F exp2i(F n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

#endif

static inline F zero() { return set1(0.0f); }

/// The first n < W elements, the rest zero; and back.
template <typename T>
static inline F load_n(const T* p, int64_t n) {
  T buffer[W] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <typename T>
static inline void store_n(T* p, F x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

/// x rounded to T and back.
template <typename T>
static inline F rounded(F x) {
  T buffer[W];
  store(buffer, x);
  return load(buffer);
}
template <>
inline F rounded<float>(F x) {
  return x;
}

/// e^x to about 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-6 polynomial. Below -87.3 it stays
/// at the smallest normal number, above 88.7 it is that range's end; NaN stays NaN.
static inline F exp(F x) {
  const F clamped = max(set1(-87.33654f), min(set1(88.72283f), x));
  const F n = round(mul(clamped, set1(1.44269504f)));
  const F r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), clamped));
  F p = set1(1.3981999e-3f);
  p = fma(p, r, set1(8.3334519e-3f));
  p = fma(p, r, set1(4.1665795e-2f));
  p = fma(p, r, set1(1.6666665e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  // n reaches 128 at the top of the range: two factors keep the exponent field valid
  const F half = round(mul(n, set1(0.5f)));
  return mul(mul(p, exp2i(half)), exp2i(sub(n, half)));
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
