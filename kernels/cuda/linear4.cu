// y [M, N] = x [M, K] w^T + bias + residual with a 4-bit weight: which kernel runs.
//
//   tiled, 16-bit x   tensor cores, by M
//   a few rows        stream4.cu: fp32 multiply-adds, both layouts, any K
//   else              the weight is dequantised to x's dtype in the workspace, then the dense product runs
#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kStreamed = 16;  // rows of x up to which streaming beats dequantising

View dense_view(const Weight4& w, DType dtype, void* data) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = 2;
  v.shape[0] = w.n;
  v.shape[1] = v.strides[0] = w.k;
  v.strides[1] = 1;
  return v;
}

}  // namespace

size_t CudaBackend::linear_4bit_workspace(const View& x, const Weight4& w) const {
  if (x.rows() <= kStreamed) return 0;
  const View dense = dense_view(w, x.dtype, nullptr);
  return round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype))) + linear_workspace(x, dense);
}

Status CudaBackend::linear_4bit(Queue queue, View y, View x, const Weight4& w, const Epilogue& epilogue,
                                View workspace) {
  if (Status status = enter(); !status.ok()) return status;
  if (Status status = check_weight4("linear_4bit", w); !status.ok()) return status;
  if (Status status = check_linear("linear_4bit", y, x, w.n, w.k, epilogue); !status.ok()) return status;
  if (y.size() == 0) return {};
  if (x.rows() <= kStreamed || w.k == 0) {
    return check(stream4(stream(queue), y, x, w, epilogue), "linear_4bit");
  }
  const View dense = dense_view(w, x.dtype, workspace.data);
  const size_t used = round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype)));
  if (static_cast<size_t>(workspace.size()) < linear_4bit_workspace(x, w)) {
    return refuse("linear_4bit", "the workspace is too small");
  }
  if (Status status = dequantize_4bit(queue, dense, w); !status.ok()) return status;
  View rest = workspace;
  rest.data = workspace.as<char>() + used;
  rest.shape[0] -= static_cast<int64_t>(used);
  return linear(queue, y, x, dense, epilogue, rest);
}

}  // namespace halfbyte::cuda
