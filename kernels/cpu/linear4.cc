// Linear with a 4-bit weight in bitsandbytes' layout as it is: y [M, N] = x [M, K] w [N, K]^T + bias +
// residual. Codes become exactly the codebook's floats, sums are fp32, absmax multiplies the sum of its block
// (or the weight).
//
// The cost is the decoding, so a code is turned into a float with as few instructions as the instruction set
// allows, in whatever order of k comes out, and x is put into that order once per call:
//   avx512  64 bytes are 16 words of 8 codes; word >> 4 j is a permute index as it is (it reads 4 bits): a
//   shift and a
//           permute for 16 weights. Group 128: packed[16 j + i] is element 8 i + (j ^ 1).
//   avx2    a byte shuffle looks 32 codes up in a table of 16 bytes, one table for each of the four bytes of
//   a float;
//           interleaving the four results gives 32 floats with 12 shuffles. Group 64: the low codes of 32
//           bytes, then the high ones, each in the order the interleaving leaves.
// These need K % 64 == 0. Any other K, and the plain path, decode in natural order.
//
// Up to 8 rows of x ("few") codes are decoded in registers and multiplied there, one pass over the weight;
// more rows go through the blocked product of gemm_tile.h.
#include <cstddef>
#include <cstdint>

#include "cpu_backend.h"
#include "linear_args.h"
#include "pool.h"

#ifndef HALFBYTE_PACKED_WEIGHT
#define HALFBYTE_PACKED_WEIGHT
namespace halfbyte::cpu {
struct PackedWeight {
  const uint8_t* codes;
  const char* absmax;       // float32, or uint8 when nested
  const char* nested;       // float32 per 256 blocks, or null
  const char* nested_code;  // float32 [256]
  float offset;
  const float* book;  // 16 entries
  int shift;          // log2(blocksize)
  int64_t k;

  static float at(const char* p, int64_t i) {
    float f;
    __builtin_memcpy(&f, p + i * 4, 4);
    return f;
  }
  float scale(int64_t block) const {
    if (!nested) return at(absmax, block);
    return at(nested_code, static_cast<uint8_t>(absmax[block])) * at(nested, block / kNestedBlocksize) +
           offset;
  }
};
}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "linear4.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "gemm_tile.h"

namespace halfbyte::cpu::HALFBYTE_ISA {
namespace {

// ---- natural order: any K, any start

#if HALFBYTE_ISA_LEVEL == 512
constexpr int kRun = 16;
struct Book {
  __m512 values;
  explicit Book(const float* book) : values(_mm512_loadu_ps(book)) {}
  F decode(const uint8_t* codes) const {
    const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i by = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(which, words), by), values);
  }
};
#elif HALFBYTE_ISA_LEVEL == 2
constexpr int kRun = 8;
struct Book {
  __m256 low, high;
  explicit Book(const float* book) : low(_mm256_loadu_ps(book)), high(_mm256_loadu_ps(book + 8)) {}
  F decode(const uint8_t* codes) const {
    int32_t word;
    __builtin_memcpy(&word, codes, 4);
    const __m256i by = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), by);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};
#else
constexpr int kRun = 4;
struct Book {
  const float* values;
  explicit Book(const float* book) : values(book) {}
  F decode(const uint8_t* codes) const {
    return F{{values[codes[0] >> 4], values[codes[0] & 15], values[codes[1] >> 4], values[codes[1] & 15]}};
  }
};
#endif

/// out[0 .. count) = the weights from `element` of the flattened tensor on.
void decode_natural(const PackedWeight& w, int64_t element, int64_t count, float* out) {
  const Book book(w.book);
  const int64_t blocksize = int64_t{1} << w.shift;
  while (count > 0) {
    int64_t run = blocksize - (element & (blocksize - 1));
    if (run > count) run = count;
    const float scale = w.scale(element >> w.shift);
    count -= run;
    const auto one = [&] {
      const uint8_t pair = w.codes[element >> 1];
      *out++ = w.book[element & 1 ? pair & 15 : pair >> 4] * scale;
      ++element;
      --run;
    };
    if (run > 0 && (element & 1)) one();
    for (; run >= kRun; run -= kRun, element += kRun, out += kRun)
      store(out, mul(book.decode(w.codes + (element >> 1)), set1(scale)));
    while (run > 0) one();
  }
}

struct NaturalRows {
  const PackedWeight& w;
  void decode(int64_t n, int64_t k, int64_t count, float* out) const {
    decode_natural(w, n * w.k + k, count, out);
  }
  void ahead(int64_t n, int64_t k, int64_t count, Ahead* list) const {
    list->add(w.codes + ((n * w.k + k) >> 1), count / 2);
  }
};

template <int MB>
void few_natural_of(const LinearArgs& a, const PackedWeight& w, const float* x, int64_t begin, int64_t end) {
  constexpr int64_t piece = 1024;
  alignas(64) float decoded[piece];
  for (int64_t n = begin; n < end; ++n) {
    F acc[MB];
    for (int m = 0; m < MB; ++m) acc[m] = zero();
    for (int64_t k = 0; k < a.k; k += piece) {
      const int64_t count = a.k - k < piece ? a.k - k : piece;
      decode_natural(w, n * a.k + k, count, decoded);
      dot_rows<float, MB>(decoded, x + k, a.k, count, acc);
    }
    for (int m = 0; m < MB; ++m) finish_one(a, m, n, reduce_add(acc[m]));
  }
}

// ---- decoding order: K % 64 == 0

#if HALFBYTE_ISA_LEVEL == 512
constexpr int kGroup = 128;
constexpr int kMostFew = 8;
constexpr int kVectors = 8;

struct Decoder {
  __m512 values;
  explicit Decoder(const float* book) : values(_mm512_loadu_ps(book)) {}
  /// The eight vectors of a group, one after the other, to use(j, vector).
  template <typename Use>
  inline __attribute__((always_inline)) void each(const uint8_t* codes, const Use& use) const {
    const __m512i words = _mm512_loadu_si512(codes);
    use(0, _mm512_permutexvar_ps(words, values));
    use(1, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), values));
    use(2, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 8), values));
    use(3, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 12), values));
    use(4, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 16), values));
    use(5, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 20), values));
    use(6, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 24), values));
    use(7, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 28), values));
  }
  /// The same of two rows at a time, to use(j, vector, vector).
  template <typename Use>
  inline __attribute__((always_inline)) void both(const uint8_t* codes, const uint8_t* codes2,
                                                  const Use& use) const {
    const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes2);
    const auto step = [&](int j, __m512i a, __m512i b) __attribute__((always_inline)) {
      use(j, _mm512_permutexvar_ps(a, values), _mm512_permutexvar_ps(b, values));
    };
    step(0, a, b);
    step(1, _mm512_srli_epi32(a, 4), _mm512_srli_epi32(b, 4));
    step(2, _mm512_srli_epi32(a, 8), _mm512_srli_epi32(b, 8));
    step(3, _mm512_srli_epi32(a, 12), _mm512_srli_epi32(b, 12));
    step(4, _mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
    step(5, _mm512_srli_epi32(a, 20), _mm512_srli_epi32(b, 20));
    step(6, _mm512_srli_epi32(a, 24), _mm512_srli_epi32(b, 24));
    step(7, _mm512_srli_epi32(a, 28), _mm512_srli_epi32(b, 28));
  }
};
inline int column_of(int p) { return 8 * (p % 16) + ((p / 16) ^ 1); }

/// absmax of each lane of a group: two blocks of 64, or four of 32.
template <bool B32>
inline F lane_scales(const float* s) {
  if (B32) {
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(s)));
  }
  const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(s));
  return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
}

#elif HALFBYTE_ISA_LEVEL == 2
constexpr int kGroup = 64;
constexpr int kMostFew = 8;
constexpr int kVectors = 8;

struct Decoder {
  __m256i plane[4];  // byte b of the 16 floats
  explicit Decoder(const float* book) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = float_to_bits(book[i]);
      for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
    for (int b = 0; b < 4; ++b)
      plane[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b])));
  }
  template <typename Use>
  inline __attribute__((always_inline)) void half(__m256i index, int first, const Use& use) const {
    const __m256i b0 = _mm256_shuffle_epi8(plane[0], index), b1 = _mm256_shuffle_epi8(plane[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(plane[2], index), b3 = _mm256_shuffle_epi8(plane[3], index);
    const __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
    use(first, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)));
    use(first + 1, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)));
    const __m256i low2 = _mm256_unpackhi_epi8(b0, b1), high2 = _mm256_unpackhi_epi8(b2, b3);
    use(first + 2, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low2, high2)));
    use(first + 3, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low2, high2)));
  }
  template <typename Use>
  inline __attribute__((always_inline)) void each(const uint8_t* codes, const Use& use) const {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i low = _mm256_set1_epi8(15);
    half(_mm256_and_si256(pairs, low), 0, use);
    half(_mm256_and_si256(_mm256_srli_epi16(pairs, 4), low), 4, use);
  }
};
inline int column_of(int p) {
  const int vector = p / 8 % 4, lane = p % 8;
  const int byte = 16 * (lane / 4) + 4 * vector + lane % 4;
  return 2 * byte + (p < 32 ? 1 : 0);
}
template <bool B32>
inline F lane_scales(const float* s) {
  if (B32) return _mm256_set_m128(_mm_set1_ps(s[1]), _mm_set1_ps(s[0]));
  return _mm256_set1_ps(s[0]);
}
#endif

#if HALFBYTE_ISA_LEVEL > 0

/// absmax of `count` runs of 64 (32) weights that begin at `element`.
template <bool B32>
void fill_scales(const PackedWeight& w, int64_t element, int64_t count, float* out) {
  const int wider = w.shift - (B32 ? 5 : 6);
  if (!w.nested || wider > 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = w.scale((element + (B32 ? 32 : 64) * i) >> w.shift);
    return;
  }
  // a block a run: the outer absmax holds for up to 256 of them
  const uint8_t* q = reinterpret_cast<const uint8_t*>(w.absmax);
  for (int64_t block = element >> w.shift; count > 0;) {
    int64_t same = kNestedBlocksize - block % kNestedBlocksize;
    if (same > count) same = count;
    const float outer = PackedWeight::at(w.nested, block / kNestedBlocksize), offset = w.offset;
    for (int64_t i = 0; i < same; ++i)
      out[i] = PackedWeight::at(w.nested_code, q[block + i]) * outer + offset;
    out += same;
    block += same;
    count -= same;
  }
}

constexpr int kScalesPerGroup64 = kGroup / 64, kScalesPerGroup32 = kGroup / 32;
constexpr int kPiece = 4096;  // columns of x that stay in the first-level cache, divided by its rows

/// acc[m] += the products of `groups` whole groups; x is packed [group][m][kGroup].
template <int MB, bool B32>
inline void dot_groups(const Decoder& decoder, const uint8_t* codes, const float* scales, const float* x,
                       int64_t groups, int64_t ahead, F* sum) {
  constexpr int S = MB == 1 ? 2 : 1;  // sums of a group: one long chain would keep the scheduler waiting
  F acc[MB];
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) acc[m] = sum[m];
  for (int64_t g = 0; g < groups; ++g) {
    prefetch_far(codes + ahead);
    F part[S][MB];
    decoder.each(
        codes, [&](int j, F v) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < MB; ++m) {
            const F xv = load(x + m * kGroup + j * W);
            part[j % S][m] = j < S ? mul(v, xv) : fma(v, xv, part[j % S][m]);
          }
        });
    const F s = lane_scales<B32>(scales);
#pragma GCC unroll 8
    for (int m = 0; m < MB; ++m)
      acc[m] = fma(S == 1 ? part[0][m] : add(part[0][m], part[S - 1][m]), s, acc[m]);
    codes += kGroup / 2;
    scales += B32 ? kScalesPerGroup32 : kScalesPerGroup64;
    x += MB * kGroup;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) sum[m] = acc[m];
}

#if HALFBYTE_ISA_LEVEL == 512
/// The same for two weight rows, which share what is loaded of x: several rows of x would otherwise wait for
/// that.
template <int MB, bool B32>
inline void dot_groups_of_two(const Decoder& decoder, const uint8_t* codes, int64_t row_bytes,
                              const float* scales, int64_t row_scales, const float* x, int64_t groups,
                              int64_t ahead, F (*sum)[MB]) {
  F acc[2][MB];
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) {
    acc[0][m] = sum[0][m];
    acc[1][m] = sum[1][m];
  }
  for (int64_t g = 0; g < groups; ++g) {
    prefetch_far(codes + ahead);
    prefetch_far(codes + row_bytes + ahead);
    F part[2][MB];
    decoder.both(
        codes, codes + row_bytes, [&](int j, F v, F w) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < MB; ++m) {
            const F xv = load(x + m * kGroup + j * W);
            part[0][m] = j == 0 ? mul(v, xv) : fma(v, xv, part[0][m]);
            part[1][m] = j == 0 ? mul(w, xv) : fma(w, xv, part[1][m]);
          }
        });
    const F s = lane_scales<B32>(scales), t = lane_scales<B32>(scales + row_scales);
#pragma GCC unroll 8
    for (int m = 0; m < MB; ++m) {
      acc[0][m] = fma(part[0][m], s, acc[0][m]);
      acc[1][m] = fma(part[1][m], t, acc[1][m]);
    }
    codes += kGroup / 2;
    scales += B32 ? kScalesPerGroup32 : kScalesPerGroup64;
    x += MB * kGroup;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MB; ++m) {
    sum[0][m] = acc[0][m];
    sum[1][m] = acc[1][m];
  }
}
#endif

template <int MB, bool B32>
void few_packed_of(const LinearArgs& a, const PackedWeight& w, const float* x, int64_t begin, int64_t end) {
  constexpr int rows_at_a_time = 16;
  constexpr int64_t piece = kPiece / (MB > 4 ? 8 : MB > 2 ? 4 : MB);
  constexpr int run = B32 ? 32 : 64;
  const Decoder decoder(w.book);
  // Rows that are one piece are read from front to back, and fetched far ahead: a busy memory answers late,
  // and 2 kB ahead made AVX2 a fifth slower. Where a row is several pieces, those of 16 weight rows take
  // turns: each fetches the same piece of the next 16.
  const int64_t ahead = a.k <= piece ? 8192 : rows_at_a_time * a.k / 2;
  const bool direct = !w.nested && (int64_t{1} << w.shift) == run;
  F acc[rows_at_a_time][MB];
  for (int64_t n = begin; n < end; n += rows_at_a_time) {
    const int rows = static_cast<int>(end - n < rows_at_a_time ? end - n : rows_at_a_time);
    for (int r = 0; r < rows; ++r)
      for (int m = 0; m < MB; ++m) acc[r][m] = zero();
    for (int64_t k = 0; k < a.k; k += piece) {
      const int64_t count = a.k - k < piece ? a.k - k : piece;
      const int64_t groups = count / kGroup, rest = count % kGroup;
      int r = 0;
#if HALFBYTE_ISA_LEVEL == 512
      if (MB > 1 && rest == 0) {
        for (; r + 2 <= rows; r += 2) {
          const int64_t element = (n + r) * a.k + k;
          float filled[2 * (kPiece / 32)];
          const float* scales = filled;
          int64_t row_scales = kPiece / 32;
          if (direct) {
            scales = reinterpret_cast<const float*>(w.absmax) + (element >> w.shift);
            row_scales = a.k >> w.shift;
          } else {
            fill_scales<B32>(w, element, count / run, filled);
            fill_scales<B32>(w, element + a.k, count / run, filled + row_scales);
          }
          dot_groups_of_two<MB, B32>(decoder, w.codes + element / 2, a.k / 2, scales, row_scales, x + k * MB,
                                     groups, ahead, acc + r);
        }
      }
#endif
      for (; r < rows; ++r) {
        const int64_t element = (n + r) * a.k + k;
        const uint8_t* codes = w.codes + element / 2;
        float filled[kPiece / 32 + 4];
        const float* scales = filled;
        if (direct)
          scales = reinterpret_cast<const float*>(w.absmax) + (element >> w.shift);
        else
          fill_scales<B32>(w, element, count / run, filled);
        const float* xk = x + k * MB;
        dot_groups<MB, B32>(decoder, codes, scales, xk, groups, ahead, acc[r]);
        if (rest > 0) {  // half a group: the packed x is zero beyond it
          alignas(64) uint8_t last_codes[kGroup / 2] = {};
          float last_scales[kScalesPerGroup32] = {};
          __builtin_memcpy(last_codes, codes + groups * (kGroup / 2), static_cast<size_t>(rest) / 2);
          __builtin_memcpy(last_scales, scales + groups * (kGroup / run),
                           static_cast<size_t>(rest / run) * 4);
          dot_groups<MB, B32>(decoder, last_codes, last_scales, xk + groups * kGroup * MB, 1, 0, acc[r]);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int m = 0; m < MB && m < a.m; ++m) finish_one(a, m, n + r, reduce_add(acc[r][m]));
  }
}

template <int MB>
void few_packed(const LinearArgs& a, const PackedWeight& w, const float* x, int64_t begin, int64_t end) {
  if (w.shift == 5) return few_packed_of<MB, true>(a, w, x, begin, end);
  few_packed_of<MB, false>(a, w, x, begin, end);
}

struct PackedRows {
  const PackedWeight& w;
  Decoder decoder;

  template <bool B32>
  void decode_as(int64_t element, int64_t count, float* out) const {
    constexpr int run = B32 ? 32 : 64;
    float scales[kBlockK / 32];
    fill_scales<B32>(w, element, count / run, scales);
    const uint8_t* codes = w.codes + element / 2;
    const float* s = scales;
    for (; count >= kGroup; count -= kGroup, codes += kGroup / 2, s += kGroup / run, out += kGroup) {
      const F scale = lane_scales<B32>(s);
      decoder.each(
          codes, [&](int j, F v) __attribute__((always_inline)) { store(out + j * W, mul(v, scale)); });
    }
    if (count > 0) {
      alignas(64) uint8_t last_codes[kGroup / 2] = {};
      float last_scales[kScalesPerGroup32] = {};
      __builtin_memcpy(last_codes, codes, static_cast<size_t>(count) / 2);
      __builtin_memcpy(last_scales, s, static_cast<size_t>(count / run) * 4);
      const F scale = lane_scales<B32>(last_scales);
      decoder.each(
          last_codes, [&](int j, F v) __attribute__((always_inline)) { store(out + j * W, mul(v, scale)); });
    }
  }
  void decode(int64_t n, int64_t k, int64_t count, float* out) const {
    const int64_t left = w.k - k;  // the packed columns may end in half a group of padding
    if (count > left) count = left;
    const int64_t element = n * w.k + k;
    if (w.shift == 5) return decode_as<true>(element, count, out);
    decode_as<false>(element, count, out);
  }
  void ahead(int64_t n, int64_t k, int64_t count, Ahead* list) const {
    list->add(w.codes + (n * w.k + k) / 2, count / 2);
  }
};

#endif

}  // namespace

bool packed_order(int64_t k) { return HALFBYTE_ISA_LEVEL > 0 && k % 64 == 0; }

int64_t most_few_rows(int64_t k) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(k)) return kMostFew;
#endif
  (void)k;
  return 4;
}

/// Puts x where the few-row kernels read it.
const float* arrange_few(const LinearArgs& a) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(a.k)) {
    const int rows = static_cast<int>(a.m > 4 ? (a.m + 1) / 2 * 2 : a.m);
    float line[kGroup];
    float* out = a.packed;
    for (int64_t k = 0; k < a.k; k += kGroup) {
      const int64_t n = a.k - k < kGroup ? a.k - k : kGroup;
      for (int m = 0; m < rows; ++m, out += kGroup) {
        if (m < a.m) read_floats(a.x, a.dtype, m * a.k + k, n, line);
        for (int64_t i = m < a.m ? n : 0; i < kGroup; ++i) line[i] = 0.0f;
        for (int p = 0; p < kGroup; ++p) out[p] = line[column_of(p)];
      }
    }
    return a.packed;
  }
#endif
  if (a.dtype == DType::f32) return static_cast<const float*>(a.x);
  read_floats(a.x, a.dtype, 0, a.m * a.k, a.packed);
  return a.packed;
}

void few_rows(const LinearArgs& a, const PackedWeight& w, const float* x, int64_t begin, int64_t end) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(a.k)) {
    switch (a.m) {
      case 1:
        return few_packed<1>(a, w, x, begin, end);
      case 2:
        return few_packed<2>(a, w, x, begin, end);
      case 3:
        return few_packed<3>(a, w, x, begin, end);
      case 4:
        return few_packed<4>(a, w, x, begin, end);
      case 5:
      case 6:
        return few_packed<6>(a, w, x, begin, end);
      default:
        return few_packed<8>(a, w, x, begin, end);
    }
  }
#endif
  switch (a.m) {
    case 1:
      return few_natural_of<1>(a, w, x, begin, end);
    case 2:
      return few_natural_of<2>(a, w, x, begin, end);
    case 3:
      return few_natural_of<3>(a, w, x, begin, end);
    default:
      return few_natural_of<4>(a, w, x, begin, end);
  }
}

/// Columns of the packed x.
int64_t packed_columns(int64_t k) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(k)) return (k + kGroup - 1) / kGroup * kGroup;
#endif
  return k;
}

void pack_panel(const LinearArgs& a, int64_t row, int64_t rows, float* packed) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(a.k)) {
    uint8_t order[kGroup];
    for (int p = 0; p < kGroup; ++p) order[p] = static_cast<uint8_t>(column_of(p));
    return pack_rows(a, row, rows, packed_columns(a.k), order, kGroup, packed);
  }
#endif
  pack_rows(a, row, rows, a.k, nullptr, 128, packed);
}

void multiply_panel(const LinearArgs& a, const PackedWeight& w, int64_t row, int64_t rows,
                    const float* packed, int64_t n, int64_t count) {
#if HALFBYTE_ISA_LEVEL > 0
  if (packed_order(a.k))
    return panel_task(a, PackedRows{w, Decoder(w.book)}, row, rows, packed, packed_columns(a.k), n, count);
#endif
  panel_task(a, NaturalRows{w}, row, rows, packed, a.k, n, count);
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else
namespace halfbyte::cpu {
namespace {

Status check_weight(const char* op, const Weight4& w) {
  if (!is_blocksize(w.blocksize))
    return refuse(op, "blocksize " + std::to_string(w.blocksize) + " is not a power of two from 32 to 4096");
  const int64_t elements = w.n * w.k, blocks = (elements + w.blocksize - 1) / w.blocksize;
  if (w.n < 0 || w.k < 0 || w.codes.dtype != DType::u8 || !w.codes.is_contiguous() ||
      w.codes.size() < (elements + 1) / 2)
    return refuse(op, "the codes must be contiguous uint8 and hold a weight of [" + std::to_string(w.n) +
                          ", " + std::to_string(w.k) + "]");
  const bool nested = static_cast<bool>(w.nested_absmax);
  if (w.absmax.dtype != (nested ? DType::u8 : DType::f32) || !w.absmax.is_contiguous() ||
      w.absmax.size() < blocks)
    return refuse(op, "absmax must be contiguous " + std::string(nested ? "uint8" : "float32") + " of " +
                          std::to_string(blocks) + " blocks");
  if (!nested) return {};
  const auto floats = [](const View& v, int64_t count) {
    return v && v.dtype == DType::f32 && v.is_contiguous() && v.size() >= count;
  };
  if (!floats(w.nested_absmax, (blocks + kNestedBlocksize - 1) / kNestedBlocksize) ||
      !floats(w.nested_code, 256) || !floats(w.offset, 1))
    return refuse(op, "a nested absmax needs float32 nested absmax, code [256] and offset [1]");
  return {};
}

int log2_of(int64_t n) {
  int shift = 0;
  while ((int64_t{1} << shift) < n) ++shift;
  return shift;
}

}  // namespace

size_t CpuBackend::linear_4bit_workspace(const View& x, const Weight4& w) const {
  return linear_scratch(x.rows(), w.k);
}

Status CpuBackend::linear_4bit(Queue, View y, View x, const Weight4& weight, const Epilogue& epilogue,
                               View workspace) {
  const char* op = "linear_4bit";
  if (Status s = check_weight(op, weight); !s.ok()) return s;
  LinearArgs a;
  if (Status s = check_linear(op, y, x, weight.n, weight.k, epilogue, workspace,
                              linear_scratch(x.rows(), weight.k), &a);
      !s.ok())
    return s;
  if (a.m == 0 || a.n == 0) return {};
  const bool nested = static_cast<bool>(weight.nested_absmax);
  PackedWeight w{};
  w.codes = weight.codes.as<const uint8_t>();
  w.absmax = weight.absmax.as<const char>();
  w.nested = nested ? weight.nested_absmax.as<const char>() : nullptr;
  w.nested_code = nested ? weight.nested_code.as<const char>() : nullptr;
  w.offset = nested ? PackedWeight::at(weight.offset.as<const char>(), 0) : 0.0f;
  w.book = codebook(weight.type);
  w.shift = log2_of(weight.blocksize);
  w.k = a.k;

  if (a.m <= HALFBYTE_PICK(most_few_rows)(a.k)) {
    const float* arranged = HALFBYTE_PICK(arrange_few)(a);
    const auto few = HALFBYTE_PICK(few_rows);
    spread_rows(a.n, a.n * a.k * (a.m + 1) / 2,
                [&](int64_t begin, int64_t end) { few(a, w, arranged, begin, end); });
    return {};
  }
  const auto pack = HALFBYTE_PICK(pack_panel);
  const auto task = HALFBYTE_PICK(multiply_panel);
  blocked_product(
      a, HALFBYTE_PICK(packed_columns)(a.k),
      [&](int64_t row, int64_t count, float* packed) { pack(a, row, count, packed); },
      [&](int64_t row, int64_t rows, const float* packed, int64_t first, int64_t count) {
        task(a, w, row, rows, packed, first, count);
      });
  return {};
}

}  // namespace halfbyte::cpu
#endif
