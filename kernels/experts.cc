// Products of a mixture of experts: what a device without kernels for them says, and the gated product from
// two.
#include "checks.h"
#include "workspace.h"

namespace halfbyte {
namespace {

size_t half_bytes(const View& x, const View& ids, const Experts& experts) {
  return round_up(static_cast<size_t>(ids.size() * experts.n * size_of(x.dtype)));
}

Status none(const Backend& backend, const char* op) {
  return Status::error(Code::unsupported,
                       std::string(op) + ": " + backend.name() + " has no kernel for this");
}

}  // namespace

Status Backend::route_tokens(Queue, View, View, View, View, bool, bool, float, float) {
  return none(*this, "route_tokens");
}

bool Backend::takes_experts(DType, int64_t, const Experts&) const { return false; }

size_t Backend::linear_experts_workspace(const View&, const View&, const Experts&) const { return 0; }

Status Backend::linear_experts(Queue, View, View, View, const Experts&, View) {
  return none(*this, "linear_experts");
}

size_t Backend::linear_experts_gated_workspace(const View& x, const View& ids, const Experts& gate,
                                               const Experts&) const {
  return 2 * half_bytes(x, ids, gate) + linear_experts_workspace(x, ids, gate);
}

Status Backend::linear_experts_gated(Queue queue, View y, View x, View ids, const Experts& gate,
                                     const Experts& up, Activation act, View workspace) {
  if (y.ndim != 2 || y.cols() != gate.n || y.rows() != ids.size() || y.dtype != x.dtype)
    return refuse("linear_experts_gated", "y must be [pairs, N], of x's dtype");
  if (y.size() == 0) return {};
  const size_t half = half_bytes(x, ids, gate), rest = linear_experts_workspace(x, ids, gate);
  if (!workspace || static_cast<size_t>(workspace.size()) < 2 * half + rest)
    return refuse("linear_experts_gated", "the workspace is too small");
  View halves[2] = {y, y};
  halves[0].data = workspace.data;
  halves[1].data = workspace.as<char>() + half;
  const View space = rest ? part_of(workspace, 2 * half, rest) : View{};
  if (Status status = linear_experts(queue, halves[0], x, ids, gate, space); !status.ok()) return status;
  if (Status status = linear_experts(queue, halves[1], x, ids, up, space); !status.ok()) return status;
  return gated_activation(queue, y, halves[0], halves[1], act);
}

Status Backend::weighted_sum(Queue, View, View, View, View) { return none(*this, "weighted_sum"); }

}  // namespace halfbyte
