// cross_entropy, argmax, sample over rows of logits. sample (defined in backend.h) sorts nothing: top-k and
// top-p are both the smallest key that has less than a given weight above it, found by a radix search over
// histograms of the keys' bits, each token weighing 1 or its probability. Rows run in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../random.h"
#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

#define HALFBYTE_FILE "sampling.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

/// Largest element, NaN left out; -infinity when there is none.
static float row_max(DType dtype, const void* row, int64_t n) {
  float most = -__builtin_inff();
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(row);
    F a = set1(most), b = a;
    int64_t i = 0;
    // max() gives its second operand when either is NaN
    for (; i + 2 * W <= n; i += 2 * W) {
      a = max(load(x + i), a);
      b = max(load(x + i + W), b);
    }
    most = reduce_max(max(a, b));
    for (; i < n; ++i) {
      T element;
      __builtin_memcpy(&element, x + i, sizeof(T));
      const float value = to_float(element);
      if (value > most) most = value;
    }
  });
  return most;
}

/// Index of the first element equal to `value`, or 0.
static int64_t row_find(DType dtype, const void* row, int64_t n, float value) {
  int64_t found = 0;
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(row);
    for (int64_t i = 0; i < n; ++i) {
      T element;
      __builtin_memcpy(&element, x + i, sizeof(T));
      if (to_float(element) == value) {
        found = i;
        return;
      }
    }
  });
  return found;
}

/// Sum of exp(x - most): 32 vectors at a time in fp32, those in double.
static double row_sum_exp(DType dtype, const void* row, int64_t n, float most) {
  double sum = 0;
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(row);
    const F shift = set1(most);
    int64_t i = 0;
    while (i + W <= n) {
      F part = zero();
      for (int k = 0; k < 32 && i + W <= n; ++k, i += W) part = add(part, exp(sub(load(x + i), shift)));
      float lanes[W];
      store(lanes, part);
      for (int lane = 0; lane < W; ++lane) sum += static_cast<double>(lanes[lane]);
    }
    if (i < n) {
      float lanes[W];
      store(lanes, exp(sub(load_n(x + i, n - i), shift)));
      for (int64_t lane = 0; lane < n - i; ++lane) sum += static_cast<double>(lanes[lane]);
    }
  });
  return sum;
}

static void row_widen(DType dtype, const void* row, float* y, int64_t n) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(row);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i));
    if (i < n) store_n(y + i, load_n(x + i, n - i), n - i);
  });
}

/// y = exp(x - most).
static void row_exp(const float* x, float* y, int64_t n, float most) {
  const F shift = set1(most);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, exp(sub(load(x + i), shift)));
  if (i < n) store_n(y + i, exp(sub(load_n(x + i, n - i), shift)), n - i);
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

/// Logits and weights of one row.
int64_t lane_floats(int64_t vocabulary) { return 2 * vocabulary; }
int64_t lane_count(const View& logits) { return std::min<int64_t>(logits.shape[0], pool_threads()); }

/// Unsigned keys in the order of the floats (no NaN; -0 and 0 are one).
uint32_t key_of(float x) {
  const uint32_t bits = float_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The smallest key K among the tokens with key >= floor such that the weights of all keys above K sum to
/// less than `target`: with weights of 1 and target k the k-th largest key. The weight of token i is
/// weights[i], or 1 without weights. Sums of larger keys come first, so the result does not depend on what
/// lies below it.
uint32_t threshold(const float* l, const float* weights, int64_t n, uint32_t floor, double target) {
  constexpr int kShifts[3] = {21, 10, 0}, kWidths[3] = {11, 11, 10};
  double sums[2048];
  bool present[2048];
  uint32_t prefix = 0;
  double above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass], width = kWidths[pass], buckets = 1 << width;
    std::fill(sums, sums + buckets, 0.0);
    std::fill(present, present + buckets, false);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(l[i]);
      if (key < floor || (pass > 0 && (key >> (shift + width)) != prefix)) continue;
      const uint32_t bucket = (key >> shift) & static_cast<uint32_t>(buckets - 1);
      sums[bucket] += weights ? static_cast<double>(weights[i]) : 1.0;
      present[bucket] = true;
    }
    // the last bucket from the top whose larger keys still weigh less than the target holds K
    int chosen = -1;
    double before = above;
    for (int b = buckets - 1; b >= 0; --b) {
      if (!present[b]) continue;
      if (chosen >= 0 && !(before < target)) break;
      chosen = b;
      above = before;
      before += sums[b];
    }
    if (chosen < 0) return floor;
    prefix = (prefix << width) | static_cast<uint32_t>(chosen);
  }
  return prefix;
}

struct SampleKernels {
  decltype(HALFBYTE_PICK(row_widen)) widen;
  decltype(HALFBYTE_PICK(row_max)) most;
  decltype(HALFBYTE_PICK(row_find)) find;
  decltype(HALFBYTE_PICK(row_exp)) exp;
};

int64_t choose(const SampleKernels& kernels, DType dtype, const void* logits, int64_t n, const float* params,
               double u, const uint8_t* seen, float* l, float* weights) {
  kernels.widen(dtype, logits, l, n);
  for (int64_t i = 0; i < n; ++i) {
    const float x = l[i];
    l[i] = x != x ? -std::numeric_limits<float>::infinity() : x > kLargest ? kLargest : x;
  }
  const float penalty = params[kRepetitionPenalty];
  if (seen && penalty > 0 && penalty != 1) {
    for (int64_t i = 0; i < n; ++i) {
      if (seen[i]) l[i] = std::min(kLargest, l[i] < 0 ? l[i] * penalty : l[i] / penalty);
    }
  }
  const float temperature = params[kTemperature], top_p = params[kTopP];
  const float best = kernels.most(DType::f32, l, n);
  if (best == -std::numeric_limits<float>::infinity()) return 0;
  if (!(temperature > 0) || top_p <= 0) return kernels.find(DType::f32, l, n, best);
  if (temperature != 1) {
    for (int64_t i = 0; i < n; ++i) {
      // -infinity stays: what a caller has masked is never chosen
      if (l[i] >= -kLargest) l[i] = std::max(-kLargest, std::min(kLargest, l[i] / temperature));
    }
  }
  const float most = kernels.most(DType::f32, l, n);
  kernels.exp(l, weights, n, most);
  uint32_t floor = key_of(-kLargest);
  const float k = params[kTopK];
  if (k >= 1 && k < static_cast<float>(n)) {
    floor = std::max(floor, threshold(l, nullptr, n, floor, std::floor(static_cast<double>(k))));
  }
  if (top_p < 1) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (key_of(l[i]) >= floor) total += static_cast<double>(weights[i]);
    }
    floor = std::max(floor, threshold(l, weights, n, floor, static_cast<double>(top_p) * total));
  }
  const float min_p = std::min(params[kMinP], 1.0f);
  const bool use_min_p = params[kMinP] > 0;
  const auto kept = [&](int64_t i) {
    return key_of(l[i]) >= floor && !(use_min_p && weights[i] < min_p && l[i] < most);
  };
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (kept(i)) total += static_cast<double>(weights[i]);
  }
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!kept(i)) continue;
    last = i;
    sum += static_cast<double>(weights[i]);
    if (sum > u * total) break;
  }
  return last;
}

bool is_rows(const View& v) { return v.ndim >= 1 && v.is_contiguous(); }

}  // namespace

Status CpuBackend::cross_entropy(Queue, View out, View logits, View targets) {
  if (Status status = check_cross_entropy("cross_entropy", out, logits, targets); !status.ok()) return status;
  const int64_t n = logits.shape[1], bytes = n * size_of(logits.dtype);
  const auto most = HALFBYTE_PICK(row_max);
  const auto sum_exp = HALFBYTE_PICK(row_sum_exp);
  parallel_for(logits.shape[0], 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t target = targets.dtype == DType::i32 ? get(targets.as<const int32_t>() + r)
                                                         : get(targets.as<const int64_t>() + r);
      const char* row = logits.as<const char>() + r * bytes;
      float loss = 0;
      if (target >= n) {
        loss = std::numeric_limits<float>::quiet_NaN();
      } else if (target >= 0) {
        const float top = most(logits.dtype, row, n);
        const float x = with_float_type(logits.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          return to_float(get(reinterpret_cast<const T*>(row) + target));
        });
        loss = static_cast<float>(std::log(sum_exp(logits.dtype, row, n, top)) +
                                  (static_cast<double>(top) - static_cast<double>(x)));
      }
      put(out.as<float>() + r, loss);
    }
  });
  return {};
}

Status CpuBackend::argmax(Queue, View y, View x) {
  if (!is_rows(x) || !y.is_contiguous() || y.size() != x.rows()) {
    return refuse("argmax", "x must be [..., V] and the result [...], contiguous");
  }
  if (!is_float(x.dtype) || y.dtype != DType::i32) {
    return refuse_dtype("argmax", "x must be float and the result int32");
  }
  const int64_t n = x.cols(), bytes = n * size_of(x.dtype);
  if (n == 0 && y.size() > 0) return refuse("argmax", "rows of nothing");
  const auto most = HALFBYTE_PICK(row_max);
  const auto find = HALFBYTE_PICK(row_find);
  parallel_for(x.rows(), 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* row = x.as<const char>() + r * bytes;
      const float top = most(x.dtype, row, n);
      // nothing but NaN and -infinity: no element is larger than another
      const bool none = top == -std::numeric_limits<float>::infinity();
      put(y.as<int32_t>() + r, none ? 0 : static_cast<int32_t>(find(x.dtype, row, n, top)));
    }
  });
  return {};
}

size_t CpuBackend::sample_workspace(const View& logits) const {
  if (logits.ndim != 2) return 0;
  return static_cast<size_t>(lane_count(logits) * lane_floats(logits.shape[1])) * sizeof(float);
}

Status CpuBackend::sample(Queue, View tokens, View logits, View params, View rng, View seen, View workspace) {
  if (!is_rows(logits) || logits.ndim != 2 || logits.shape[1] < 1) {
    return refuse("sample", "logits must be contiguous [S, V]");
  }
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  if (!is_float(logits.dtype) || tokens.dtype != DType::i32 || params.dtype != DType::f32 ||
      rng.dtype != DType::i64 || (seen && seen.dtype != DType::u8)) {
    return refuse_dtype("sample",
                        "tokens must be int32, params float32, rng int64, seen uint8, logits float");
  }
  if (tokens.size() != rows || params.size() != rows * kSamplingColumns || rng.size() != rows * 2 ||
      (seen && seen.size() != rows * n)) {
    return refuse("sample", "tokens, params, rng or seen do not fit the logits");
  }
  if (!tokens.is_contiguous() || !params.is_contiguous() || !rng.is_contiguous() ||
      (seen && !seen.is_contiguous())) {
    return refuse("sample", "operands must be contiguous");
  }
  if (rows == 0) return {};
  if (!workspace ||
      static_cast<size_t>(workspace.size() * size_of(workspace.dtype)) < sample_workspace(logits)) {
    return refuse("sample", "the workspace is too small");
  }
  struct Context {
    SampleKernels kernels;
    View &tokens, &logits, &params, &rng, &seen;
    float* scratch;
    int64_t rows, n;
    std::atomic<int64_t> next{0};
  } context{
      {HALFBYTE_PICK(row_widen), HALFBYTE_PICK(row_max), HALFBYTE_PICK(row_find), HALFBYTE_PICK(row_exp)},
      tokens,
      logits,
      params,
      rng,
      seen,
      workspace.as<float>(),
      rows,
      n};
  // one scratch area a lane
  pool_run(
      lane_count(logits),
      [](void* p, int64_t lane) {
        Context& c = *static_cast<Context*>(p);
        float* l = c.scratch + lane * lane_floats(c.n);
        for (;;) {
          const int64_t r = c.next.fetch_add(1, std::memory_order_relaxed);
          if (r >= c.rows) return;
          float params[kSamplingColumns];
          std::memcpy(params, c.params.as<const float>() + r * kSamplingColumns, sizeof params);
          int64_t* rng = c.rng.as<int64_t>() + 2 * r;
          const int64_t counter = get(rng + 1);
          uint8_t* seen = c.seen ? c.seen.as<uint8_t>() + r * c.n : nullptr;
          const char* row = c.logits.as<const char>() + r * c.n * size_of(c.logits.dtype);
          const int64_t token = choose(c.kernels, c.logits.dtype, row, c.n, params,
                                       uniform(get(rng), counter), seen, l, l + c.n);
          put(c.tokens.as<int32_t>() + r, static_cast<int32_t>(token));
          put(rng + 1, static_cast<int64_t>(static_cast<uint64_t>(counter) + 1));
          if (seen) seen[token] = 1;
        }
      },
      &context);
  return {};
}

}  // namespace halfbyte::cpu
#endif
