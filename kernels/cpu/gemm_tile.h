// The blocked fp32 product behind the dense and the 4-bit linear op: y [M, N] = x [M, K] w [N, K]^T.
//
// Vectors run along M. x is packed once per call, transposed, in tiles of MV vectors: packed[tile][k][MV *
// W]. The weight stays as it is stored, K-contiguous: 24 rows by 256 columns at a time are decoded to float
// into the first-level cache and reach the kernel as broadcasts, so that a weight is decoded once per 256
// rows of x and never transposed. The order of k is free, as long as x and the decoded weight agree on it; a
// weight format says which order it decodes to.
//
// Included in the per-ISA part of a file, after simd.h and linear_args.h; no include guard.

namespace halfbyte::cpu::HALFBYTE_ISA {

#if HALFBYTE_ISA_LEVEL == 0
// fma() is a library call where the base instruction set has none; sums need not be the same on every level.
static inline F madd(F a, F b, F c) { return add(mul(a, b), c); }
static inline void prefetch(const void*) {}
static inline void prefetch_far(const void*) {}
constexpr int kMaxVectors = 2;
#else
static inline F madd(F a, F b, F c) { return fma(a, b, c); }
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
static inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
constexpr int kMaxVectors = HALFBYTE_ISA_LEVEL == 512 ? 4 : 2;
#endif

constexpr int kBlockK = 256;
constexpr int kStrideK = kBlockK + 16;  // rows of a decoded block start in different cache sets
/// Weight rows per kernel call: enough accumulators to hide the latency of a multiply-add, few enough for the
/// registers.
constexpr int kernel_rows(int vectors) {
  return HALFBYTE_ISA_LEVEL == 512 ? kTaskRows / vectors : kTaskRows / 2 / vectors;
}

static inline float read_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) {
    float f;
    __builtin_memcpy(&f, static_cast<const char*>(p) + i * 4, 4);
    return f;
  }
  uint16_t h;
  __builtin_memcpy(&h, static_cast<const char*>(p) + i * 2, 2);
  return dtype == DType::f16 ? f16_to_float(h) : bf16_to_float(h);
}
static inline void write_float(void* p, DType dtype, int64_t i, float f) {
  if (dtype == DType::f32) {
    __builtin_memcpy(static_cast<char*>(p) + i * 4, &f, 4);
    return;
  }
  const uint16_t h = dtype == DType::f16 ? float_to_f16(f) : float_to_bf16(f);
  __builtin_memcpy(static_cast<char*>(p) + i * 2, &h, 2);
}

/// out[0 .. n) = float of p[begin .. begin + n), p of any float dtype.
static inline void read_floats(const void* p, DType dtype, int64_t begin, int64_t n, float* out) {
  const char* bytes = static_cast<const char*>(p) + begin * size_of(dtype);
  int64_t i = 0;
  if (dtype == DType::f32) {
    __builtin_memcpy(out, bytes, static_cast<size_t>(n) * 4);
    return;
  }
  if (dtype == DType::f16) {
    for (; i + W <= n; i += W) store(out + i, load(reinterpret_cast<const F16*>(bytes) + i));
  } else {
    for (; i + W <= n; i += W) store(out + i, load(reinterpret_cast<const BF16*>(bytes) + i));
  }
  for (; i < n; ++i) out[i] = read_float(bytes, dtype, i);
}

/// y[m, n] = sum + bias[n] + residual[m, n].
static inline void finish_one(const LinearArgs& a, int64_t m, int64_t n, float sum) {
  if (a.bias) sum += read_float(a.bias, a.bias_dtype, n);
  if (a.residual) sum += read_float(a.residual, a.dtype, m * a.n + n);
  write_float(a.y, a.dtype, m * a.n + n, sum);
}

/// acc[m] += sum over k of w[k] * x[m][k], the rows of x `stride` floats apart.
template <typename T, int MB>
static inline void dot_rows(const T* w, const float* x, int64_t stride, int64_t n, F* acc) {
  constexpr int U = MB == 1 ? 4 : MB == 2 ? 2 : 1;  // independent sums, so that additions overlap
  F sum[U][MB];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m) sum[u][m] = zero();
  int64_t k = 0;
  for (; k + U * W <= n; k += U * W) {
    prefetch(reinterpret_cast<const char*>(w + k) + 2048);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const F v = load(w + k + u * W);
#pragma GCC unroll 4
      for (int m = 0; m < MB; ++m) sum[u][m] = madd(v, load(x + m * stride + k + u * W), sum[u][m]);
    }
  }
  for (; k < n; k += W) {
    const int64_t left = n - k < W ? n - k : W;
    const F v = load_n(w + k, left);
    for (int m = 0; m < MB; ++m) sum[0][m] = madd(v, load_n(x + m * stride + k, left), sum[0][m]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) acc[m] = add(acc[m], sum[u][m]);
}

/// Width of the tile of x that begins at row m of `rows`.
static inline int tile_vectors(int64_t m, int64_t rows) {
  const int64_t left = (rows - m + W - 1) / W;
  return left < kMaxVectors ? static_cast<int>(left) : kMaxVectors;
}

/// Packs rows [row, row + rows) of x; order[p] is the column within its group of the p-th packed column
/// (null: as it is). Columns are padded with zeros to kp, rows to whole vectors.
static void pack_rows(const LinearArgs& a, int64_t row, int64_t rows, int64_t kp, const uint8_t* order,
                      int group, float* packed) {
  alignas(64) float lines[W][128];
  for (int64_t m = 0; m < rows;) {
    const int vectors = tile_vectors(m, rows);
    const int width = vectors * W;
    for (int v = 0; v < vectors; ++v) {
      for (int64_t k = 0; k < kp; k += group) {
        for (int lane = 0; lane < W; ++lane) {
          const int64_t from = m + v * W + lane;
          int64_t n = from < rows ? a.k - k : 0;
          if (n > group) n = group;
          if (n < 0) n = 0;
          read_floats(a.x, a.dtype, (row + from) * a.k + k, n, lines[lane]);
          for (int64_t i = n; i < group; ++i) lines[lane][i] = 0.0f;
        }
        const int64_t wide = kp - k < group ? kp - k : group;
        float* out = packed + k * width + v * W;
        for (int64_t p = 0; p < wide; ++p, out += width) {
          const int column = order ? order[p] : static_cast<int>(p);
          for (int lane = 0; lane < W; ++lane) out[lane] = lines[lane][column];
        }
      }
    }
    packed += kp * width;
    m += width;
  }
}

/// Lines of memory that the next block will need, fetched while this one is multiplied.
struct Ahead {
  const char* lines[kTaskRows * kBlockK * 4 / 64 + kTaskRows * 2];
  int count = 0, next = 0;
  void add(const void* begin, int64_t bytes) {
    constexpr int most = static_cast<int>(sizeof lines / sizeof lines[0]);
    for (int64_t i = 0; i < bytes && count < most; i += 64)
      lines[count++] = static_cast<const char*>(begin) + i;
  }
};

/// c[r][0 .. MV * W) (+)= sum over k of w[r][k] * x[k][0 .. MV * W).
template <int MV>
static void tile_kernel(int64_t kc, const float* x, const float* w, float* c, int64_t stride_c, bool first,
                        Ahead* ahead) {
  constexpr int R = kernel_rows(MV);
  F acc[R][MV];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) acc[r][v] = zero();
  int next = ahead->next;
  const int count = ahead->count;
  for (int64_t k = 0; k < kc; ++k) {
    if (next < count) prefetch(ahead->lines[next++]);
    F xv[MV];
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) xv[v] = load(x + v * W);
    x += MV * W;
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const F b = set1(w[r * kStrideK + k]);
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) acc[r][v] = madd(xv[v], b, acc[r][v]);
    }
  }
  ahead->next = next;
  // sums of blocks rather than one long sum: the rounding errors of a long row grow with its blocks only
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
    float* out = c + r * stride_c;
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) store(out + v * W, first ? acc[r][v] : add(load(out + v * W), acc[r][v]));
  }
}

/// One task: weight rows [n, n + count) times the packed panel of rows [row, row + rows) of x. Weight offers
///   decode(n, k, kc, out)       columns k .. k + kc of row n, in packed order
///   ahead(n, k, kc, &ahead)     the memory behind that
template <class Weight>
static void panel_task(const LinearArgs& a, const Weight& weight, int64_t row, int64_t rows,
                       const float* packed, int64_t kp, int64_t n, int64_t count) {
  alignas(64) float w[kTaskRows * kStrideK];
  alignas(64) float c[kTaskRows * kPanelRows];
  if (count < kTaskRows) __builtin_memset(w, 0, sizeof w);
  for (int64_t k = 0; k < kp; k += kBlockK) {
    const int64_t kc = kp - k < kBlockK ? kp - k : kBlockK;
    Ahead ahead;
    for (int64_t r = 0; r < count; ++r) weight.decode(n + r, k, kc, w + r * kStrideK);
    if (k + kBlockK < kp) {
      const int64_t after = kp - k - kBlockK < kBlockK ? kp - k - kBlockK : kBlockK;
      for (int64_t r = 0; r < count; ++r) weight.ahead(n + r, k + kBlockK, after, &ahead);
    }
    const float* x = packed;
    for (int64_t m = 0; m < rows;) {
      const int vectors = tile_vectors(m, rows);
      const int step = kernel_rows(vectors);
      const float* xk = x + k * vectors * W;
      for (int64_t r = 0; r < count; r += step) {
        float* out = c + r * kPanelRows + m;
        const float* wr = w + r * kStrideK;
        switch (vectors) {
          case 1:
            tile_kernel<1>(kc, xk, wr, out, kPanelRows, k == 0, &ahead);
            break;
          case 2:
            tile_kernel<2>(kc, xk, wr, out, kPanelRows, k == 0, &ahead);
            break;
#if HALFBYTE_ISA_LEVEL == 512
          case 3:
            tile_kernel<3>(kc, xk, wr, out, kPanelRows, k == 0, &ahead);
            break;
          default:
            tile_kernel<4>(kc, xk, wr, out, kPanelRows, k == 0, &ahead);
            break;
#endif
        }
      }
      x += kp * vectors * W;
      m += vectors * W;
    }
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < count; ++r) finish_one(a, row + m, n + r, kp > 0 ? c[r * kPanelRows + m] : 0.0f);
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
