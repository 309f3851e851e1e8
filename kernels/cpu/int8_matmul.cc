// The exact product of signed bytes: sums int32 [M, N] = a int8 [M, K] times b int8 [N, K] transposed.
//
// Every value of a byte is legal on both sides. AVX2 and AVX-512 extend bytes to 16 bits and multiply-add
// pairs (vpmaddwd), which cannot overflow. VNNI, of either width, multiplies unsigned by signed bytes
// (vpdpbusd): b is taken as b + 128, which is one xor, and 128 times the row sum of a comes off again. Sums
// wrap at 2^31, as int32 sums do.
//
// Many rows of a: a panel of 16 rows of b is converted once, kDepth columns at a time, into a buffer of the
// first-level cache and multiplied with up to 64 rows of a in register tiles of R x C sums. Up to four rows:
// b is read in place, one row after the other, each byte once, with prefetches ahead: the speed of memory
// decides. Panels are spread over the pool; every thread goes through its panels from front to back.
#include "int8.h"
#include "isa.h"

#include <cstring>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#ifndef HALFBYTE_ISA  // once, before the parts per instruction set
namespace halfbyte::cpu {

/// The operands of int8_matmul_dequantize.
struct Scaled {
  View y, bias;
  const int32_t* acc;
  const float* rows;
  const float* columns;
  int64_t n;
};

}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "int8_matmul.cc"
#include "per_isa.h"
#ifdef HALFBYTE_ISA
#include "simd.h"
#include "int8_simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

#if HALFBYTE_ISA_LEVEL == 0

constexpr int64_t kDepth = 1024;

/// One dot product at a time over 16-bit buffers, a form that compilers turn into multiply-adds of pairs.
static int32_t dot_words(const int16_t* a, const int16_t* b, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
  return sum;
}

static void extend(int16_t* out, const int8_t* in, int64_t k) {
  for (int64_t i = 0; i < k; ++i) out[i] = in[i];
}

static void block_sums(const Int8Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, int32_t* sums) {
  int16_t panel[kInt8PanelRows][kDepth], row[kDepth];
  for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
    const int64_t depth = p.k - k0 < kDepth ? p.k - k0 : kDepth;
    for (int64_t j = n0; j < n1; ++j) extend(panel[j - n0], p.b + j * p.k + k0, depth);
    for (int64_t i = m0; i < m1; ++i) {
      extend(row, p.a + i * p.lda + k0, depth);
      int32_t* const out = sums + (i - m0) * kInt8PanelRows;
      for (int64_t j = 0; j < n1 - n0; ++j) {
        const int32_t sum = dot_words(row, panel[j], depth);
        out[j] =
            k0 == 0 ? sum : static_cast<int32_t>(static_cast<uint32_t>(out[j]) + static_cast<uint32_t>(sum));
      }
    }
  }
}

static void product_panels(const Int8Product& p, bool, int64_t begin, int64_t end) {
  int32_t sums[kInt8BlockRows * kInt8PanelRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t n0 = panel * kInt8PanelRows;
    const int64_t n1 = n0 + kInt8PanelRows < p.n ? n0 + kInt8PanelRows : p.n;
    for (int64_t m0 = 0; m0 < p.m; m0 += kInt8BlockRows) {
      const int64_t m1 = m0 + kInt8BlockRows < p.m ? m0 + kInt8BlockRows : p.m;
      block_sums(p, m0, m1, n0, n1, sums);
      p.sink(p.context, Int8Block{sums, m0, m1, n0, n1});
    }
  }
}

#else

#if HALFBYTE_ISA_LEVEL == 2

struct Wide {
  using V = __m256i;
  static V none() { return _mm256_setzero_si256(); }
  static int32_t total(V s) { return _mm_cvtsi128_si32(totals(s, s, s, s)); }
  /// The four totals of four vectors.
  static __m128i totals(V s0, V s1, V s2, V s3) {
    const V t = _mm256_hadd_epi32(_mm256_hadd_epi32(s0, s1), _mm256_hadd_epi32(s2, s3));
    return _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  }
};

/// Bytes as 16-bit words, 16 at a time.
struct Words : Wide {
  using Ready = int16_t;  // what a converted panel holds
  static constexpr int64_t kStep = 16;
  static constexpr int kTileRows = 2;
  static constexpr int64_t kDepth = 1024;  // columns of a panel that are converted at a time
  static constexpr bool kOffset = false;
  static V load_a(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static V load_b(const int8_t* p) { return load_a(p); }
  static V load_ready(const Ready* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_ready(Ready* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V dot(V sum, V a, V b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
};

/// vpdpbusd of AVX-VNNI. As assembly, so that nothing but the calls of this, which has_vnni() guards, can
/// come out as VNNI: with the instruction set named to the compiler it would also use it in loops of its own
/// choice.
static inline __m256i dot_quads(__m256i sum, __m256i with_offset, __m256i bytes) {
#if HALFBYTE_AVX_VNNI
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(with_offset), "xm"(bytes));
#endif
  return sum;
}

/// VNNI: b as unsigned bytes b + 128, 32 at a time.
struct Quads : Wide {
  using Ready = uint8_t;
  static constexpr int64_t kStep = 32;
  static constexpr int kTileRows = 3;  // 12 sums, which hide the latency, 3 vectors of a and one of b
  static constexpr int64_t kDepth = 2048;
  static constexpr bool kOffset = true;
  static V offset() { return _mm256_set1_epi8(-128); }
  static V load_a(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static V load_b(const int8_t* p) { return _mm256_xor_si256(load_a(p), offset()); }
  static V load_ready(const Ready* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_ready(Ready* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V dot(V sum, V a, V b) { return dot_quads(sum, b, a); }
};

#else

struct Wide {
  using V = __m512i;
  static V none() { return _mm512_setzero_si512(); }
  static __m256i half(V s) {
    return _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
  }
  static int32_t total(V s) { return _mm_cvtsi128_si32(totals(s, s, s, s)); }
  static __m128i totals(V s0, V s1, V s2, V s3) {
    const __m256i t =
        _mm256_hadd_epi32(_mm256_hadd_epi32(half(s0), half(s1)), _mm256_hadd_epi32(half(s2), half(s3)));
    return _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  }
};

/// Bytes as 16-bit words, 32 at a time.
struct Words : Wide {
  using Ready = int16_t;
  static constexpr int64_t kStep = 32;
  static constexpr int kTileRows = 4;
  static constexpr int64_t kDepth = 1024;  // columns of a panel that are converted at a time
  static constexpr bool kOffset = false;
  static V load_a(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load_b(const int8_t* p) { return load_a(p); }
  static V load_ready(const Ready* p) { return _mm512_loadu_si512(p); }
  static void store_ready(Ready* p, V v) { _mm512_storeu_si512(p, v); }
  static V dot(V sum, V a, V b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
};

/// vpdpbusd of AVX512-VNNI, as assembly for the same reason as in AVX2.
static inline __m512i dot_quads(__m512i sum, __m512i with_offset, __m512i bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(with_offset), "vm"(bytes));
  return sum;
}

/// VNNI: b as unsigned bytes b + 128, 64 at a time.
struct Quads : Wide {
  using Ready = uint8_t;
  static constexpr int64_t kStep = 64;
  static constexpr int kTileRows = 4;
  static constexpr int64_t kDepth = 2048;
  static constexpr bool kOffset = true;
  static V offset() { return _mm512_set1_epi8(-128); }
  static V load_a(const int8_t* p) { return _mm512_loadu_si512(p); }
  static V load_b(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), offset()); }
  static V load_ready(const Ready* p) { return _mm512_loadu_si512(p); }
  static void store_ready(Ready* p, V v) { _mm512_storeu_si512(p, v); }
  static V dot(V sum, V a, V b) { return dot_quads(sum, b, a); }
};

#endif

/// The first n < kStep bytes. Padding of a is 0, so that of b does not matter.
template <typename Kind>
static inline const int8_t* padded(int8_t (&buffer)[Kind::kStep], const int8_t* p, int64_t n) {
  __builtin_memset(buffer, 0, sizeof buffer);
  __builtin_memcpy(buffer, p, static_cast<size_t>(n));
  return buffer;
}

/// sums[r, 0] += a[r, :] . b[:] over k columns, for R rows of a and one row of b as it lies in memory. One
/// row after the other is one stream per thread, which the hardware's prefetch follows best; the software's
/// is for the row that follows as well.
template <typename Kind, int R>
static void row_in_place(const int8_t* a, int64_t lda, const int8_t* b, int64_t k, int32_t* sums) {
  constexpr int64_t kAhead = 8192;  // a busy memory answers late
  constexpr int kUnroll = static_cast<int>(64 / Kind::kStep);
  using V = typename Kind::V;
  V s[R];
  for (int r = 0; r < R; ++r) s[r] = Kind::none();
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    __builtin_prefetch(b + i + kAhead, 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * Kind::kStep;
      const V w = Kind::load_b(b + at);
      for (int r = 0; r < R; ++r) s[r] = Kind::dot(s[r], Kind::load_a(a + r * lda + at), w);
    }
  }
  for (; i < k; i += Kind::kStep) {
    const int64_t n = k - i < Kind::kStep ? k - i : Kind::kStep;
    int8_t last[Kind::kStep];
    const V w = Kind::load_b(padded<Kind>(last, b + i, n));
    for (int r = 0; r < R; ++r)
      s[r] = Kind::dot(s[r], Kind::load_a(padded<Kind>(last, a + r * lda + i, n)), w);
  }
  for (int r = 0; r < R; ++r) {
    int32_t* const out = sums + r * kInt8PanelRows;
    *out = static_cast<int32_t>(static_cast<uint32_t>(*out) + static_cast<uint32_t>(Kind::total(s[r])));
  }
}

/// The same over `depth` columns with four rows of a converted panel.
template <typename Kind, int R>
static void tile_of_panel(const int8_t* a, int64_t lda, const typename Kind::Ready* b, int64_t depth,
                          int32_t* sums) {
  using V = typename Kind::V;
  V s[R][4];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 4; ++c) s[r][c] = Kind::none();
  }
  int64_t i = 0;
  for (; i + Kind::kStep <= depth; i += Kind::kStep) {
    V x[R];
    for (int r = 0; r < R; ++r) x[r] = Kind::load_a(a + r * lda + i);
    for (int c = 0; c < 4; ++c) {
      const V w = Kind::load_ready(b + c * Kind::kDepth + i);
      for (int r = 0; r < R; ++r) s[r][c] = Kind::dot(s[r][c], x[r], w);
    }
  }
  if (i < depth) {
    int8_t last[Kind::kStep];
    V x[R];
    for (int r = 0; r < R; ++r) x[r] = Kind::load_a(padded<Kind>(last, a + r * lda + i, depth - i));
    for (int c = 0; c < 4; ++c) {
      const V w = Kind::load_ready(b + c * Kind::kDepth + i);
      for (int r = 0; r < R; ++r) s[r][c] = Kind::dot(s[r][c], x[r], w);
    }
  }
  for (int r = 0; r < R; ++r) {
    __m128i* const out = reinterpret_cast<__m128i*>(sums + r * kInt8PanelRows);
    _mm_storeu_si128(out,
                     _mm_add_epi32(_mm_loadu_si128(out), Kind::totals(s[r][0], s[r][1], s[r][2], s[r][3])));
  }
}

/// tile.run<R>(r) for rows in tiles of kTileRows, then one tile with what is left.
template <typename Kind, typename Four>
static inline void in_tiles(int64_t rows, const Four& tile) {
  int64_t r = 0;
  for (; r + Kind::kTileRows <= rows; r += Kind::kTileRows) tile.template run<Kind::kTileRows>(r);
  switch (rows - r) {
    case 3:
      tile.template run<3>(r);
      break;
    case 2:
      tile.template run<2>(r);
      break;
    case 1:
      tile.template run<1>(r);
      break;
    default:
      break;
  }
}

template <typename Kind>
struct InPlace {
  const Int8Product& p;
  int64_t m0;
  const int8_t* b;
  int32_t* sums;
  template <int R>
  void run(int64_t r) const {
    row_in_place<Kind, R>(p.a + (m0 + r) * p.lda, p.lda, b, p.k, sums + r * kInt8PanelRows);
  }
};

/// The part of b that is converted next, fetched into the second-level cache row by row between the tiles.
struct Ahead {
  const int8_t* b;
  int64_t rows, stride, bytes;
  void fetch(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end && r < rows; ++r) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(b + r * stride + i, 0, 2);
    }
  }
};

template <typename Kind>
static Ahead ahead_of(const Int8Product& p, int64_t panel, int64_t panel_end, int64_t k0) {
  if (k0 >= p.k) {
    k0 = 0;
    if (++panel >= panel_end) return Ahead{p.b, 0, 0, 0};
  }
  const int64_t n0 = panel * kInt8PanelRows, rows = p.n - n0 < kInt8PanelRows ? p.n - n0 : kInt8PanelRows;
  return Ahead{p.b + n0 * p.k + k0, rows, p.k, p.k - k0 < Kind::kDepth ? p.k - k0 : Kind::kDepth};
}

template <typename Kind>
struct OfPanel {
  const int8_t* a;
  int64_t lda;
  const typename Kind::Ready* b;
  int64_t depth;
  int32_t* sums;
  int64_t rows;
  Ahead ahead;
  template <int R>
  void run(int64_t r) const {
    ahead.fetch(r * kInt8PanelRows / rows, (r + R) * kInt8PanelRows / rows);
    for (int64_t c = 0; c < kInt8PanelRows; c += 4) {
      tile_of_panel<Kind, R>(a + r * lda, lda, b + c * Kind::kDepth, depth, sums + r * kInt8PanelRows + c);
    }
  }
};

/// Converts `depth` columns of the panel's rows; rows beyond n1 repeat the last, their sums are not used.
template <typename Kind>
static void convert(typename Kind::Ready* out, const Int8Product& p, int64_t n0, int64_t n1, int64_t k0,
                    int64_t depth) {
  for (int64_t c = 0; c < kInt8PanelRows; ++c) {
    const int8_t* const in = p.b + (n0 + c < n1 ? n0 + c : n1 - 1) * p.k + k0;
    typename Kind::Ready* const to = out + c * Kind::kDepth;
    int64_t i = 0;
    for (; i + Kind::kStep <= depth; i += Kind::kStep) Kind::store_ready(to + i, Kind::load_b(in + i));
    if (i < depth) {
      int8_t last[Kind::kStep];
      Kind::store_ready(to + i, Kind::load_b(padded<Kind>(last, in + i, depth - i)));
    }
  }
}

/// What vpdpbusd counts too much for each row of a, with its sign turned.
template <typename Kind>
static void row_corrections(const Int8Product& p, int64_t m0, int64_t m1, int32_t* out) {
  for (int64_t r = m0; r < m1; ++r) {
    const int8_t* const row = p.a + r * p.lda;
    typename Kind::V sum = Kind::none();
    for (int64_t i = 0; i < p.k; i += Kind::kStep) {
      int8_t last[Kind::kStep];
      const int8_t* const from = p.k - i < Kind::kStep ? padded<Kind>(last, row + i, p.k - i) : row + i;
      sum = Kind::dot(sum, Kind::load_a(from), Kind::offset());
    }
    out[r - m0] = -Kind::total(sum);
  }
}

template <typename Kind>
static void panels_of(const Int8Product& p, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = 8;  // panels that stay in the second-level cache while the rows of a go by
  alignas(64) int32_t sums[kInt8BlockRows * kInt8PanelRows];
  alignas(64) typename Kind::Ready panel[kInt8PanelRows * Kind::kDepth];
  int32_t start[kInt8BlockRows] = {};
  const bool in_place = p.m <= 4;
  for (int64_t group = begin; group < end; group += kGroup) {
    const int64_t group_end = group + kGroup < end ? group + kGroup : end;
    for (int64_t m0 = 0; m0 < p.m; m0 += kInt8BlockRows) {
      const int64_t m1 = m0 + kInt8BlockRows < p.m ? m0 + kInt8BlockRows : p.m;
      if constexpr (Kind::kOffset) row_corrections<Kind>(p, m0, m1, start);
      for (int64_t index = group; index < group_end; ++index) {
        const int64_t n0 = index * kInt8PanelRows;
        const int64_t n1 = n0 + kInt8PanelRows < p.n ? n0 + kInt8PanelRows : p.n;
        for (int64_t r = 0; r < m1 - m0; ++r) {
          for (int64_t c = 0; c < kInt8PanelRows; ++c) sums[r * kInt8PanelRows + c] = start[r];
        }
        if (in_place) {
          for (int64_t c = 0; c < n1 - n0; ++c)
            in_tiles<Kind>(m1 - m0, InPlace<Kind>{p, m0, p.b + (n0 + c) * p.k, sums + c});
        } else {
          for (int64_t k0 = 0; k0 < p.k; k0 += Kind::kDepth) {
            const int64_t depth = p.k - k0 < Kind::kDepth ? p.k - k0 : Kind::kDepth;
            convert<Kind>(panel, p, n0, n1, k0, depth);
            in_tiles<Kind>(m1 - m0, OfPanel<Kind>{p.a + m0 * p.lda + k0, p.lda, panel, depth, sums, m1 - m0,
                                                  ahead_of<Kind>(p, index, group_end, k0 + depth)});
          }
        }
        p.sink(p.context, Int8Block{sums, m0, m1, n0, n1});
      }
    }
  }
}

static void product_panels(const Int8Product& p, bool vnni, int64_t begin, int64_t end) {
  if (vnni) return panels_of<Quads>(p, begin, end);
  panels_of<Words>(p, begin, end);
}

#endif

/// y = acc * row * column / 127^2 + bias over one row; `late` adds the bias after rounding to y's dtype.
template <typename T>
static void scale_row(T* y, const int32_t* acc, float row, const float* columns, const View& bias, bool late,
                      int64_t n) {
  const F stat = set1(row), scale = set1(kInt8ProductScale);
  for (int64_t j = 0; j < n; j += W) {
    const int64_t left = n - j < W ? n - j : W;
    int32_t part[W] = {};
    __builtin_memcpy(part, acc + j, static_cast<size_t>(left) * 4);
    F add_on = zero();
    if (bias) {
      switch (bias.dtype) {
        case DType::f16:
          add_on = load_n(bias.as<const F16>() + j, left);
          break;
        case DType::bf16:
          add_on = load_n(bias.as<const BF16>() + j, left);
          break;
        default:
          add_on = load_n(bias.as<const float>() + j, left);
      }
    }
    const F product = mul(mul(load_ints(part), stat), load_n(columns + j, left));
    F v = fma(product, scale, late ? zero() : add_on);
    if (late) v = add(rounded<T>(v), add_on);
    store_n(y + j, v, left);
  }
}

static void scale_rows(const Scaled& s, int64_t begin, int64_t end) {
  const bool late = s.bias && s.y.dtype == DType::f16 && s.bias.dtype != DType::f16;
  for (int64_t r = begin; r < end; ++r) {
    float row;
    __builtin_memcpy(&row, s.rows + r, sizeof row);
    const int64_t at = r * s.n;
    switch (s.y.dtype) {
      case DType::f16:
        scale_row(s.y.as<F16>() + at, s.acc + at, row, s.columns, s.bias, late, s.n);
        break;
      case DType::bf16:
        scale_row(s.y.as<BF16>() + at, s.acc + at, row, s.columns, s.bias, late, s.n);
        break;
      default:
        scale_row(s.y.as<float>() + at, s.acc + at, row, s.columns, s.bias, late, s.n);
    }
  }
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
#else

namespace halfbyte::cpu {
namespace {

void store_sums(const void* context, const Int8Block& block) {
  const View& acc = *static_cast<const View*>(context);
  const int64_t n = acc.cols();
  for (int64_t i = block.m0; i < block.m1; ++i) {
    std::memcpy(acc.as<char>() + (i * n + block.n0) * 4, block.sums + (i - block.m0) * kInt8PanelRows,
                static_cast<size_t>(block.n1 - block.n0) * 4);
  }
}

}  // namespace

void int8_product(const Int8Product& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const int64_t panels = (p.n + kInt8PanelRows - 1) / kInt8PanelRows;
  // 20 us of one thread: about 300 kB of b once, or the arithmetic of 1.5 M products
  const int64_t panel_cost = kInt8PanelRows * (p.k + 1) * (p.m + 4);
  const auto run = HALFBYTE_PICK(product_panels);
  const bool vnni = has_vnni();
  parallel_for(panels, 1 + 1'500'000 / panel_cost,
               [&](int64_t begin, int64_t end) { run(p, vnni, begin, end); });
}

Status CpuBackend::int8_matmul(Queue, View acc, View a, View b) {
  const char* const op = "int8_matmul";
  if (acc.dtype != DType::i32 || a.dtype != DType::i8 || b.dtype != DType::i8) {
    return refuse_dtype(op, "a and b must be int8 and the result int32");
  }
  const int64_t m = a.rows(), n = b.rows(), k = a.cols();
  if (b.cols() != k) return refuse(op, "a and b do not have the same number of columns");
  if (acc.rows() != m || acc.cols() != n) return refuse(op, "the result is not [rows of a, rows of b]");
  int8_product(Int8Product{a.as<const int8_t>(), m, k, b.as<const int8_t>(), n, k, store_sums, &acc});
  return {};
}

Status CpuBackend::int8_matmul_dequantize(Queue, View y, View acc, View row_absmax, View col_absmax,
                                          View bias) {
  const char* const op = "int8_matmul_dequantize";
  const int64_t m = acc.rows(), n = acc.cols();
  if (!is_float(y.dtype) || acc.dtype != DType::i32 || row_absmax.dtype != DType::f32 ||
      col_absmax.dtype != DType::f32 || (bias && !is_float(bias.dtype))) {
    return refuse_dtype(op, "y and bias must be float, acc int32, row_absmax and col_absmax float32");
  }
  if (y.size() != acc.size() || row_absmax.size() != m || col_absmax.size() != n ||
      (bias && bias.size() != n)) {
    return refuse(op, "y, row_absmax, col_absmax or bias does not fit acc");
  }
  const Scaled scaled{
      y, bias, acc.as<const int32_t>(), row_absmax.as<const float>(), col_absmax.as<const float>(), n};
  const auto run = HALFBYTE_PICK(scale_rows);
  parallel_for(m, 1 + 50'000 / (n + 1), [&](int64_t begin, int64_t end) { run(scaled, begin, end); });
  return {};
}

}  // namespace halfbyte::cpu
#endif
