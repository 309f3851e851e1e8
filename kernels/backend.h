// The one door between the library and a device. Everything a device can do is a method of Backend: first the
// memory and the queues, then one method per op, with its shapes, dtypes and errors.
//
// How a backend is driven
//   A device has a compute queue and a copy queue. Each method that takes a Queue appends work to it and may
//   return before the work is done; work on one queue runs in order. The caller (native/executor) calls from
//   one thread per queue on a backend with `issue_threads() == 2`, and from one thread for both with 1. The
//   CPU backend does the work inside the call, on the process-wide pool, so its events are complete when
//   recorded. Order between queues, and between devices, is made by record() and wait().
//
// What an op may rely on and must keep
//   - Views were checked by the caller (lib/tensor/ops.ts states every rule); an op checks again what could
//   make it
//     read or write outside a view, and returns a Status. It never throws, aborts or exits.
//   - No host synchronisation and no allocation: what an op needs besides its operands is its workspace,
//   whose size
//     is known from the arguments alone.
//   - Lengths, positions, tokens, outlier counts are read on the device, never on the host.
//   - Sizes are 64-bit. rows = 0 is a no-op. Any K and N work.
//   - Unless an op says otherwise operands are contiguous. Element addresses need only the alignment of 1
//   byte on
//     the CPU (they may lie in a mapped file) and of the element on CUDA.
//   - Arithmetic is fp32 with one rounding to the output's dtype. "float" below means float32, float16 or
//   bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "formats.h"

namespace halfbyte {

// ---- values
// ---------------------------------------------------------------------------------------------------

constexpr int kMaxDims = 6;

/// A strided window on device memory. Strides are in elements. An absent optional operand has ndim = -1.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = -1;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  explicit operator bool() const { return ndim >= 0; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  /// Length of the last dimension; 1 for a scalar.
  int64_t cols() const { return ndim > 0 ? shape[ndim - 1] : 1; }
  /// Product of all dimensions but the last: what a row-wise op calls its rows.
  int64_t rows() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < ndim; ++i) n *= shape[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

enum class Code : uint8_t {
  ok,
  shape,
  dtype,
  value,
  out_of_memory,
  unsupported,
  cuda,
  driver,
  device_lost,
  internal
};

struct Status {
  Code code = Code::ok;
  std::string message;

  bool ok() const { return code == Code::ok; }
  static Status error(Code code, std::string message) { return Status{code, std::move(message)}; }
};

enum class Queue : uint8_t { compute, copy };

/// A point on a queue. Null is a point already passed.
struct EventState;
using Event = std::shared_ptr<EventState>;

struct GraphState;
using Graph = std::shared_ptr<GraphState>;

struct MemoryInfo {
  int64_t total = 0;      // bytes the device has (CPU: the cgroup's or the machine's)
  int64_t free = 0;       // bytes nobody uses
  int64_t allocated = 0;  // bytes handed out by this backend and not released
  int64_t reserved = 0;   // bytes held by this backend's pool, handed out or not
  int64_t peak = 0;       // highest `allocated` since the last reset
};

/// What allocate() says when there is not enough.
inline Status no_memory(const std::string& device, size_t bytes, const MemoryInfo& info) {
  return Status::error(Code::out_of_memory, device + ": " + std::to_string(bytes) + " bytes asked, " +
                                                std::to_string(info.free) + " of " +
                                                std::to_string(info.total) +
                                                " free; dispose tensors or use a smaller batch");
}

// ---- operands that come in parts
// ------------------------------------------------------------------------------

/// A 4-bit weight [N, K] in one of the layouts of formats.h. absmax is float32 [blocks], or uint8 [blocks]
/// when nested_absmax (float32 [ceil(blocks / 256)]), nested_code (float32 [256]) and offset (float32 [1])
/// are present.
struct Weight4 {
  View codes;  // uint8 [(N * K + 1) / 2], any shape
  View absmax;
  View nested_absmax;
  View nested_code;
  View offset;
  QuantType type = QuantType::nf4;
  Layout4 layout = Layout4::flat;
  int64_t blocksize = 64;
  int64_t n = 0;
  int64_t k = 0;
};

/// Weights [N, K] of one form that rows choose among: the experts of a mixture.
struct Experts {
  enum class Form : uint8_t { dense, packed4, int8 };

  /// kParts for each of `count` experts, in order: its bias (float [N], optional), then what the form needs.
  ///   dense     the weight, float [N, K]
  ///   packed4   codes, absmax, nested absmax, nested code, offset; see Weight4
  ///   int8      codes int8 [N, K], scb float32 [N]
  const View* parts = nullptr;
  static constexpr int kParts = 6;
  int64_t count = 0;
  Form form = Form::dense;
  int64_t n = 0;
  int64_t k = 0;
  // packed4
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;
  Layout4 layout = Layout4::flat;
  // int8; see Backend::linear_8bit
  float threshold = 0.0f;
  bool bnb_exact = false;

  const View& bias(int64_t expert) const { return parts[expert * kParts]; }
  const View& part(int64_t expert, int i) const { return parts[expert * kParts + 1 + i]; }
  Weight4 packed(int64_t expert) const {
    const View* part = parts + expert * kParts + 1;
    return {part[0], part[1], part[2], part[3], part[4], type, layout, blocksize, n, k};
  }
};

/// Most weights that a grouped product takes: q, k and v.
constexpr int kMaxGroup = 3;

/// What every linear op can do to its result while it is still in registers: y = act(x W^T + bias) +
/// residual.
struct Epilogue {
  View bias;      // float [N]
  View residual;  // [M, N], y's dtype
};

/// A packed ragged batch of S sequences with T query tokens in all. The tokens of sequence s are rows
/// query_starts[s] .. query_starts[s+1] of a [T, ...] operand; the last of them has position lengths[s] - 1.
/// The cached position p of sequence s lives in block block_table[s, p / block_len] at offset p % block_len.
struct RaggedBatch {
  View query_starts;  // int32 [S + 1]
  View lengths;       // int32 [S], cached tokens including this call's
  View block_table;   // int32 [S, max_blocks]
};

enum class Binary : uint8_t { add, sub, mul, div, min, max };
enum class Activation : uint8_t { none, silu, gelu, gelu_tanh, relu, sigmoid, tanh, exp, neg };

struct AttentionOptions {
  float scale = 1.0f;
  bool causal = true;
  int64_t window = 0;    // keys at least this many positions back are masked; 0: no limit
  float softcap = 0.0f;  // scores become softcap * tanh(score / softcap); 0: off
  // Softmax weights, not their sum, are rounded to q's dtype before they multiply values. For the CPU: CUDA's
  // tensor-core kernels, which take 16-bit heads of a multiple of 8, always do, its general kernel never.
  bool round_weights = false;
  View alibi_slopes;  // float32 [H], optional: score += slope * (key position - query position)
  View sinks;  // float [H], optional: an extra logit per head that takes probability and gives no value
};

/// One row per sequence of sampling parameters, float32 [S, kSamplingColumns]; see Backend::sample.
enum SamplingColumn { kTemperature, kTopK, kTopP, kMinP, kRepetitionPenalty, kSamplingColumns };

// ---- the door
// -------------------------------------------------------------------------------------------------

class Backend {
 public:
  virtual ~Backend() = default;

  // -- identity
  virtual std::string name() const = 0;  // "cpu", "cuda:0"
  virtual int issue_threads() const = 0;
  virtual bool host_memory() const = 0;  // true: device addresses are host addresses

  // -- memory. Stream-ordered: memory released on a queue is reused only by later work of that queue.
  // Alignment 64. With `issue_threads() == 2` allocate() and release() may come from any thread.
  virtual Status allocate(Queue queue, size_t bytes, void** out) = 0;
  virtual void release(Queue queue, void* data, size_t bytes) = 0;
  virtual MemoryInfo memory() const = 0;
  virtual void reset_peak() = 0;
  /// Host memory that upload() and download() are fast for; freed by the same backend.
  virtual Status allocate_host(size_t bytes, void** out) = 0;
  virtual void release_host(void* data, size_t bytes) = 0;
  virtual Status upload(Queue queue, void* device, const void* host, size_t bytes) = 0;
  virtual Status download(Queue queue, void* host, const void* device, size_t bytes) = 0;

  // -- order
  virtual Status record(Queue queue, Event* out) = 0;
  virtual Status wait(Queue queue, const Event& event) = 0;
  virtual Status synchronize(const Event& event) = 0;  // blocks the caller

  // -- graphs. Between begin and end the compute queue's ops are recorded, not run. A backend without native
  // graphs
  //    returns false here and the caller keeps a list of the ops instead.
  virtual bool has_graphs() const = 0;
  virtual Status begin_capture() = 0;
  virtual Status end_capture(Graph* out) = 0;
  virtual Status launch(const Graph& graph) = 0;

  // -- elementwise and layout

  /// y[...] = value, every dtype, any strides.
  virtual Status fill(Queue queue, View y, double value) = 0;
  /// y[...] = convert(x[...]): same shape, any strides on both sides (0 broadcasts x), any dtype to any
  /// dtype. Float to integer truncates towards zero and saturates (NaN: 0); integer to integer keeps the low
  /// bits; float to float rounds to nearest even.
  virtual Status copy(Queue queue, View y, View x) = 0;
  /// y = a (op) b with numpy broadcasting expressed by zero strides in a and b; all of one dtype, float or
  /// int32. min and max give NaN when either operand is; int32 wraps and division by zero gives 0.
  virtual Status binary(Queue queue, View y, View a, View b, Binary op) = 0;
  /// y = act(x), float.
  virtual Status activation(Queue queue, View y, View x, Activation act) = 0;
  /// y = act(gate) * up, float, [M, N]; gate and up may have a row stride (halves of one [M, 2N] product).
  virtual Status gated_activation(Queue queue, View y, View gate, View up, Activation act) = 0;
  /// y[i, :] = table[ids[i], :]; ids int32 or int64. An id outside 0 .. V-1 gives a row of NaN.
  virtual Status gather_rows(Queue queue, View y, View table, View ids) = 0;
  /// y[0] = mean of x (float32), summed in double.
  virtual size_t mean_workspace(const View& x) const = 0;
  virtual Status mean(Queue queue, View y, View x, View workspace) = 0;
  /// y[0] (int32) = number of NaN and infinite elements of x (float).
  virtual Status count_nonfinite(Queue queue, View y, View x) = 0;

  // -- norms over the last dimension

  /// y = x * rsqrt(mean(x^2) + eps) * (weight + weight_offset), without the last factor where there is no
  /// weight. With `residual` the norm is of x + residual, which is rounded to x's dtype first and also
  /// written to `sum`.
  virtual Status rms_norm(Queue queue, View y, View sum, View x, View residual, View weight, float eps,
                          float weight_offset) = 0;
  /// y = (x - mean) * rsqrt(var + eps) * weight + bias; weight and bias optional; residual and sum as above.
  virtual Status layer_norm(Queue queue, View y, View sum, View x, View residual, View weight, View bias,
                            float eps) = 0;

  // -- 4-bit and 8-bit blockwise formats

  /// x (float, any shape, n elements, row-major) to codes uint8 [(n + 1) / 2] and absmax float32 [ceil(n /
  /// blocksize)].
  virtual Status quantize_4bit(Queue queue, View codes, View absmax, View x, QuantType type,
                               int64_t blocksize) = 0;
  /// The inverse into y (float, w.n * w.k elements, any shape).
  virtual Status dequantize_4bit(Queue queue, View y, const Weight4& w) = 0;
  /// True when the device's 4-bit products want the tiled layout; false: its ops refuse it.
  virtual bool tiles_4bit() const = 0;
  /// Re-orders codes and absmax (float32 or uint8) of a weight [n, k] that can_tile() holds for, from flat to
  /// tiled or back. On every device.
  virtual Status tile_4bit(Queue queue, View codes, View absmax, View from_codes, View from_absmax, int64_t n,
                           int64_t k, Layout4 to) = 0;
  /// 8-bit blockwise with a 256-entry ascending code: codes uint8 [n], absmax float32 [ceil(n / blocksize)].
  virtual Status quantize_blockwise(Queue queue, View codes, View absmax, View x, View code,
                                    int64_t blocksize) = 0;
  virtual Status dequantize_blockwise(Queue queue, View y, View codes, View absmax, View code,
                                      int64_t blocksize) = 0;
  /// y[i, :] = row ids[i] of the 4-bit table w [n = V, k = D], in the flat layout.
  virtual Status gather_rows_4bit(Queue queue, View y, const Weight4& w, View ids) = 0;
  /// y[i, :] = codes[ids[i], :] * scb[ids[i]] / 127; codes int8 [V, D], scb float32 [V].
  virtual Status gather_rows_8bit(Queue queue, View y, View codes, View scb, View ids) = 0;

  // -- int8

  /// Row-wise: codes int8 [M, K], row_absmax float32 [M] of x float [M, K]. threshold > 0: elements with |x|
  /// >= threshold do not count for absmax; `outlier_mask` (uint8 [K]) is set to 1 for every column that holds
  /// one in any row, and such columns are 0 in codes. The mask is absent when threshold = 0. fp16_input
  /// rounds x to float16 first, as bitsandbytes does.
  virtual Status int8_quantize_rows(Queue queue, View codes, View row_absmax, View outlier_mask, View x,
                                    float threshold, bool fp16_input) = 0;
  /// y float [N, K] = codes int8 [N, K] * scb float32 [N] / 127.
  virtual Status int8_dequantize_rows(Queue queue, View y, View codes, View scb) = 0;
  /// acc int32 [M, N] = a int8 [M, K] x b int8 [N, K]^T, exact.
  virtual Status int8_matmul(Queue queue, View acc, View a, View b) = 0;
  /// y float [M, N] = acc * row_absmax[m] * col_absmax[n] / 127^2 + bias, in bitsandbytes' order of
  /// operations.
  virtual Status int8_matmul_dequantize(Queue queue, View y, View acc, View row_absmax, View col_absmax,
                                        View bias) = 0;

  // -- linear: y float [M, N] = x float [M, K] times a weight [N, K] transposed, plus the epilogue. y and x
  // have one dtype.

  virtual size_t linear_workspace(const View& x, const View& weight) const = 0;
  virtual Status linear(Queue queue, View y, View x, View weight, const Epilogue& epilogue,
                        View workspace) = 0;
  virtual size_t linear_4bit_workspace(const View& x, const Weight4& w) const = 0;
  virtual Status linear_4bit(Queue queue, View y, View x, const Weight4& w, const Epilogue& epilogue,
                             View workspace) = 0;
  /// The same x through `count` <= kMaxGroup weights of one K at once: y[i] = x w[i]^T + bias[i].
  virtual size_t linear_4bit_group_workspace(const View& x, const Weight4* w, int count) const;
  virtual Status linear_4bit_group(Queue queue, const View* y, View x, const Weight4* w, const View* bias,
                                   int count, View workspace);
  /// y = act(x w[0]^T + bias[0]) * (x w[1]^T + bias[1]): the first half of a gated MLP; w of one shape.
  virtual size_t linear_4bit_gated_workspace(const View& x, const Weight4* w) const;
  virtual Status linear_4bit_gated(Queue queue, View y, View x, const Weight4* w, const View* bias,
                                   Activation act, View workspace);
  /// The whole LLM.int8() forward: quantise x by rows, int8 product, outlier columns in x's precision, bias.
  /// bnb_exact reproduces bitsandbytes' float16 roundings of input, product and output.
  virtual size_t linear_8bit_workspace(const View& x, const View& weight, float threshold) const = 0;
  virtual Status linear_8bit(Queue queue, View y, View x, View weight, View scb, const Epilogue& epilogue,
                             float threshold, bool bnb_exact, View workspace) = 0;

  // -- mixtures of experts. A pair is a token and one of the experts it goes to; its number is that of its
  // id.

  /// ids int32 [T, k], ascending, and weights float32 [T, k] of each token's experts, from scores float32
  /// [T, E]: those with the k largest of `choice` (float32 [T, E]; absent: scores), the first of equal ones;
  /// NaN counts as -infinity. With `softmax` a weight is a share of exp(score) over all experts, else the
  /// score. With `normalize` the weights of a token are divided by their sum + tiny. In the end they are
  /// multiplied by `scale`.
  virtual Status route_tokens(Queue queue, View ids, View weights, View scores, View choice, bool softmax,
                              bool normalize, float tiny, float scale);
  /// Whether the two products below are there, and save time, for x of a dtype and so many pairs. With less
  /// the caller sends all tokens through all experts.
  virtual bool takes_experts(DType dtype, int64_t pairs, const Experts& experts) const;
  /// y[p, :] = x[p / (P / rows of x), :] w[e]^T + bias[e], e = ids[p], for the P pairs of ids int32 [T, k];
  /// x float [T, K] or [P, K], y [P, N] of its dtype. An id that is none gives a row of NaN. Rows of one
  /// expert are together what linear(), linear_4bit() or linear_8bit() of them would be.
  virtual size_t linear_experts_workspace(const View& x, const View& ids, const Experts& experts) const;
  virtual Status linear_experts(Queue queue, View y, View x, View ids, const Experts& experts,
                                View workspace);
  /// y[p, :] = act(gate's) * up's, likewise: the first half of gated MLPs. Both of one form and shape.
  virtual size_t linear_experts_gated_workspace(const View& x, const View& ids, const Experts& gate,
                                                const Experts& up) const;
  virtual Status linear_experts_gated(Queue queue, View y, View x, View ids, const Experts& gate,
                                      const Experts& up, Activation act, View workspace);
  /// y[t, :] = residual[t, :] + the sum over j, in order, of weights[t, j] * x[t k + j, :]; x float [T k, N],
  /// weights float32 [T, k]; residual, optional, and y of x's dtype.
  virtual Status weighted_sum(Queue queue, View y, View x, View weights, View residual);

  // -- attention

  /// cos and sin float32 [P, R / 2] for positions 0 .. P-1 from inv_freq float32 [R / 2], both times `scale`.
  virtual Status rope_tables(Queue queue, View cos, View sin, View inv_freq, float scale) = 0;
  /// positions int32 [T] of a ragged batch's query tokens.
  virtual Status ragged_positions(Queue queue, View positions, const RaggedBatch& batch) = 0;
  /// y [T, H, D] = x rotated by position; x may have a row stride. Rotates the first R <= D elements of a
  /// head, pairs (i, i + R/2), or (2i, 2i + 1) when interleaved; the rest is copied. y may be x.
  virtual Status rope(Queue queue, View y, View x, View cos, View sin, View positions, bool interleaved) = 0;
  /// Writes k, v [T, KV, D] (row strides allowed) of the batch's tokens into the caches [blocks, block_len,
  /// KV, D]. A token whose position has no valid block is not written.
  virtual Status paged_write(Queue queue, View key_cache, View value_cache, View k, View v,
                             const RaggedBatch& batch) = 0;
  /// y [T, H, Dv] = softmax(q k^T * scale + masks) v over the cached tokens of each sequence; q [T, H, D]
  /// (row stride allowed), H a multiple of KV, H / KV query heads share a key head.
  /// A position without a valid block is as if it were not there; a row that sees no key gives zeros.
  virtual size_t paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                           const RaggedBatch& batch) const = 0;
  virtual Status paged_attention(Queue queue, View y, View q, View key_cache, View value_cache,
                                 const RaggedBatch& batch, const AttentionOptions& options,
                                 View workspace) = 0;

  // -- choosing tokens

  /// out[r] (float32) = -log softmax(logits[r, :])[targets[r]]; logits float [R, V]; targets int32 or int64.
  /// A negative target gives 0, one of V or more NaN. The sum runs in double.
  virtual Status cross_entropy(Queue queue, View out, View logits, View targets) = 0;
  /// y [R] int32 = index of the largest element of each row, the lowest on ties. NaN counts as -infinity.
  virtual Status argmax(Queue queue, View y, View x) = 0;
  /// Chooses tokens int32 [S] from logits float [S, V]. params float32 [S, kSamplingColumns], rng int64 [S,
  /// 2] = (seed, counter), seen uint8 [S, V] (optional). Per row, in transformers' order, l in fp32:
  ///   l = logits; NaN counts as -infinity, +infinity as the largest float
  ///   penalty      l = l < 0 ? l * penalty : l / penalty where seen; off unless it is positive and not 1
  ///   greedy       temperature not above 0, or top_p not above 0 (the best token alone): argmax(l), no draw
  ///   temperature  l = l / temperature, held within the finite floats
  ///   top-k        keeps l >= the k-th largest l (ties stay); off when k < 1 or k >= V
  ///   top-p        of what is kept, keeps a token when the tokens with strictly larger l have together less
  ///                than top_p of the probability (ties stay together); off when top_p >= 1
  ///   min-p        keeps exp(l - max l) >= min_p; off unless above 0, and never more than the best
  ///   draw         u = uniform(seed, counter) of random.h; the token is the first kept one, by index, with
  ///                exp(l - max l) summed up to it > u * the sum over all kept; sums in double
  /// Any other NaN parameter is off. When every l is -infinity the token is 0. The counter advances by one
  /// and seen[token] becomes 1 in every case.
  virtual size_t sample_workspace(const View& logits) const = 0;
  virtual Status sample(Queue queue, View tokens, View logits, View params, View rng, View seen,
                        View workspace) = 0;
};

/// The CPU device. Never fails. Every call returns a device of its own on the one process-wide pool.
std::unique_ptr<Backend> make_cpu_backend(int index);

struct CudaInfo {
  bool compiled = false;
  int devices = 0;
  std::string archs;    // what the kernels were compiled for
  int driver = 0;       // CUDA version that the driver supports, 13000 for 13.0; 0 without a driver
  int runtime = 0;      // CUDA version of the runtime inside
  std::string failure;  // what the runtime said when it was asked for devices, if it failed
};
/// Never fails and never initialises a context.
CudaInfo cuda_info();
/// The library that dense products on CUDA run on when it is there; it is looked for once, now at the latest.
struct DenseLibrary {
  bool found = false;
  std::string where;  // its path, or what was tried
};
DenseLibrary cuda_dense_library();
/// Code::driver when the driver is too old for the runtime, Code::cuda for anything else.
Status make_cuda_backend(int index, std::unique_ptr<Backend>* out);

}  // namespace halfbyte
