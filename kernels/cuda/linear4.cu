// y [M, N] = x [M, K] w^T + bias + residual with a 4-bit weight, alone or several together: the choice of a
// kernel.
//
//   tiled, 16-bit x   up to M = 8 (4 or 2, the larger the weight) gemv4.cu and gemv4_sm90.cu, then
//                     skinny4_sm90.cu, above kSkinny gemm4_sm90.cu; without wgmma skinny4_sm80.cu and
//                     gemm4_sm80.cu, the latter while that is faster than dequantising
//   a few rows        stream4.cu: fp32 multiply-adds, both layouts, any K
//   else              the weight is dequantised to x's dtype in the workspace, then the dense product runs
#include <algorithm>

#include "tiled4.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kStreamed = 16;  // rows of x up to which streaming beats dequantising
// More rows of x than kGemv and as many elements of the weight, or more than kGemvLarge and even more
// elements or as long a K: skinny4_sm90 beats gemv4.
constexpr int64_t kGemv = 4, kManyWeights = 16 << 20;
constexpr int64_t kGemvLarge = 2, kLargeWeight = 64 << 20, kLongK = 8192;
constexpr int64_t kSkinny = 64;  // rows of x up to which skinny4_sm90 beats gemm4_sm90
// Rows of x up to which gemm4_sm80 beats dequantising: where cuBLASLt has wgmma or better, and where mma.sync
// is all that it has, too, which is reckoned, not measured.
constexpr int64_t kMostGemm80 = 256, kMostGemm80Alone = 512;

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

/// Calls body with a null pointer of x's 16-bit type.
template <typename Body>
cudaError_t with_half_type(DType dtype, const Body& body) {
  if (dtype == DType::f16) return body(static_cast<half_t*>(nullptr));
  return body(static_cast<bf16_t*>(nullptr));
}

bool takes_gemv(int arch, const View& x, const Weight4* w, int count) {
  if (x.size() == 0 || x.dtype == DType::f32 || !is_aligned(x.data, 16)) return false;
  if (!gemv4_takes(arch, x.rows(), w[0].k)) return false;
  for (int i = 0; i < count; ++i) {
    if (w[i].layout != Layout4::tiled || w[i].type != w[0].type || w[i].n == 0 ||
        static_cast<bool>(w[i].nested_absmax) != static_cast<bool>(w[0].nested_absmax))
      return false;
  }
  return true;
}

template <typename T>
Product4<T> product_of(const View& y, const View& x, const Weight4& w, const Epilogue& epilogue) {
  return {output_of<T>(y, epilogue), x.as<const T>(), x.rows(), tiled_of(w)};
}

/// What the kernels read before they wait: all of the weights.
Spans spans_of(const Weight4* w, int count) {
  static_assert(5 * kMaxGroup <= Spans::kMost);
  Spans spans;
  for (int i = 0; i < count; ++i) {
    for (const View& part : {w[i].codes, w[i].absmax, w[i].nested_absmax, w[i].nested_code, w[i].offset})
      spans.add(part);
  }
  return spans;
}

/// Of y[i] = x w[i]^T + bias[i].
Status check_products(const char* op, const View* y, const View& x, const Weight4* w, const View* bias,
                      int count) {
  for (int i = 0; i < count; ++i) {
    if (Status status = check_weight4(op, w[i]); !status.ok()) return status;
    const Epilogue epilogue = {bias[i], View{}};
    if (Status status = check_linear(op, y[i], x, w[i].n, w[i].k, epilogue); !status.ok()) return status;
  }
  return {};
}

/// Calls body with those products.
template <typename Body>
cudaError_t with_products(const View* y, const View& x, const Weight4* w, const View* bias, int count,
                          const Body& body) {
  return with_half_type(x.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    Product4<T> products[kMaxGroup];
    for (int i = 0; i < count; ++i) products[i] = product_of<T>(y[i], x, w[i], Epilogue{bias[i], View{}});
    return body(products);
  });
}

/// Without wgmma: whether skinny4_sm80, which divides the work evenly, beats gemm4_sm80, whose items of 128 x
/// 128 do not always divide by the multiprocessors. Times of 4096 k on an H100, in us: 33 for 128 x 64 sums
/// in one, 60 for 128 x 128 in the other, 97 for two beside each other.
bool takes_skinny80(const Launch& on, int64_t rows, int64_t n) {
  if (rows <= 64) return true;
  const int64_t row_blocks = (n + 127) / 128;
  const int64_t rounds = ((rows + 127) / 128 * row_blocks + on.multiprocessors - 1) / on.multiprocessors;
  const double skinny = 33.0 * static_cast<double>((rows + 63) / 64 * row_blocks) / on.multiprocessors;
  return skinny < static_cast<double>(rounds / 2 * 97 + rounds % 2 * 60);
}

enum class Route { gemv, skinny, gemm, stream, dense };

Route route_of(const Launch& on, const View& x, const Weight4& w) {
  const int64_t rows = x.rows();
  if (w.k == 0) return rows <= kStreamed ? Route::stream : Route::dense;  // no tiles to cut or to describe
  if (w.layout == Layout4::tiled && x.dtype != DType::f32 && is_aligned(x.data, 16)) {
    const int64_t weights = w.n * w.k;
    const bool skinny = on.wgmma && ((rows > kGemv && weights >= kManyWeights) ||
                                     (rows > kGemvLarge && (weights >= kLargeWeight || w.k >= kLongK)));
    if (gemv4_takes(on.arch, rows, w.k) && !skinny) return Route::gemv;
    if (on.wgmma) return rows <= kSkinny ? Route::skinny : Route::gemm;
    const int64_t most = on.code < 90 || on.code >= 120 ? kMostGemm80Alone : kMostGemm80;
    if (on.arch >= 80 && rows <= most) return takes_skinny80(on, rows, w.n) ? Route::skinny : Route::gemm;
  }
  return rows <= kStreamed ? Route::stream : Route::dense;
}

}  // namespace

size_t CudaBackend::linear_4bit_workspace(const View& x, const Weight4& w) const {
  if (x.rows() == 0 || w.n == 0) return 0;
  const Route route = route_of(launch_, x, w);
  if (route == Route::skinny && !launch_.wgmma) return skinny4_sm80_workspace(launch_, x.rows(), w.n, w.k);
  if (route != Route::dense) return 0;
  const View dense = dense_view(w, x.dtype, nullptr);
  return round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype))) + linear_workspace(x, dense);
}

Status CudaBackend::linear_4bit(Queue queue, View y, View x, const Weight4& w, const Epilogue& epilogue,
                                View workspace) {
  if (Status status = check_weight4("linear_4bit", w); !status.ok()) return status;
  if (Status status = check_linear("linear_4bit", y, x, w.n, w.k, epilogue); !status.ok()) return status;
  if (y.size() == 0) return {};
  Route route = route_of(launch_, x, w);
  if (static_cast<size_t>(workspace.size()) < linear_4bit_workspace(x, w))
    return refuse("linear_4bit", "the workspace is too small");
  if (route == Route::gemm && launch_.wgmma && !is_aligned(y.data, 16)) route = Route::skinny;
  if (route == Route::gemv || route == Route::skinny || route == Route::gemm) {
    Launch on;
    if (Status status = enter_early(queue, &on, {y}, spans_of(&w, 1)); !status.ok()) return status;
    // between blocks: for one product at a time
    float* const parts = queue == Queue::compute ? on.parts : nullptr;
    void* const sums = queue == Queue::compute ? workspace.data : nullptr;
    return check(with_half_type(x.dtype,
                                [&](auto* p) {
                                  using T = std::remove_pointer_t<decltype(p)>;
                                  const Product4<T> product = product_of<T>(y, x, w, epilogue);
                                  if (route == Route::gemv) return gemv4(on, &product, 1);
                                  if (route == Route::gemm)
                                    return on.wgmma ? gemm4_sm90(on, product) : gemm4_sm80(on, product);
                                  return on.wgmma ? skinny4_sm90(on, product, parts)
                                                  : skinny4_sm80(on, product, sums);
                                }),
                 "linear_4bit");
  }
  if (Status status = enter(); !status.ok()) return status;
  if (route == Route::stream) return check(stream4(stream(queue), y, x, w, epilogue), "linear_4bit");
  const View dense = dense_view(w, x.dtype, workspace.data);
  const size_t used = round_up(static_cast<size_t>(w.n * w.k * size_of(x.dtype)));
  if (Status status = dequantize_4bit(queue, dense, w); !status.ok()) return status;
  View rest = workspace;
  rest.data = workspace.as<char>() + used;
  rest.shape[0] -= static_cast<int64_t>(used);
  return linear(queue, y, x, dense, epilogue, rest);
}

Status CudaBackend::linear_4bit_group(Queue queue, const View* y, View x, const Weight4* w, const View* bias,
                                      int count, View workspace) {
  if (!takes_gemv(launch_.arch, x, w, count))
    return Backend::linear_4bit_group(queue, y, x, w, bias, count, workspace);
  const char* const op = "linear_4bit_group";
  if (Status status = check_products(op, y, x, w, bias, count); !status.ok()) return status;
  Spans results;
  for (int i = 0; i < count; ++i) results.add(y[i]);
  Launch on;
  if (Status status = enter_early(queue, &on, results, spans_of(w, count)); !status.ok()) return status;
  const auto launch = [&](const auto* products) { return gemv4(on, products, count); };
  return check(with_products(y, x, w, bias, count, launch), op);
}

size_t CudaBackend::linear_4bit_gated_workspace(const View& x, const Weight4* w) const {
  return takes_gemv(launch_.arch, x, w, 2) ? 0 : Backend::linear_4bit_gated_workspace(x, w);
}

Status CudaBackend::linear_4bit_gated(Queue queue, View y, View x, const Weight4* w, const View* bias,
                                      Activation act, View workspace) {
  if (!takes_gemv(launch_.arch, x, w, 2))
    return Backend::linear_4bit_gated(queue, y, x, w, bias, act, workspace);
  const char* const op = "linear_4bit_gated";
  const View both[2] = {y, y};
  if (Status status = check_products(op, both, x, w, bias, 2); !status.ok()) return status;
  Launch on;
  if (Status status = enter_early(queue, &on, {y}, spans_of(w, 2)); !status.ok()) return status;
  const auto launch = [&](const auto* products) { return gemv4_gated(on, products, act); };
  return check(with_products(both, x, w, bias, 2, launch), op);
}

}  // namespace halfbyte::cuda
