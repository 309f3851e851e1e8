// The CUDA backend: two streams a device, driven by one native thread. Each op family implements its methods
// in its own .cu file of this folder; nothing here waits for the device but synchronize().
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <initializer_list>
#include <map>

#include "../backend.h"

namespace halfbyte::cuda {

/// How a kernel is started; see launch.cuh.
struct Launch {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  int shared = 0;        // bytes of shared memory of a multiprocessor; a block pays 1 KiB besides its own
  int block_shared = 0;  // bytes that a block can have, its static ones counted in
  int code = 0;          // 75, 80, 90, ...: the newest code in this build that the device runs
  int arch = 0;          // the same, or an older one whose kernels are to run instead
  bool wgmma = false;    // the code is for sm_90a and has its warpgroup products
  int clusters[3] = {};  // of 2, 4, 8 blocks that run at once, each block on a multiprocessor of its own
  bool large_parameters = false;  // the driver takes kernels with up to 32 KiB of them
  bool early = false;             // it may start before the kernel in front of it has ended
  uint32_t* arrivals = nullptr;   // a zero for each multiprocessor; a kernel that counts there leaves zeros
  float* parts = nullptr;         // of sums, between blocks of a kernel of the compute queue: skinny4_sm90.cu

  int clusters_of(int blocks) const {
    return blocks == 1 ? multiprocessors : clusters[blocks == 2 ? 0 : blocks == 4 ? 1 : 2];
  }
};

/// Memory of a few operands.
struct Spans {
  static constexpr int kMost = 16;
  struct {
    const char *begin, *end;
  } at[kMost];
  int count = 0;

  Spans() = default;
  Spans(std::initializer_list<View> views) {
    for (const View& view : views) add(view);
  }
  /// False where there is no place for it.
  bool add(const char* begin, const char* end) {
    if (count == kMost) return false;
    at[count++] = {begin, end};
    return true;
  }
  /// A contiguous view, or an absent one.
  void add(const View& view) {
    if (view && view.size() > 0)
      add(view.as<const char>(), view.as<const char>() + view.size() * size_of(view.dtype));
  }
  bool meets(const Spans& other) const {
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < other.count; ++j) {
        if (at[i].begin < other.at[j].end && other.at[j].begin < at[i].end) return true;
      }
    }
    return false;
  }
};

struct ColumnMarks;

class CudaBackend final : public Backend {
 public:
  static Status create(int index, std::unique_ptr<Backend>* out);
  ~CudaBackend() override;

  // device.cu
  std::string name() const override;
  int issue_threads() const override { return 1; }
  bool host_memory() const override { return false; }
  Status allocate(Queue, size_t bytes, void** out) override;
  void release(Queue, void* data, size_t bytes) override;
  MemoryInfo memory() const override;
  void reset_peak() override;
  Status allocate_host(size_t bytes, void** out) override;
  void release_host(void* data, size_t bytes) override;
  Status upload(Queue, void* device, const void* host, size_t bytes) override;
  Status download(Queue, void* host, const void* device, size_t bytes) override;
  Status record(Queue, Event* out) override;
  Status wait(Queue, const Event&) override;
  Status synchronize(const Event&) override;
  bool has_graphs() const override { return true; }
  Status begin_capture() override;
  Status end_capture(Graph* out) override;
  Status launch(const Graph&) override;

  // copy.cu
  Status fill(Queue, View y, double value) override;
  Status copy(Queue, View y, View x) override;
  // elementwise.cu
  Status binary(Queue, View y, View a, View b, Binary op) override;
  Status activation(Queue, View y, View x, Activation act) override;
  Status gated_activation(Queue, View y, View gate, View up, Activation act) override;
  // gather.cu
  Status gather_rows(Queue, View y, View table, View ids) override;
  Status gather_rows_4bit(Queue, View y, const Weight4& w, View ids) override;
  Status gather_rows_8bit(Queue, View y, View codes, View scb, View ids) override;
  // reduce.cu
  size_t mean_workspace(const View& x) const override;
  Status mean(Queue, View y, View x, View workspace) override;
  Status count_nonfinite(Queue, View y, View x) override;
  // norms.cu
  Status rms_norm(Queue, View y, View sum, View x, View residual, View weight, float eps,
                  float weight_offset) override;
  Status layer_norm(Queue, View y, View sum, View x, View residual, View weight, View bias,
                    float eps) override;

  // quantize4.cu
  Status quantize_4bit(Queue, View codes, View absmax, View x, QuantType type, int64_t blocksize) override;
  Status dequantize_4bit(Queue, View y, const Weight4& w) override;
  // tile4.cu
  bool tiles_4bit() const override { return launch_.arch >= 80; }
  Status tile_4bit(Queue, View codes, View absmax, View from_codes, View from_absmax, int64_t n, int64_t k,
                   Layout4 to) override;
  // blockwise8.cu
  Status quantize_blockwise(Queue, View codes, View absmax, View x, View code, int64_t blocksize) override;
  Status dequantize_blockwise(Queue, View y, View codes, View absmax, View code, int64_t blocksize) override;

  // int8_rows.cu
  Status int8_quantize_rows(Queue, View codes, View row_absmax, View outlier_mask, View x, float threshold,
                            bool fp16_input) override;
  Status int8_dequantize_rows(Queue, View y, View codes, View scb) override;
  // int8_matmul.cu
  Status int8_matmul(Queue, View acc, View a, View b) override;
  Status int8_matmul_dequantize(Queue, View y, View acc, View row_absmax, View col_absmax,
                                View bias) override;
  // linear8.cu
  size_t linear_8bit_workspace(const View& x, const View& weight, float threshold) const override;
  Status linear_8bit(Queue, View y, View x, View weight, View scb, const Epilogue&, float threshold,
                     bool bnb_exact, View workspace) override;

  // linear.cu
  size_t linear_workspace(const View& x, const View& weight) const override;
  Status linear(Queue, View y, View x, View weight, const Epilogue&, View workspace) override;
  // linear4.cu
  size_t linear_4bit_workspace(const View& x, const Weight4& w) const override;
  Status linear_4bit(Queue, View y, View x, const Weight4& w, const Epilogue&, View workspace) override;
  Status linear_4bit_group(Queue, const View* y, View x, const Weight4* w, const View* bias, int count,
                           View workspace) override;
  size_t linear_4bit_gated_workspace(const View& x, const Weight4* w) const override;
  Status linear_4bit_gated(Queue, View y, View x, const Weight4* w, const View* bias, Activation act,
                           View workspace) override;

  // experts.cu
  Status route_tokens(Queue, View ids, View weights, View scores, View choice, bool softmax, bool normalize,
                      float tiny, float scale) override;
  bool takes_experts(DType, int64_t pairs, const Experts&) const override;
  size_t linear_experts_workspace(const View& x, const View& ids, const Experts&) const override;
  Status linear_experts(Queue, View y, View x, View ids, const Experts&, View workspace) override;
  size_t linear_experts_gated_workspace(const View& x, const View& ids, const Experts& gate,
                                        const Experts& up) const override;
  Status linear_experts_gated(Queue, View y, View x, View ids, const Experts& gate, const Experts& up,
                              Activation act, View workspace) override;
  Status weighted_sum(Queue, View y, View x, View weights, View residual) override;

  // rope.cu
  Status rope_tables(Queue, View cos, View sin, View inv_freq, float scale) override;
  Status ragged_positions(Queue, View positions, const RaggedBatch&) override;
  Status rope(Queue, View y, View x, View cos, View sin, View positions, bool interleaved) override;
  // attention.cu
  Status paged_write(Queue, View key_cache, View value_cache, View k, View v, const RaggedBatch&) override;
  size_t paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                   const RaggedBatch&) const override;
  Status paged_attention(Queue, View y, View q, View key_cache, View value_cache, const RaggedBatch&,
                         const AttentionOptions&, View workspace) override;
  // logits.cu
  Status cross_entropy(Queue, View out, View logits, View targets) override;
  Status argmax(Queue, View y, View x) override;
  // sampling.cu
  size_t sample_workspace(const View& logits) const override;
  Status sample(Queue, View tokens, View logits, View params, View rng, View seen, View workspace) override;

 private:
  explicit CudaBackend(int index) : index_(index) {}
  // experts.cu
  Status multiply_experts(const char* op, Queue queue, const View& y, const View& x, const View& ids,
                          const Experts& w, const Experts* up, Activation act, const View& workspace);
  cudaStream_t stream(Queue queue) const { return streams_[static_cast<int>(queue)]; }
  ColumnMarks* marks(Queue queue) const;
  /// What every op begins with: this device is current in the calling thread.
  Status enter() const;
  /// The same for an op whose kernel may start early, if the op queued before was such a one too: its results
  /// are then all that the new one must wait for. Every other op, and every wait for an event, ends that.
  /// `ahead`: what its kernels read before they wait for results; where it is a result of an op that they
  /// might overtake they do not start early. `results`: what the op writes. `settles`: its kernels let the
  /// next one start only when they have waited themselves, so that all that was written before them is there
  /// then.
  Status enter_early(Queue queue, Launch* on, const Spans& results, const Spans& ahead = {},
                     bool settles = false);
  /// Whether an op that is queued now may read these before it waits.
  bool is_settled(const Spans& spans) const { return !early_ || !spans.meets(written_); }
  /// The part of both that changes nothing of this object.
  Status make_current() const;
  void count(int64_t bytes);
  /// Names the op (or the call) of a CUDA failure; a sticky one marks the device lost.
  Status check(cudaError_t error, const char* op);

  int index_;
  Launch launch_;               // of the compute queue
  mutable bool early_ = false;  // the op last queued for computing lets the next one start early
  Spans written_;               // results of that op and of those that it may still run beside
  cudaStream_t streams_[2] = {};
  cudaMemPool_t pool_ = nullptr;
  void* marks_ = nullptr;  // of outlier columns, a set for each stream
  bool capturing_ = false;
  std::multimap<size_t, void*> arena_;  // released during the capture going on, by size
  std::atomic<bool> lost_{false};
  std::atomic<int64_t> allocated_{0};
  std::atomic<int64_t> peak_{0};
};

}  // namespace halfbyte::cuda
