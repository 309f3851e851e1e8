// The CPU backend: every op runs inside the call, spread over the process-wide pool (pool.h), on the best
// instruction set of this machine (isa.h). Each op family implements its methods in its own file of this
// folder.
#pragma once

#include <atomic>
#include <mutex>

#include "../backend.h"

namespace halfbyte::cpu {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int index) : index_(index) {}
  ~CpuBackend() override;

  // memory.cc
  std::string name() const override;
  int issue_threads() const override { return 2; }
  bool host_memory() const override { return true; }
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
  bool has_graphs() const override { return false; }
  Status begin_capture() override;
  Status end_capture(Graph* out) override;
  Status launch(const Graph&) override;

  // copy.cc
  Status fill(Queue, View y, double value) override;
  Status copy(Queue, View y, View x) override;
  // elementwise.cc
  Status binary(Queue, View y, View a, View b, Binary op) override;
  Status activation(Queue, View y, View x, Activation act) override;
  Status gated_activation(Queue, View y, View gate, View up, Activation act) override;
  // gather.cc
  Status gather_rows(Queue, View y, View table, View ids) override;
  Status gather_rows_4bit(Queue, View y, const Weight4& w, View ids) override;
  Status gather_rows_8bit(Queue, View y, View codes, View scb, View ids) override;
  // reduce.cc
  size_t mean_workspace(const View&) const override { return 0; }
  Status mean(Queue, View y, View x, View workspace) override;
  Status count_nonfinite(Queue, View y, View x) override;
  // norms.cc
  Status rms_norm(Queue, View y, View sum, View x, View residual, View weight, float eps,
                  float weight_offset) override;
  Status layer_norm(Queue, View y, View sum, View x, View residual, View weight, View bias,
                    float eps) override;

  // quantize4.cc
  Status quantize_4bit(Queue, View codes, View absmax, View x, QuantType type, int64_t blocksize) override;
  Status dequantize_4bit(Queue, View y, const Weight4& w) override;
  // tile4.cc
  bool tiles_4bit() const override { return false; }
  Status tile_4bit(Queue, View codes, View absmax, View from_codes, View from_absmax, int64_t n, int64_t k,
                   Layout4 to) override;
  // blockwise8.cc
  Status quantize_blockwise(Queue, View codes, View absmax, View x, View code, int64_t blocksize) override;
  Status dequantize_blockwise(Queue, View y, View codes, View absmax, View code, int64_t blocksize) override;

  // int8_rows.cc
  Status int8_quantize_rows(Queue, View codes, View row_absmax, View outlier_mask, View x, float threshold,
                            bool fp16_input) override;
  Status int8_dequantize_rows(Queue, View y, View codes, View scb) override;
  // int8_matmul.cc
  Status int8_matmul(Queue, View acc, View a, View b) override;
  Status int8_matmul_dequantize(Queue, View y, View acc, View row_absmax, View col_absmax,
                                View bias) override;
  // linear8.cc
  size_t linear_8bit_workspace(const View& x, const View& weight, float threshold) const override;
  Status linear_8bit(Queue, View y, View x, View weight, View scb, const Epilogue&, float threshold,
                     bool bnb_exact, View workspace) override;

  // linear.cc
  size_t linear_workspace(const View& x, const View& weight) const override;
  Status linear(Queue, View y, View x, View weight, const Epilogue&, View workspace) override;
  // linear4.cc
  size_t linear_4bit_workspace(const View& x, const Weight4& w) const override;
  Status linear_4bit(Queue, View y, View x, const Weight4& w, const Epilogue&, View workspace) override;

  // experts.cc
  Status route_tokens(Queue, View ids, View weights, View scores, View choice, bool softmax, bool normalize,
                      float tiny, float scale) override;
  bool takes_experts(DType, int64_t, const Experts&) const override { return true; }
  size_t linear_experts_workspace(const View& x, const View& ids, const Experts&) const override;
  Status linear_experts(Queue, View y, View x, View ids, const Experts&, View workspace) override;
  Status weighted_sum(Queue, View y, View x, View weights, View residual) override;

  // rope.cc
  Status rope_tables(Queue, View cos, View sin, View inv_freq, float scale) override;
  Status ragged_positions(Queue, View positions, const RaggedBatch&) override;
  Status rope(Queue, View y, View x, View cos, View sin, View positions, bool interleaved) override;
  // attention.cc
  Status paged_write(Queue, View key_cache, View value_cache, View k, View v, const RaggedBatch&) override;
  size_t paged_attention_workspace(const View& q, const View& key_cache, const View& value_cache,
                                   const RaggedBatch&) const override;
  Status paged_attention(Queue, View y, View q, View key_cache, View value_cache, const RaggedBatch&,
                         const AttentionOptions&, View workspace) override;
  // sampling.cc
  Status cross_entropy(Queue, View out, View logits, View targets) override;
  Status argmax(Queue, View y, View x) override;
  size_t sample_workspace(const View& logits) const override;
  Status sample(Queue, View tokens, View logits, View params, View rng, View seen, View workspace) override;

 private:
  int index_;
  std::atomic<int64_t> allocated_{0};
  std::atomic<int64_t> peak_{0};
};

}  // namespace halfbyte::cpu
