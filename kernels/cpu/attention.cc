// paged_write and paged_attention. The caches are [blocks, block_len, KV, D]; position p of a sequence lies
// in block block_table[s, p / block_len]. Softmax is online (arXiv 1805.02867) over tiles of 64 keys, all in
// fp32.
//
// The query rows that share a key head, (token, head of the group) pairs, are cut into items of up to 64
// rows.
//   many rows  (prefill) a row is a lane: scores [keys, rows] = K Q^T and output [D, rows] = V^T P are both
//              register-blocked products of a broadcast element with a vector of rows, so that maxima, masks
//              and sums are vertical and nothing is reduced across lanes.
//   few rows   (decode) dot products along D straight from the cache, each key and value read once.
// With fewer items than the pool can use, each item's keys are split, and a second pass merges the partial
// (maximum, sum, output) of the splits. Positions without a valid block are as if they were not there.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_backend.h"
#include "pool.h"
#include "ragged.h"

#ifndef HALFBYTE_ATTENTION_JOB
#define HALFBYTE_ATTENTION_JOB
namespace halfbyte::cpu {

constexpr int64_t kItemRows = 64;
constexpr int64_t kTileKeys = 64;
constexpr int64_t kMostFewRows = 8;
constexpr float kLowest = -3.0e38f;  // below every score; masked scores are -infinity

struct AttentionJob {
  DType dtype = DType::f32, sink_dtype = DType::f32;
  const void *q = nullptr, *keys = nullptr, *values = nullptr, *sinks = nullptr;
  void* y = nullptr;
  const float* slopes = nullptr;
  int64_t q_stride = 0, heads = 0, kv_heads = 0, group = 0, dim = 0, value_dim = 0, block_len = 0, blocks = 0;
  float scale = 1, softcap = 0;
  bool causal = true, round_weights = false;
  int64_t window = 0, splits = 1;
  float* partial = nullptr;  // [T, heads, splits, value_dim + 2]: maximum, sum, output

  float sink(int64_t head) const {
    if (sink_dtype == DType::f16) return to_float(get(static_cast<const F16*>(sinks) + head));
    if (sink_dtype == DType::bf16) return to_float(get(static_cast<const BF16*>(sinks) + head));
    return get(static_cast<const float*>(sinks) + head);
  }
  /// What the output of a head is multiplied by, given its maximum and sum: 1 / sum, the sink included.
  float factor(int64_t head, float maximum, float sum) const {
    if (sum == 0) return 0;
    if (!sinks) return 1 / sum;
    const float s = sink(head), top = s > maximum ? s : maximum;
    const float weight = std::exp(maximum - top);
    return weight / (sum * weight + std::exp(s - top));
  }
};

/// Some rows of one sequence against one key head and one split of the keys.
struct AttentionItem {
  int64_t sequence, first_token, first_position, length;  // the sequence's first query token and its position
  int64_t first_row, rows;                                // row r is token r / group, head r % group
  int64_t kv_head, split;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Floats that a thread works in.
inline int64_t attention_scratch(int64_t dim, int64_t value_dim) {
  return 2 * kItemRows * (round_up(dim, 16) + round_up(value_dim, 16)) + kTileKeys * 32 + 16 * kItemRows;
}

}  // namespace halfbyte::cpu
#endif

#define HALFBYTE_FILE "attention.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "activations.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

#if HALFBYTE_ISA_LEVEL == 0
// Without an FMA instruction fma() is a library call; sums need no single rounding.
static inline F madd(F a, F b, F c) { return add(mul(a, b), c); }
static inline F where_greater(F a, F b, F x, F y) {
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
  return r;
}
constexpr int kBlock = 4;
#elif HALFBYTE_ISA_LEVEL == 2
static inline F madd(F a, F b, F c) { return fma(a, b, c); }
static inline F where_greater(F a, F b, F x, F y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
constexpr int kBlock = 4;
#else
static inline F madd(F a, F b, F c) { return fma(a, b, c); }
static inline F where_greater(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
constexpr int kBlock = 8;
#endif

constexpr int64_t kLanes = 2 * W;                    // rows of a group
constexpr int64_t kFewRows = W / 2 > 5 ? W / 2 : 5;  // fewer rows than this go by dot products
static_assert(kFewRows <= kMostFewRows && kItemRows % kLanes == 0, "");

/// Up to kTileKeys keys that exist, and their positions relative to the tile's base.
template <typename T>
struct Tile {
  int64_t n = 0;
  int64_t base = 0;
  const T* k[kTileKeys];
  const T* v[kTileKeys];
  float at[kTileKeys];

  /// Takes keys from position `next` on, stops at `end`; returns where to go on.
  int64_t take(const AttentionJob& job, const Ragged& batch, const AttentionItem& item, int64_t next,
               int64_t end) {
    n = 0;
    base = next;
    if (end - next > kTileKeys) end = next + kTileKeys;
    while (next < end) {
      const int64_t offset = next % job.block_len;
      int64_t run = job.block_len - offset;
      if (run > end - next) run = end - next;
      const int64_t slot = batch.slot(item.sequence, next, job.block_len, job.blocks);
      for (int64_t i = 0; slot >= 0 && i < run; ++i, ++n) {
        const int64_t row = (slot + i) * job.kv_heads + item.kv_head;
        k[n] = static_cast<const T*>(job.keys) + row * job.dim;
        v[n] = static_cast<const T*>(job.values) + row * job.value_dim;
        at[n] = static_cast<float>(next - base + i);
      }
      next += run;
    }
    return next;
  }
};

/// The keys a row may see, [low, high).
struct Range {
  int64_t low, high;
};
static Range visible(const AttentionJob& job, const AttentionItem& item, int64_t row) {
  const int64_t position = item.first_position + row / job.group;
  Range r{0, item.length};
  if (job.causal && position + 1 < r.high) r.high = position + 1;
  if (job.window > 0 && position - job.window + 1 > 0) r.low = position - job.window + 1;
  if (r.high < r.low) r.high = r.low;
  return r;
}

/// The item's share of the keys that any of its rows sees.
static Range share(const AttentionJob& job, const AttentionItem& item) {
  const Range first = visible(job, item, item.first_row);
  const Range last = visible(job, item, item.first_row + item.rows - 1);
  const int64_t low = first.low, high = last.high > first.high ? last.high : first.high;
  if (job.splits == 1 || high <= low) return {low, high < low ? low : high};
  int64_t part = round_up((high - low + job.splits - 1) / job.splits, kTileKeys);
  if (part < 4 * kTileKeys) part = 4 * kTileKeys;
  const int64_t begin = low + item.split * part;
  if (begin >= high) return {high, high};
  return {begin, begin + part < high ? begin + part : high};
}

template <typename T>
static const T* query_row(const AttentionJob& job, const AttentionItem& item, int64_t row) {
  const int64_t token = item.first_token + row / job.group;
  return static_cast<const T*>(job.q) + token * job.q_stride +
         (item.kv_head * job.group + row % job.group) * job.dim;
}

template <typename T>
static void widen(const T* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(x + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i), n - i);
}

template <typename T>
static void write_scaled(T* y, const float* x, float factor, int64_t n) {
  const F f = set1(factor);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, mul(load(x + i), f));
  if (i < n) store_n(y + i, mul(load_n(x + i, n - i), f), n - i);
}

/// The result of a row: the final one, or this split's part.
template <typename T>
static void finish_row(const AttentionJob& job, const AttentionItem& item, int64_t row, const float* out,
                       float maximum, float sum) {
  const int64_t token = item.first_token + row / job.group;
  const int64_t head = item.kv_head * job.group + row % job.group;
  const int64_t at = token * job.heads + head;
  if (job.splits > 1) {
    float* part = job.partial + (at * job.splits + item.split) * (job.value_dim + 2);
    part[0] = maximum;
    part[1] = sum;
    __builtin_memcpy(part + 2, out, static_cast<size_t>(job.value_dim) * sizeof(float));
  } else {
    write_scaled(static_cast<T*>(job.y) + at * job.value_dim, out, job.factor(head, maximum, sum),
                 job.value_dim);
  }
}

// ---- few rows

/// scores[r, j] = q[r, :] . k[j], R rows and B keys at a time.
template <typename T, int R, int B>
static void dots(const T* const* k, const float* q, int64_t q_step, int64_t dim, float* scores) {
  F sum[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sum[r][b] = zero();
  }
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    F x[B];
    for (int b = 0; b < B; ++b) x[b] = load(k[b] + d);
    for (int r = 0; r < R; ++r) {
      const F y = load(q + r * q_step + d);
      for (int b = 0; b < B; ++b) sum[r][b] = madd(x[b], y, sum[r][b]);
    }
  }
  if (d < dim) {
    for (int b = 0; b < B; ++b) {
      const F x = load_n(k[b] + d, dim - d);
      for (int r = 0; r < R; ++r) sum[r][b] = madd(x, load(q + r * q_step + d), sum[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) scores[r * kTileKeys + b] = reduce_add(sum[r][b]);
  }
}

template <typename T, int R>
static void few_scores(const AttentionJob& job, const Tile<T>& tile, const float* q, int64_t q_step,
                       float* scores, bool first) {
  constexpr int B = R == 4 && HALFBYTE_ISA_LEVEL != 512 ? 2 : 4;
  int64_t j = 0;
  for (; j + B <= tile.n; j += B) {
    // a head's rows lie KV heads apart: too far for the hardware to guess
    if (first) {
      const int64_t ahead = j + 2 * B < tile.n ? j + 2 * B : j;
      for (int b = 0; b < B; ++b) {
        if (ahead + b < tile.n) {
          for (int64_t d = 0; d < job.dim; d += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(tile.k[ahead + b] + d);
        }
        for (int64_t d = 0; d < job.value_dim; d += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(tile.v[j + b] + d);
      }
    }
    dots<T, R, B>(tile.k + j, q, q_step, job.dim, scores + j);
  }
  for (; j < tile.n; ++j) dots<T, R, 1>(tile.k + j, q, q_step, job.dim, scores + j);
}

/// out[r, i .. i + B W) = out * scale[r] + sum over keys of p[r, j] v[j].
template <typename T, int R, int B>
static void mix(const Tile<T>& tile, const float* p, const float* scale, float* out, int64_t step,
                int64_t i) {
  F sum[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sum[r][b] = mul(load(out + r * step + i + b * W), set1(scale[r]));
  }
  for (int64_t j = 0; j < tile.n; ++j) {
    F x[B];
    for (int b = 0; b < B; ++b) x[b] = load(tile.v[j] + i + b * W);
    for (int r = 0; r < R; ++r) {
      const F w = set1(p[r * kTileKeys + j]);
      for (int b = 0; b < B; ++b) sum[r][b] = madd(w, x[b], sum[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) store(out + r * step + i + b * W, sum[r][b]);
  }
}

template <typename T, int R>
static void few_values(const Tile<T>& tile, const float* p, const float* scale, float* out, int64_t step,
                       int64_t n) {
  constexpr int B = R == 4 && HALFBYTE_ISA_LEVEL == 512 ? 4 : 8 / R;
  int64_t i = 0;
  for (; i + B * W <= n; i += B * W) mix<T, R, B>(tile, p, scale, out, step, i);
  for (; i + W <= n; i += W) mix<T, R, 1>(tile, p, scale, out, step, i);
  if (i == n) return;
  F sum[R];
  for (int r = 0; r < R; ++r) sum[r] = mul(load(out + r * step + i), set1(scale[r]));
  for (int64_t j = 0; j < tile.n; ++j) {
    const F x = load_n(tile.v[j] + i, n - i);
    for (int r = 0; r < R; ++r) sum[r] = madd(set1(p[r * kTileKeys + j]), x, sum[r]);
  }
  for (int r = 0; r < R; ++r) store(out + r * step + i, sum[r]);
}

/// Scores of one row to weights in place; updates its maximum and sum, returns what older output is scaled
/// by.
template <typename T>
static float few_softmax(const AttentionJob& job, float* s, const float* at, int64_t n, int64_t base,
                         Range range, int64_t position, int64_t head, float* maximum, float* sum) {
  const int64_t padded = round_up(n, W);
  if (job.softcap > 0) {
    for (int64_t j = 0; j < n; j += W) {
      store(s + j, mul(tanh(div(load(s + j), set1(job.softcap))), set1(job.softcap)));
    }
  }
  if (job.slopes) {
    const float slope = get(job.slopes + head), shift = static_cast<float>(base - position);
    for (int64_t j = 0; j < n; ++j) s[j] += slope * (at[j] + shift);
  }
  const float low = static_cast<float>(range.low - base), high = static_cast<float>(range.high - base);
  for (int64_t j = 0; j < n; ++j) {
    if (at[j] < low || at[j] >= high) s[j] = -__builtin_inff();
  }
  for (int64_t j = n; j < padded; ++j) s[j] = -__builtin_inff();
  F most = set1(*maximum);
  for (int64_t j = 0; j < n; j += W) most = max(load(s + j), most);
  const float top = reduce_max(most);
  F total = zero();
  for (int64_t j = 0; j < n; j += W) {
    const F x = load(s + j);
    const F p = where_greater(set1(kLowest), x, zero(), exp(sub(x, set1(top))));
    store(s + j, job.round_weights ? rounded<T>(p) : p);
    total = add(total, p);
  }
  float change[W];
  store(change, exp(sub(set1(*maximum), set1(top))));
  *sum = *sum * change[0] + reduce_add(total);
  *maximum = top;
  return change[0];
}

template <typename T>
static void attend_few(const AttentionJob& job, const Ragged& batch, const AttentionItem& item,
                       float* scratch) {
  const int64_t q_step = round_up(job.dim, 16), out_step = round_up(job.value_dim, 16);
  float* q = scratch;
  float* out = q + kMostFewRows * q_step;
  float* scores = out + kMostFewRows * out_step;
  float maximum[kMostFewRows], sum[kMostFewRows], change[kMostFewRows];
  for (int64_t r = 0; r < item.rows; ++r) {
    float* to = q + r * q_step;
    widen(query_row<T>(job, item, item.first_row + r), to, job.dim);
    for (int64_t d = 0; d < q_step; ++d) to[d] = d < job.dim ? to[d] * job.scale : 0;
    for (int64_t d = 0; d < out_step; ++d) out[r * out_step + d] = 0;
    maximum[r] = kLowest;
    sum[r] = 0;
  }
  const Range keys = share(job, item);
  Tile<T> tile;
  for (int64_t next = keys.low; next < keys.high;) {
    next = tile.take(job, batch, item, next, keys.high);
    if (tile.n == 0) continue;
    for (int64_t r = 0; r < item.rows;) {
      const int64_t left = item.rows - r;
      float* to = scores + r * kTileKeys;
      const float* from = q + r * q_step;
      if (left >= 4)
        few_scores<T, 4>(job, tile, from, q_step, to, r == 0), r += 4;
      else if (left >= 2)
        few_scores<T, 2>(job, tile, from, q_step, to, r == 0), r += 2;
      else
        few_scores<T, 1>(job, tile, from, q_step, to, r == 0), r += 1;
    }
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t row = item.first_row + r;
      change[r] = few_softmax<T>(job, scores + r * kTileKeys, tile.at, tile.n, tile.base,
                                 visible(job, item, row), item.first_position + row / job.group,
                                 item.kv_head * job.group + row % job.group, &maximum[r], &sum[r]);
    }
    for (int64_t r = 0; r < item.rows;) {
      const int64_t left = item.rows - r;
      const float* p = scores + r * kTileKeys;
      float* to = out + r * out_step;
      if (left >= 4)
        few_values<T, 4>(tile, p, change + r, to, out_step, job.value_dim), r += 4;
      else if (left >= 2)
        few_values<T, 2>(tile, p, change + r, to, out_step, job.value_dim), r += 2;
      else
        few_values<T, 1>(tile, p, change + r, to, out_step, job.value_dim), r += 1;
    }
  }
  for (int64_t r = 0; r < item.rows; ++r) {
    finish_row<T>(job, item, item.first_row + r, out + r * out_step, maximum[r], sum[r]);
  }
}

// ---- many rows

/// c[i, lanes] = c * scale + sum over j of a[i * row + j * col] b[j, lanes] for R rows i; without `scale` c
/// starts from zero. b and c are [., kLanes], of which V vectors are used.
template <int R, int V>
static inline void block(float* c, const float* a, int64_t row, int64_t col, const float* b, int64_t depth,
                         const F* scale) {
  F sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sum[r][v] = scale ? mul(load(c + r * kLanes + v * W), scale[v]) : zero();
    }
  }
  for (int64_t j = 0; j < depth; ++j, a += col, b += kLanes) {
    F x[V];
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
    for (int r = 0; r < R; ++r) {
      const F w = set1(a[r * row]);
      for (int v = 0; v < V; ++v) sum[r][v] = madd(w, x[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * kLanes + v * W, sum[r][v]);
  }
}

template <int V>
static void product(float* c, int64_t rows, const float* a, int64_t row, int64_t col, const float* b,
                    int64_t depth, const F* scale) {
  int64_t i = 0;
  for (; i + kBlock <= rows; i += kBlock) {
    block<kBlock, V>(c + i * kLanes, a + i * row, row, col, b, depth, scale);
  }
  for (; i < rows; ++i) block<1, V>(c + i * kLanes, a + i * row, row, col, b, depth, scale);
}

/// What is kept for each row of an item; a group of kLanes rows is a contiguous piece of every array.
struct Rows {
  float *maximum, *sum, *low, *high, *slope, *shift;
};

/// One tile of keys for one group of rows.
template <typename T, int V>
static void step(const AttentionJob& job, const Rows& rows, int64_t lane, const float* q, const float* k,
                 const float* v, const float* at, int64_t n, bool masked, float* p, float* out) {
  product<V>(p, n, k, job.dim, 1, q, job.dim, nullptr);
  F most[V], change[V], total[V];
  for (int i = 0; i < V; ++i) most[i] = load(rows.maximum + lane + i * W);
  if (job.softcap > 0 || job.slopes || masked) {
    for (int i = 0; i < V; ++i) {
      const F low = load(rows.low + lane + i * W), high = load(rows.high + lane + i * W);
      const F slope = load(rows.slope + lane + i * W), shift = load(rows.shift + lane + i * W);
      for (int64_t j = 0; j < n; ++j) {
        F s = load(p + j * kLanes + i * W);
        if (job.softcap > 0) s = mul(tanh(div(s, set1(job.softcap))), set1(job.softcap));
        if (job.slopes) s = add(s, mul(slope, add(set1(at[j]), shift)));
        s = where_greater(low, set1(at[j]), set1(-__builtin_inff()), s);
        s = where_greater(high, set1(at[j]), s, set1(-__builtin_inff()));
        store(p + j * kLanes + i * W, s);
      }
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int i = 0; i < V; ++i) most[i] = max(load(p + j * kLanes + i * W), most[i]);
  }
  for (int i = 0; i < V; ++i) {
    change[i] = exp(sub(load(rows.maximum + lane + i * W), most[i]));
    total[i] = mul(load(rows.sum + lane + i * W), change[i]);
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int i = 0; i < V; ++i) {
      const F s = load(p + j * kLanes + i * W);
      const F w = where_greater(set1(kLowest), s, zero(), exp(sub(s, most[i])));
      store(p + j * kLanes + i * W, job.round_weights ? rounded<T>(w) : w);
      total[i] = add(total[i], w);
    }
  }
  for (int i = 0; i < V; ++i) {
    store(rows.maximum + lane + i * W, most[i]);
    store(rows.sum + lane + i * W, total[i]);
  }
  product<V>(out, job.value_dim, v, 1, job.value_dim, p, n, change);
}

template <typename T>
static void attend_many(const AttentionJob& job, const Ragged& batch, const AttentionItem& item,
                        float* scratch) {
  const int64_t groups = (item.rows + kLanes - 1) / kLanes, lanes = groups * kLanes;
  float* q = scratch;                          // [groups, dim, kLanes]
  float* out = q + kItemRows * job.dim;        // [groups, value_dim, kLanes]
  float* k = out + kItemRows * job.value_dim;  // [keys, dim]; first and last also one row
  float* v = k + kTileKeys * round_up(job.dim, 16);
  float* p = v + kTileKeys * round_up(job.value_dim, 16);
  float* each = p + kTileKeys * kLanes;
  const Rows rows{each,
                  each + kItemRows,
                  each + 2 * kItemRows,
                  each + 3 * kItemRows,
                  each + 4 * kItemRows,
                  each + 5 * kItemRows};
  for (int64_t r = 0; r < lanes; ++r) {
    float* to = q + r / kLanes * kLanes * job.dim + r % kLanes;
    if (r < item.rows) {
      widen(query_row<T>(job, item, item.first_row + r), k, job.dim);
      for (int64_t d = 0; d < job.dim; ++d) to[d * kLanes] = k[d] * job.scale;
    } else {
      for (int64_t d = 0; d < job.dim; ++d) to[d * kLanes] = 0;
    }
    const int64_t head = item.kv_head * job.group + (item.first_row + r) % job.group;
    rows.maximum[r] = kLowest;
    rows.sum[r] = rows.slope[r] = rows.shift[r] = 0;
    if (job.slopes && r < item.rows) rows.slope[r] = get(job.slopes + head);
  }
  for (int64_t i = 0; i < lanes * job.value_dim; ++i) out[i] = 0;

  const Range keys = share(job, item);
  Tile<T> tile;
  for (int64_t next = keys.low; next < keys.high;) {
    next = tile.take(job, batch, item, next, keys.high);
    if (tile.n == 0) continue;
    bool masked = false;
    for (int64_t r = 0; r < lanes; ++r) {
      const int64_t row = item.first_row + (r < item.rows ? r : 0);
      const Range range = visible(job, item, row);
      rows.low[r] = static_cast<float>(range.low - tile.base);
      rows.high[r] = static_cast<float>(range.high - tile.base);
      rows.shift[r] = static_cast<float>(tile.base - item.first_position - row / job.group);
      masked = masked || range.low > tile.base || range.high < next;
    }
    for (int64_t j = 0; j < tile.n; ++j) {
      widen(tile.k[j], k + j * job.dim, job.dim);
      widen(tile.v[j], v + j * job.value_dim, job.value_dim);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const float* queries = q + g * kLanes * job.dim;
      float* to = out + g * kLanes * job.value_dim;
      if (item.rows - g * kLanes > W) {
        step<T, 2>(job, rows, g * kLanes, queries, k, v, tile.at, tile.n, masked, p, to);
      } else {
        step<T, 1>(job, rows, g * kLanes, queries, k, v, tile.at, tile.n, masked, p, to);
      }
    }
  }
  for (int64_t r = 0; r < item.rows; ++r) {
    const float* from = out + r / kLanes * kLanes * job.value_dim + r % kLanes;
    for (int64_t d = 0; d < job.value_dim; ++d) v[d] = from[d * kLanes];
    finish_row<T>(job, item, item.first_row + r, v, rows.maximum[r], rows.sum[r]);
  }
}

static void attend(const AttentionJob& job, const Ragged& batch, const AttentionItem& item, float* scratch) {
  with_float_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (item.rows < kFewRows)
      attend_few<T>(job, batch, item, scratch);
    else
      attend_many<T>(job, batch, item, scratch);
  });
}

/// The splits of one head of one token made one.
static void merge(const AttentionJob& job, int64_t token, int64_t head) {
  const int64_t at = token * job.heads + head, size = job.value_dim + 2;
  float* first = job.partial + at * job.splits * size;
  float top = kLowest, sum = 0;
  for (int64_t i = 0; i < job.splits; ++i) {
    // a NaN shows in the sum
    if (first[i * size] > top) top = first[i * size];
  }
  for (int64_t i = 0; i < job.splits; ++i) {
    float* part = first + i * size;
    const float weight = part[1] == 0 ? 0 : __builtin_expf(part[0] - top);
    sum += part[1] * weight;
    float* out = first + 2;
    for (int64_t d = 0; d < job.value_dim; ++d) {
      const float x = part[1] == 0 ? 0 : part[2 + d] * weight;
      out[d] = i == 0 ? x : out[d] + x;
    }
  }
  with_float_type(job.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    write_scaled(static_cast<T*>(job.y) + at * job.value_dim, first + 2, job.factor(head, top, sum),
                 job.value_dim);
  });
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

bool is_cache(const View& v) { return v.ndim == 4 && v.is_contiguous(); }

/// Into how many parts an item's keys are cut at most: enough that every thread has a few items, but no part
/// shorter than 256 keys at full capacity. Known from the shapes alone.
int64_t count_splits(const View& q, const View& key_cache, const RaggedBatch& batch) {
  const int64_t kv_heads = key_cache.shape[2], sequences = batch.lengths.size();
  if (q.size() == 0 || kv_heads <= 0) return 1;
  const int64_t blocks = (q.shape[0] * (q.shape[1] / kv_heads) + kItemRows - 1) / kItemRows;
  const int64_t items = (blocks > sequences ? blocks : sequences) * kv_heads;
  const int64_t threads = pool_threads();
  if (threads == 1 || items >= 2 * threads) return 1;
  const int64_t wanted = (3 * threads + items - 1) / items;
  const int64_t most = batch.block_table.cols() * key_cache.shape[1] / (4 * kTileKeys);
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

/// A sequence's place among the items.
struct Place {
  int64_t begin, end, position, items;  // items: those of all sequences before it
};

}  // namespace

Status CpuBackend::paged_write(Queue, View key_cache, View value_cache, View k, View v,
                               const RaggedBatch& batch) {
  if (Status status = check_ragged("paged_write", batch); !status.ok()) return status;
  if (!is_cache(key_cache) || !is_cache(value_cache)) {
    return refuse("paged_write", "the caches must be contiguous [blocks, block_len, heads, head_dim]");
  }
  if (!is_token_rows(k) || !is_token_rows(v) || k.shape[0] != v.shape[0]) {
    return refuse("paged_write", "k and v must be [tokens, heads, head_dim] with contiguous heads");
  }
  if (k.dtype != key_cache.dtype || v.dtype != value_cache.dtype) {
    return refuse_dtype("paged_write", "k and v must have the dtype of their caches");
  }
  if (k.shape[1] != key_cache.shape[2] || k.shape[2] != key_cache.shape[3] ||
      v.shape[1] != value_cache.shape[2] || v.shape[2] != value_cache.shape[3] ||
      key_cache.shape[0] != value_cache.shape[0] || key_cache.shape[1] != value_cache.shape[1]) {
    return refuse("paged_write", "k and v do not fit the caches");
  }
  const int64_t blocks = key_cache.shape[0], block_len = key_cache.shape[1];
  if (k.shape[0] == 0 || block_len == 0) return {};
  const int64_t key_bytes = k.shape[1] * k.shape[2] * size_of(k.dtype),
                key_step = k.strides[0] * size_of(k.dtype);
  const int64_t value_bytes = v.shape[1] * v.shape[2] * size_of(v.dtype);
  const int64_t value_step = v.strides[0] * size_of(v.dtype);
  const Ragged ragged(batch);
  ragged.each(k.shape[0], [&](int64_t s, int64_t begin, int64_t end, int64_t position) {
    parallel_for(end - begin, 1 + 65536 / (key_bytes + value_bytes + 1), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t slot = ragged.slot(s, position + i, block_len, blocks);
        if (slot < 0) continue;
        std::memcpy(key_cache.as<char>() + slot * key_bytes, k.as<const char>() + (begin + i) * key_step,
                    static_cast<size_t>(key_bytes));
        std::memcpy(value_cache.as<char>() + slot * value_bytes,
                    v.as<const char>() + (begin + i) * value_step, static_cast<size_t>(value_bytes));
      }
    });
  });
  return {};
}

size_t CpuBackend::paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                             const RaggedBatch& batch) const {
  if (q.ndim != 3 || key_cache.ndim != 4 || value_cache.ndim != 4) return 0;
  const int64_t dim = q.shape[2], value_dim = value_cache.shape[3];
  const int64_t splits = count_splits(q, key_cache, batch);
  const int64_t partial = splits > 1 ? q.shape[0] * q.shape[1] * splits * (value_dim + 2) : 0;
  const int64_t floats = pool_threads() * attention_scratch(dim, value_dim) + partial;
  return static_cast<size_t>(floats) * sizeof(float) +
         static_cast<size_t>(batch.lengths.size()) * sizeof(Place);
}

Status CpuBackend::paged_attention(Queue, View y, View q, View key_cache, View value_cache,
                                   const RaggedBatch& batch, const AttentionOptions& options,
                                   View workspace) {
  if (Status status = check_ragged("paged_attention", batch); !status.ok()) return status;
  if (!is_cache(key_cache) || !is_cache(value_cache)) {
    return refuse("paged_attention", "the caches must be contiguous [blocks, block_len, heads, head_dim]");
  }
  if (!is_token_rows(q) || y.ndim != 3 || !y.is_contiguous()) {
    return refuse("paged_attention", "q and y must be [tokens, heads, head_dim] with contiguous heads");
  }
  const int64_t tokens = q.shape[0], heads = q.shape[1], dim = q.shape[2];
  const int64_t kv_heads = key_cache.shape[2], value_dim = value_cache.shape[3];
  if (!is_float(q.dtype) || y.dtype != q.dtype || key_cache.dtype != q.dtype ||
      value_cache.dtype != q.dtype) {
    return refuse_dtype("paged_attention", "q, y and the caches must be of one float dtype");
  }
  if (key_cache.shape[3] != dim || value_cache.shape[0] != key_cache.shape[0] ||
      value_cache.shape[1] != key_cache.shape[1] || value_cache.shape[2] != kv_heads || kv_heads < 1 ||
      heads % kv_heads != 0 || y.shape[0] != tokens || y.shape[1] != heads || y.shape[2] != value_dim) {
    return refuse("paged_attention", "q, y and the caches do not fit together");
  }
  if (options.alibi_slopes &&
      (options.alibi_slopes.dtype != DType::f32 || options.alibi_slopes.size() != heads ||
       !options.alibi_slopes.is_contiguous())) {
    return refuse("paged_attention", "alibi_slopes must be float32 [heads]");
  }
  if (options.sinks &&
      (!is_float(options.sinks.dtype) || options.sinks.size() != heads || !options.sinks.is_contiguous())) {
    return refuse("paged_attention", "sinks must be float [heads]");
  }
  if (options.window < 0) return Status::error(Code::value, "paged_attention: the window is negative");
  if (y.size() == 0) return {};
  if (!workspace || static_cast<size_t>(workspace.size() * size_of(workspace.dtype)) <
                        paged_attention_workspace(q, key_cache, value_cache, batch)) {
    return refuse("paged_attention", "the workspace is too small");
  }

  AttentionJob job;
  job.dtype = q.dtype;
  job.q = q.data;
  job.y = y.data;
  job.keys = key_cache.data;
  job.values = value_cache.data;
  job.slopes = options.alibi_slopes ? options.alibi_slopes.as<const float>() : nullptr;
  if (options.sinks) {
    job.sinks = options.sinks.data;
    job.sink_dtype = options.sinks.dtype;
  }
  job.q_stride = q.strides[0];
  job.heads = heads;
  job.kv_heads = kv_heads;
  job.group = heads / kv_heads;
  job.dim = dim;
  job.value_dim = value_dim;
  job.blocks = key_cache.shape[0];
  job.block_len = key_cache.shape[1];
  job.scale = options.scale;
  job.softcap = options.softcap;
  job.causal = options.causal;
  job.round_weights = options.round_weights;
  job.window = options.window;
  job.splits = count_splits(q, key_cache, batch);

  const Ragged ragged(batch);
  Place* places = workspace.as<Place>();
  float* scratch = reinterpret_cast<float*>(places + ragged.sequences);
  const int64_t scratch_step = attention_scratch(dim, value_dim);
  job.partial = scratch + pool_threads() * scratch_step;
  int64_t items = 0, first_token = tokens, end_token = tokens;
  ragged.each(tokens, [&](int64_t s, int64_t begin, int64_t end, int64_t position) {
    places[s] = {begin, end, position, items};
    items += ((end - begin) * job.group + kItemRows - 1) / kItemRows;
    if (s == 0) first_token = begin;
    end_token = end;
  });
  const size_t token_bytes = static_cast<size_t>(heads * value_dim * size_of(y.dtype));
  std::memset(y.data, 0, token_bytes * static_cast<size_t>(first_token));
  std::memset(y.as<char>() + token_bytes * static_cast<size_t>(end_token), 0,
              token_bytes * static_cast<size_t>(tokens - end_token));
  if (items == 0) return {};

  const int64_t capacity = ragged.max_blocks * job.block_len, per_block = kv_heads * job.splits;
  const int64_t total = items * per_block;
  const auto attend = HALFBYTE_PICK(attend);
  struct Context {
    const AttentionJob& job;
    const Ragged& ragged;
    const Place* places;
    float* scratch;
    int64_t scratch_step, capacity, per_block, total;
    decltype(attend) run;
    std::atomic<int64_t> next{0};
  } context{job, ragged, places, scratch, scratch_step, capacity, per_block, total, attend};
  const int64_t lanes = total < pool_threads() ? total : pool_threads();
  // one scratch area a lane; the last items of a causal prefill are the longest, so they go first
  pool_run(
      lanes,
      [](void* p, int64_t lane) {
        Context& c = *static_cast<Context*>(p);
        for (;;) {
          const int64_t taken = c.next.fetch_add(1, std::memory_order_relaxed);
          if (taken >= c.total) return;
          const int64_t index = c.total - 1 - taken, block = index / c.per_block;
          int64_t low = 0, high = c.ragged.sequences;  // the last sequence that begins at or before `block`
          while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (c.places[middle].items <= block)
              low = middle;
            else
              high = middle;
          }
          const Place& place = c.places[low];
          AttentionItem item;
          item.sequence = low;
          item.first_token = place.begin;
          item.first_position = place.position;
          item.length = Ragged::clamp(get(c.ragged.lengths + low), 0, c.capacity);
          item.first_row = (block - place.items) * kItemRows;
          const int64_t left = (place.end - place.begin) * c.job.group - item.first_row;
          item.rows = left < kItemRows ? left : kItemRows;
          item.kv_head = index % c.per_block / c.job.splits;
          item.split = index % c.job.splits;
          c.run(c.job, c.ragged, item, c.scratch + lane * c.scratch_step);
        }
      },
      &context);
  if (job.splits > 1) {
    const auto merge = HALFBYTE_PICK(merge);
    parallel_for((end_token - first_token) * heads, 1 + 16384 / (job.splits * (value_dim + 2)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) merge(job, first_token + i / heads, i % heads);
                 });
  }
  return {};
}

}  // namespace halfbyte::cpu
#endif
