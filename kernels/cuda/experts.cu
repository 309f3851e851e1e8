// Mixtures of experts: the choice of experts, the sum of their results, and which kernel multiplies.
//
//   4-bit, tiled, 16-bit x   up to kFewPairs pairs experts_gemv4.cu, more experts_gemm4.cu
//   else                     there is none: the caller sends all tokens through all experts
#include "experts.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kFewPairs = 64;
constexpr int kMostThreads = 1024;

struct Routes {
  int32_t* ids;
  float* weights;
  const float *scores, *choice;
  int experts, k;
  bool softmax, normalize;
  float tiny, scale;
};

/// A block a token, a thread an expert. It is chosen when fewer than k come before it, and its place among
/// the chosen is the number of those with a lower id.
__global__ void __launch_bounds__(kMostThreads) route_kernel(const Routes p) {
  __shared__ float4 all[kMostThreads / 4];  // what experts are chosen by; beyond the last one nothing
  __shared__ float most_of[32], sum_of[32];
  __shared__ int before[32];
  let_next_start();
  const int e = threadIdx.x, lane = e % 32, warp = e / 32, warps = blockDim.x / 32;
  const bool there = e < p.experts;
  wait_for_results();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.experts + e;
  const float score = there ? p.scores[at] : -INFINITY;
  float own = -INFINITY;
  if (there) own = p.choice == p.scores ? score : p.choice[at];
  if (isnan(own)) own = -INFINITY;
  reinterpret_cast<float*>(all)[e] = own;
  const float warp_most = warp_max(score);
  if (lane == 0) most_of[warp] = warp_most;
  __syncthreads();

  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < static_cast<int>(blockDim.x) / 4; ++i) {
    const float4 four = all[i];
    rank += (four.x > own || (four.x == own && 4 * i < e)) +
            (four.y > own || (four.y == own && 4 * i + 1 < e)) +
            (four.z > own || (four.z == own && 4 * i + 2 < e)) +
            (four.w > own || (four.w == own && 4 * i + 3 < e));
  }
  const bool chosen = there && rank < p.k;
  float weight = there ? score : 0.0f;
  if (p.softmax) {
    float most = most_of[0];
    for (int w = 1; w < warps; ++w) most = fmaxf(most, most_of[w]);
    weight = there ? expf(score - most) : 0.0f;
  }
  const uint32_t votes = __ballot_sync(0xffffffffu, chosen);
  const float sum = warp_sum(chosen || !p.normalize ? weight : 0.0f);
  if (lane == 0) {
    before[warp] = __popc(votes);
    sum_of[warp] = sum;
  }
  __syncthreads();
  if (!chosen) return;
  float whole = 0.0f;
  for (int w = 0; w < warps; ++w) whole += sum_of[w];
  if (p.normalize)
    whole += p.tiny;
  else if (!p.softmax)
    whole = 1.0f;
  int64_t place = static_cast<int64_t>(blockIdx.x) * p.k + __popc(votes & ((1u << lane) - 1u));
  for (int w = 0; w < warp; ++w) place += before[w];
  p.ids[place] = e;
  p.weights[place] = weight / whole * p.scale;
}

/// y[t, N i ...] = residual + the sum over j of weights[t, j] * x[t k + j, N i ...].
template <typename T, int N>
__global__ void __launch_bounds__(256)
    weighted_sum_kernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ weights,
                        const T* __restrict__ residual, int64_t pieces, int64_t n, int k) {
  let_next_start();
  wait_for_results();
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t each = n / N, t = piece / each, column = piece % each * N;
  float sum[N] = {};
#pragma unroll 4
  for (int j = 0; j < k; ++j) {
    const float weight = weights[t * k + j];
    const Vec<T, N> some = *reinterpret_cast<const Vec<T, N>*>(x + (t * k + j) * n + column);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, to_float(some.v[i]), sum[i]);
  }
  Vec<T, N> out, first;
  if (residual) first = *reinterpret_cast<const Vec<T, N>*>(residual + t * n + column);
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(residual ? sum[i] + to_float(first.v[i]) : sum[i]);
  *reinterpret_cast<Vec<T, N>*>(y + t * n + column) = out;
}

/// Takes over a list of experts; what differs between them is refused.
Status add_places(const char* op, const Experts& w, ExpertPlaces* places, DType* bias_dtype) {
  for (int64_t e = 0; e < w.count; ++e) {
    const Weight4 weight = w.packed(e);
    if (Status status = check_weight4(op, weight); !status.ok()) return status;
    if (static_cast<bool>(weight.nested_absmax) != static_cast<bool>(w.packed(0).nested_absmax))
      return refuse(op, "some experts are double-quantised, some not");
    const View& bias = w.bias(e);
    if (bias && (!is_float(bias.dtype) || bias.size() != w.n || !bias.is_contiguous()))
      return refuse(op, "a bias must be float, contiguous and hold " + std::to_string(w.n) + " elements");
    if (bias && e > 0 && bias.dtype != *bias_dtype)
      return refuse_dtype(op, "the biases are of several dtypes");
    if (bias) *bias_dtype = bias.dtype;
    const Absmax absmax = absmax_of(weight);
    places->at[places->count++] = {
        weight.codes.as<const uint8_t>(),
        absmax.plain ? static_cast<const void*>(absmax.plain) : absmax.codes,
        absmax.nested,
        absmax.nested_code,
        absmax.offset,
        bias ? bias.data : nullptr,
    };
  }
  return {};
}

bool takes_form(const Launch& launch, DType dtype, const Experts& w) {
  return w.form == Experts::Form::packed4 && w.layout == Layout4::tiled && dtype != DType::f32 &&
         w.count > 0 && 2 * w.count <= kMostPlaces && w.k <= INT32_MAX && w.n > 0 &&
         experts_gemv4_takes(launch, w.k);
}

}  // namespace

Status CudaBackend::route_tokens(Queue queue, View ids, View weights, View scores, View choice, bool softmax,
                                 bool normalize, float tiny, float scale) {
  const char* const op = "route_tokens";
  const View& by = choice ? choice : scores;
  const int64_t tokens = scores.rows(), experts = scores.cols(), k = ids.cols();
  if (Status status = check_routes(op, ids, weights, scores, by); !status.ok()) return status;
  if (experts > kMostThreads || tokens > INT32_MAX)
    return refuse(op, std::to_string(experts) + " experts; at most " + std::to_string(kMostThreads) +
                          " are possible, and 2^31 - 1 tokens");
  if (tokens == 0) return {};
  Launch on;
  if (Status status = enter_early(queue, &on, {ids, weights}); !status.ok()) return status;
  Routes routes = {ids.as<int32_t>(),
                   weights.as<float>(),
                   scores.as<const float>(),
                   by.as<const float>(),
                   static_cast<int>(experts),
                   static_cast<int>(k),
                   softmax,
                   normalize,
                   tiny,
                   scale};
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(tokens));
  shape.block = dim3(static_cast<unsigned>((experts + 31) / 32 * 32));
  return check(launch_kernel(on, shape, route_kernel, routes), op);
}

Status CudaBackend::weighted_sum(Queue queue, View y, View x, View weights, View residual) {
  const char* const op = "weighted_sum";
  const int64_t k = weights.cols(), n = x.cols();
  if (Status status = check_weighted_sum(op, y, x, weights, residual); !status.ok()) return status;
  if (y.size() == 0) return {};
  Launch on;
  if (Status status = enter_early(queue, &on, {y}); !status.ok()) return status;
  return check(with_float_type(x.dtype,
                               [&](auto* p) {
                                 using T = std::remove_pointer_t<decltype(p)>;
                                 constexpr int kWide = 8 / sizeof(T);
                                 const T* const first = residual ? residual.as<const T>() : nullptr;
                                 const bool wide = n % kWide == 0 && is_aligned(y.data, 8) &&
                                                   is_aligned(x.data, 8) && is_aligned(first, 8);
                                 const int64_t pieces = y.size() / (wide ? kWide : 1);
                                 LaunchShape shape;
                                 shape.block = dim3(256);
                                 shape.grid = dim3(blocks_for(pieces, 256, INT32_MAX));
                                 return launch_kernel(
                                     on, shape,
                                     wide ? weighted_sum_kernel<T, kWide> : weighted_sum_kernel<T, 1>,
                                     y.as<T>(), x.as<const T>(), weights.as<const float>(), first, pieces, n,
                                     static_cast<int>(k));
                               }),
               op);
}

bool CudaBackend::takes_experts(DType dtype, int64_t pairs, const Experts& experts) const {
  return launch_.large_parameters && takes_form(launch_, dtype, experts) && pairs <= INT32_MAX;
}

size_t CudaBackend::linear_experts_workspace(const View& x, const View& ids, const Experts& experts) const {
  if (ids.size() <= kFewPairs || !takes_experts(x.dtype, ids.size(), experts)) return 0;
  return experts_gemm4_workspace(ids.size(), experts.count);
}
size_t CudaBackend::linear_experts_gated_workspace(const View& x, const View& ids, const Experts& gate,
                                                   const Experts&) const {
  return linear_experts_workspace(x, ids, gate);
}

Status CudaBackend::linear_experts(Queue queue, View y, View x, View ids, const Experts& experts,
                                   View workspace) {
  return multiply_experts("linear_experts", queue, y, x, ids, experts, nullptr, Activation::none, workspace);
}
Status CudaBackend::linear_experts_gated(Queue queue, View y, View x, View ids, const Experts& gate,
                                         const Experts& up, Activation act, View workspace) {
  return multiply_experts("linear_experts_gated", queue, y, x, ids, gate, &up, act, workspace);
}

Status CudaBackend::multiply_experts(const char* op, Queue queue, const View& y, const View& x,
                                     const View& ids, const Experts& w, const Experts* up, Activation act,
                                     const View& workspace) {
  const int64_t pairs = ids.size();
  if (Status status = check_linear_experts(op, y, x, ids, w); !status.ok()) return status;
  if (!takes_experts(x.dtype, pairs, w))
    return Status::error(Code::unsupported, std::string(op) + ": " + name() + " has no kernel for this form");
  if (y.size() == 0) return {};
  if (const size_t needed = linear_experts_workspace(x, ids, w);
      needed > 0 && (!workspace || static_cast<size_t>(workspace.size()) < needed))
    return refuse(op, "the workspace is too small");
  ExpertPlaces places;
  DType bias_dtype[2] = {};
  if (Status status = add_places(op, w, &places, bias_dtype); !status.ok()) return status;
  if (up) {
    if (Status status = add_places(op, *up, &places, bias_dtype + 1); !status.ok()) return status;
  }
  const bool nested = places.at[0].nested != nullptr;
  if (nested != (places.at[places.count - 1].nested != nullptr))
    return refuse(op, "one of gate and up is double-quantised");
  bool settled = is_settled({ids});
  for (int64_t e = 0; settled && e < places.count; ++e) {
    const Weight4 weight = e < w.count ? w.packed(e) : up->packed(e - w.count);
    settled =
        is_settled({weight.codes, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset});
  }
  Launch on;
  if (Status status = enter_early(queue, &on, {y}, {}, pairs <= kFewPairs); !status.ok()) return status;
  const auto multiply = [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    ExpertProduct<T> product = {};
    product.y = y.as<T>();
    product.x = x.as<const T>();
    product.ids = ids.as<const int32_t>();
    product.n = w.n;
    product.k = w.k;
    product.pairs = static_cast<int>(pairs);
    product.each = static_cast<int>(pairs / x.rows());
    product.experts = static_cast<int>(w.count);
    product.bias_dtype[0] = bias_dtype[0];
    product.bias_dtype[1] = bias_dtype[1];
    product.book = book_of<T>(w.type);
    product.nested = nested;
    product.settled = settled;
    product.gated = up != nullptr;
    product.act = act;
    if (pairs <= kFewPairs) return experts_gemv4(on, product, places);
    return experts_gemm4(on, product, places, workspace.data);
  };
  if (x.dtype == DType::f16) return check(multiply(static_cast<half_t*>(nullptr)), op);
  return check(multiply(static_cast<bf16_t*>(nullptr)), op);
}

}  // namespace halfbyte::cuda
