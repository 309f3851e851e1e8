// The activation functions on simd.h's vectors, each to a few ulp relative to the exact result in fp32.
// Included in the per-ISA part of a file after simd.h, so it has no include guard.

namespace halfbyte::cpu::HALFBYTE_ISA {

static inline F sigmoid(F x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

static inline F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

/// x times the normal distribution function, in a form that keeps its relative precision in the negative
/// tail: Phi(-a) = e^(-a^2 / 2) w(a) with w a polynomial in 1 / (1 + a / 4) fitted to the scaled
/// complementary error function on 0 .. 13.5, relative error 5e-8. a^2 is carried in two floats, else its
/// rounding would be amplified.
static inline F gelu(F x) {
  const F a = min(set1(13.5f), abs(x));
  const F square = mul(a, a);
  const F low = fma(a, a, sub(zero(), square));
  const F e = exp(mul(square, set1(-0.5f)));
  const F decay = fma(mul(e, low), set1(-0.5f), e);
  const F t = div(set1(1.0f), fma(a, set1(0.25f), set1(1.0f)));
  F w = set1(0.02629549242556095f);
  w = fma(w, t, set1(-0.15563662350177765f));
  w = fma(w, t, set1(0.3020765781402588f));
  w = fma(w, t, set1(-0.2127486914396286f));
  w = fma(w, t, set1(0.20669712126255035f));
  w = fma(w, t, set1(0.030758773908019066f));
  w = fma(w, t, set1(0.10432186722755432f));
  w = fma(w, t, set1(0.09843278676271439f));
  w = fma(w, t, set1(0.0998026579618454f));
  const F tail = mul(mul(w, t), decay);
  return sub(max(zero(), x), mul(a, tail));
}

/// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline F gelu_tanh(F x) {
  const F cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
  return div(x, add(set1(1.0f), exp(mul(cubic, set1(-1.5957691216057308f)))));
}

/// m / (m + 2) with m = e^(2x) - 1, where e^r - 1 is kept apart from the 1 so that small x keep their digits.
static inline F tanh(F x) {
  const F y = max(set1(-20.0f), min(set1(20.0f), add(x, x)));
  const F n = round(mul(y, set1(1.44269504f)));
  const F r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), y));
  F p = set1(1.3981999e-3f);
  p = fma(p, r, set1(8.3334519e-3f));
  p = fma(p, r, set1(4.1665795e-2f));
  p = fma(p, r, set1(1.6666665e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(mul(p, r), r, r);
  const F scale = exp2i(n);
  const F m = fma(p, scale, sub(scale, set1(1.0f)));
  return div(m, add(m, set1(2.0f)));
}

/// By halves, so that the ends overflow to infinity and underflow to zero.
static inline F exp_full(F x) {
  const F half = exp(mul(x, set1(0.5f)));
  return mul(half, half);
}

template <Activation act>
static inline F activate(F x) {
  if constexpr (act == Activation::silu) return silu(x);
  if constexpr (act == Activation::gelu) return gelu(x);
  if constexpr (act == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (act == Activation::relu) return max(zero(), x);
  if constexpr (act == Activation::sigmoid) return sigmoid(x);
  if constexpr (act == Activation::tanh) return tanh(x);
  if constexpr (act == Activation::exp) return exp_full(x);
  if constexpr (act == Activation::neg) return mul(x, set1(-1.0f));
  return x;
}

template <Activation act>
struct ActivationTag {
  static constexpr Activation value = act;
};

/// Calls body with the activation as a type: body(tag), then activate<decltype(tag)::value>(x).
template <typename Body>
static inline void with_activation(Activation act, const Body& body) {
  switch (act) {
    case Activation::none:
      return body(ActivationTag<Activation::none>());
    case Activation::silu:
      return body(ActivationTag<Activation::silu>());
    case Activation::gelu:
      return body(ActivationTag<Activation::gelu>());
    case Activation::gelu_tanh:
      return body(ActivationTag<Activation::gelu_tanh>());
    case Activation::relu:
      return body(ActivationTag<Activation::relu>());
    case Activation::sigmoid:
      return body(ActivationTag<Activation::sigmoid>());
    case Activation::tanh:
      return body(ActivationTag<Activation::tanh>());
    case Activation::exp:
      return body(ActivationTag<Activation::exp>());
    case Activation::neg:
      return body(ActivationTag<Activation::neg>());
  }
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
