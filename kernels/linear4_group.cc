// Grouped and gated 4-bit products from single ones: what a device does that has no kernel for them, or none
// for these operands.
#include <algorithm>

#include "checks.h"
#include "workspace.h"

namespace halfbyte {
namespace {

size_t half_bytes(const View& x, const Weight4& w) {
  return round_up(static_cast<size_t>(x.rows() * w.n * size_of(x.dtype)));
}

}  // namespace

size_t Backend::linear_4bit_group_workspace(const View& x, const Weight4* w, int count) const {
  size_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, linear_4bit_workspace(x, w[i]));
  return most;
}

Status Backend::linear_4bit_group(Queue queue, const View* y, View x, const Weight4* w, const View* bias,
                                  int count, View workspace) {
  for (int i = 0; i < count; ++i) {
    if (Status status = linear_4bit(queue, y[i], x, w[i], Epilogue{bias[i], View{}}, workspace); !status.ok())
      return status;
  }
  return {};
}

size_t Backend::linear_4bit_gated_workspace(const View& x, const Weight4* w) const {
  return half_bytes(x, w[0]) + half_bytes(x, w[1]) + linear_4bit_group_workspace(x, w, 2);
}

Status Backend::linear_4bit_gated(Queue queue, View y, View x, const Weight4* w, const View* bias,
                                  Activation act, View workspace) {
  if (y.size() == 0) return {};
  const size_t first = half_bytes(x, w[0]), second = half_bytes(x, w[1]);
  const size_t used = first + second, rest = linear_4bit_group_workspace(x, w, 2);
  if (!workspace || static_cast<size_t>(workspace.size()) < used + rest)
    return refuse("linear_4bit_gated", "the workspace is too small");
  View halves[2] = {y, y};
  halves[0].data = workspace.data;
  halves[1].data = workspace.as<char>() + first;
  if (Status status =
          linear_4bit_group(queue, halves, x, w, bias, 2, rest ? part_of(workspace, used, rest) : View{});
      !status.ok())
    return status;
  // the activation sees [M, N]
  View flat = y;
  flat.ndim = 2;
  flat.shape[0] = y.rows();
  flat.shape[1] = flat.strides[0] = y.cols();
  flat.strides[1] = 1;
  View gate = flat, up = flat;
  gate.data = halves[0].data;
  up.data = halves[1].data;
  return gated_activation(queue, flat, gate, up, act);
}

}  // namespace halfbyte
