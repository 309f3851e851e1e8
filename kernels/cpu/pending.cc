// Defaults for ops whose file has not landed yet; a strong definition elsewhere wins.
#include "cpu_backend.h"

namespace halfbyte::cpu {
__attribute__((weak)) Status CpuBackend::rope_tables(Queue, View, View, View, float) {
  return Status::error(Code::unsupported, "rope_tables is not there yet");
}
__attribute__((weak)) Status CpuBackend::ragged_positions(Queue, View, const RaggedBatch&) {
  return Status::error(Code::unsupported, "ragged_positions is not there yet");
}
__attribute__((weak)) Status CpuBackend::rope(Queue, View, View, View, View, View, bool) {
  return Status::error(Code::unsupported, "rope is not there yet");
}
__attribute__((weak)) Status CpuBackend::paged_write(Queue, View, View, View, View, const RaggedBatch&) {
  return Status::error(Code::unsupported, "paged_write is not there yet");
}
__attribute__((weak)) size_t CpuBackend::paged_attention_workspace(const View&, const View&,
                                                                   const RaggedBatch&) const {
  return 0;
}
__attribute__((weak)) Status CpuBackend::paged_attention(Queue, View, View, View, View, const RaggedBatch&,
                                                         const AttentionOptions&, View) {
  return Status::error(Code::unsupported, "paged_attention is not there yet");
}
__attribute__((weak)) Status CpuBackend::cross_entropy(Queue, View, View, View) {
  return Status::error(Code::unsupported, "cross_entropy is not there yet");
}
__attribute__((weak)) Status CpuBackend::argmax(Queue, View, View) {
  return Status::error(Code::unsupported, "argmax is not there yet");
}
__attribute__((weak)) size_t CpuBackend::sample_workspace(const View&) const { return 0; }
__attribute__((weak)) Status CpuBackend::sample(Queue, View, View, View, View, View, View) {
  return Status::error(Code::unsupported, "sample is not there yet");
}
}  // namespace halfbyte::cpu
