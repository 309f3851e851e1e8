// What both backends ask of an op's operands in the same words.
#pragma once

#include <string>

#include "backend.h"

namespace halfbyte {

inline Status refuse(const char* op, const std::string& what) {
  return Status::error(Code::shape, std::string(op) + ": " + what);
}
inline Status refuse_dtype(const char* op, const std::string& what) {
  return Status::error(Code::dtype, std::string(op) + ": " + what);
}

inline Status check_ragged(const char* op, const RaggedBatch& b) {
  for (const View* v : {&b.query_starts, &b.lengths, &b.block_table}) {
    if (v->dtype != DType::i32)
      return refuse_dtype(op, "query_starts, lengths and block_table must be int32");
    if (!v->is_contiguous()) return refuse(op, "query_starts, lengths and block_table must be contiguous");
  }
  if (b.query_starts.size() != b.lengths.size() + 1 || b.block_table.ndim != 2 ||
      b.block_table.shape[0] != b.lengths.size()) {
    return refuse(op, "query_starts, lengths and block_table do not belong together");
  }
  return {};
}

inline Status check_cross_entropy(const char* op, const View& out, const View& logits, const View& targets) {
  if (logits.ndim != 2 || !logits.is_contiguous() || !out.is_contiguous() || !targets.is_contiguous() ||
      out.size() != logits.shape[0] || targets.size() != logits.shape[0]) {
    return refuse(op, "logits must be [R, V], targets and the result [R], all contiguous");
  }
  if (!is_float(logits.dtype) || out.dtype != DType::f32 ||
      (targets.dtype != DType::i32 && targets.dtype != DType::i64)) {
    return refuse_dtype(op, "logits must be float, targets int32 or int64, the result float32");
  }
  return {};
}

/// Of route_tokens; `by`: what the experts are chosen by.
inline Status check_routes(const char* op, const View& ids, const View& weights, const View& scores,
                           const View& by) {
  const int64_t tokens = scores.rows(), experts = scores.cols(), k = ids.cols();
  if (ids.dtype != DType::i32) return refuse_dtype(op, "ids must be int32");
  for (const View* v : {&weights, &scores, &by}) {
    if (v->dtype != DType::f32) return refuse_dtype(op, "weights, scores and choice must be float32");
  }
  for (const View* v : {&ids, &weights, &scores, &by}) {
    if (v->ndim != 2 || v->shape[0] != tokens || !v->is_contiguous())
      return refuse(op, "the operands must be contiguous matrices of a row for each token");
  }
  if (weights.cols() != k || by.cols() != experts || k > experts)
    return refuse(op,
                  std::to_string(k) + " of " + std::to_string(experts) + " experts, or sizes that differ");
  return {};
}

/// Of linear_experts and linear_experts_gated, the workspace aside.
inline Status check_linear_experts(const char* op, const View& y, const View& x, const View& ids,
                                   const Experts& w) {
  const int64_t pairs = ids.size();
  if (!is_float(x.dtype) || y.dtype != x.dtype) return refuse_dtype(op, "x and y must be of one float dtype");
  if (ids.dtype != DType::i32 || ids.ndim != 2 || !ids.is_contiguous())
    return refuse(op, "ids must be contiguous int32 [T, k]");
  if (x.ndim != 2 || y.ndim != 2 || !x.is_contiguous() || !y.is_contiguous())
    return refuse(op, "x and y must be contiguous matrices");
  if (x.cols() != w.k || (x.rows() != pairs && x.rows() != ids.rows()) || y.rows() != pairs ||
      y.cols() != w.n)
    return refuse(op, "x [" + std::to_string(x.rows()) + ", " + std::to_string(x.cols()) + "] and y [" +
                          std::to_string(y.rows()) + ", " + std::to_string(y.cols()) + "] do not fit " +
                          std::to_string(pairs) + " pairs and weights [" + std::to_string(w.n) + ", " +
                          std::to_string(w.k) + "]");
  return {};
}

inline Status check_weighted_sum(const char* op, const View& y, const View& x, const View& weights,
                                 const View& residual) {
  const int64_t tokens = weights.rows(), k = weights.cols(), n = x.cols();
  if (!is_float(x.dtype) || y.dtype != x.dtype || (residual && residual.dtype != x.dtype))
    return refuse_dtype(op, "x, residual and y must be of one float dtype");
  if (weights.dtype != DType::f32) return refuse_dtype(op, "the weights must be float32");
  if (weights.ndim != 2 || x.ndim != 2 || y.ndim != 2 || !weights.is_contiguous() || !x.is_contiguous() ||
      !y.is_contiguous() || (residual && !residual.is_contiguous()))
    return refuse(op, "the operands must be contiguous matrices");
  if (x.rows() != tokens * k || y.rows() != tokens || y.cols() != n ||
      (residual && residual.size() != y.size()))
    return refuse(op, "x must have a row for each weight, y and the residual one for each token");
  return {};
}

}  // namespace halfbyte
