#include "ops.h"

#include <cmath>
#include <string>

namespace halfbyte {
namespace {

using A = const Arguments&;

int64_t whole(double scalar) {
  return scalar >= -9.0e15 && scalar <= 9.0e15 ? static_cast<int64_t>(scalar) : -1;
}

/// Runs body with the enumerator, or refuses a number that is none.
template <typename Enum, typename Body>
Status with(double scalar, Enum last, const char* what, const Body& body) {
  const int64_t number = whole(scalar);
  if (number < 0 || number > static_cast<int64_t>(last)) {
    return Status::error(Code::value, std::string(what) + " " + std::to_string(number) + " is not one");
  }
  return body(static_cast<Enum>(number));
}

/// Weight operands come as codes, absmax, nested absmax, nested code, offset; scalars as type, blocksize, n,
/// k, layout.
Weight4 form4(const double* scalars) {
  Weight4 w;
  w.type = whole(scalars[0]) == 1 ? QuantType::fp4 : QuantType::nf4;
  w.blocksize = whole(scalars[1]);
  w.n = whole(scalars[2]);
  w.k = whole(scalars[3]);
  w.layout = whole(scalars[4]) == 1 ? Layout4::tiled : Layout4::flat;
  return w;
}
Weight4 weight4(const View* in, const double* scalars) {
  Weight4 w = form4(scalars);
  w.codes = in[0];
  w.absmax = in[1];
  w.nested_absmax = in[2];
  w.nested_code = in[3];
  w.offset = in[4];
  return w;
}

/// Says why a weight's scalars cannot be, or why the device does not take it.
Status check(const Backend& b, const Weight4& w, const double* scalars) {
  if (whole(scalars[0]) < 0 || whole(scalars[0]) > 1) return Status::error(Code::value, "unknown 4-bit type");
  if (!is_blocksize(w.blocksize)) return Status::error(Code::value, "unknown blocksize");
  int64_t elements;
  if (w.n < 0 || w.k < 0 || __builtin_mul_overflow(w.n, w.k, &elements))
    return Status::error(Code::value, "the weight's sizes are not sizes");
  if (w.layout == Layout4::flat) return {};
  if (!b.tiles_4bit())
    return Status::error(Code::unsupported, b.name() + " takes 4-bit weights in the flat layout only");
  if (!can_tile(w.n, w.k, w.blocksize))
    return Status::error(Code::value, "a weight of these sizes has no tiled layout");
  return {};
}

template <typename Body>
Status with_weight(const Backend& b, const View* in, const double* scalars, const Body& body) {
  const Weight4 w = weight4(in, scalars);
  Status status = check(b, w, scalars);
  return status.ok() ? body(w) : status;
}

RaggedBatch batch(const View* in) { return RaggedBatch{in[0], in[1], in[2]}; }

float real(double scalar) { return static_cast<float>(scalar); }

// ---- elementwise and layout

Status fill(Backend& b, Queue q, A a, View) { return b.fill(q, a.out[0], a.scalars[0]); }
Status copy(Backend& b, Queue q, A a, View) { return b.copy(q, a.out[0], a.in[0]); }
Status binary(Backend& b, Queue q, A a, View) {
  return with(a.scalars[0], Binary::max, "operation",
              [&](Binary op) { return b.binary(q, a.out[0], a.in[0], a.in[1], op); });
}
Status activation(Backend& b, Queue q, A a, View) {
  return with(a.scalars[0], Activation::neg, "activation",
              [&](Activation act) { return b.activation(q, a.out[0], a.in[0], act); });
}
Status gated_activation(Backend& b, Queue q, A a, View) {
  return with(a.scalars[0], Activation::neg, "activation",
              [&](Activation act) { return b.gated_activation(q, a.out[0], a.in[0], a.in[1], act); });
}
Status gather_rows(Backend& b, Queue q, A a, View) { return b.gather_rows(q, a.out[0], a.in[0], a.in[1]); }
Status mean(Backend& b, Queue q, A a, View workspace) { return b.mean(q, a.out[0], a.in[0], workspace); }
size_t mean_space(const Backend& b, A a) { return b.mean_workspace(a.in[0]); }
Status count_nonfinite(Backend& b, Queue q, A a, View) { return b.count_nonfinite(q, a.out[0], a.in[0]); }

// ---- norms

Status rms_norm(Backend& b, Queue q, A a, View) {
  return b.rms_norm(q, a.out[0], a.out[1], a.in[0], a.in[1], a.in[2], real(a.scalars[0]), real(a.scalars[1]));
}
Status layer_norm(Backend& b, Queue q, A a, View) {
  return b.layer_norm(q, a.out[0], a.out[1], a.in[0], a.in[1], a.in[2], a.in[3], real(a.scalars[0]));
}

// ---- blockwise formats

Status quantize_4bit(Backend& b, Queue q, A a, View) {
  return with(a.scalars[0], QuantType::fp4, "4-bit type", [&](QuantType type) {
    return b.quantize_4bit(q, a.out[0], a.out[1], a.in[0], type, whole(a.scalars[1]));
  });
}
Status dequantize_4bit(Backend& b, Queue q, A a, View) {
  return with_weight(b, a.in, a.scalars, [&](const Weight4& w) { return b.dequantize_4bit(q, a.out[0], w); });
}
Status tile_4bit(Backend& b, Queue q, A a, View) {
  const int64_t n = whole(a.scalars[0]), k = whole(a.scalars[1]);
  int64_t elements;
  if (n < 0 || k < 0 || !can_tile(n, k, kTileK) || __builtin_mul_overflow(n, k, &elements))
    return Status::error(Code::value, "a weight of these sizes has no tiled layout");
  for (const View& codes : {a.out[0], a.in[0]}) {
    if (codes.dtype != DType::u8 || codes.size() != elements / 2)
      return Status::error(Code::shape, "the codes have the wrong size");
  }
  for (const View& absmax : {a.out[1], a.in[1]}) {
    if (absmax.dtype != a.in[1].dtype || absmax.size() != elements / kTileK ||
        (absmax.dtype != DType::f32 && absmax.dtype != DType::u8))
      return Status::error(Code::shape, "absmax has the wrong size or dtype");
  }
  return with(a.scalars[2], Layout4::tiled, "layout",
              [&](Layout4 to) { return b.tile_4bit(q, a.out[0], a.out[1], a.in[0], a.in[1], n, k, to); });
}
Status quantize_blockwise(Backend& b, Queue q, A a, View) {
  return b.quantize_blockwise(q, a.out[0], a.out[1], a.in[0], a.in[1], whole(a.scalars[0]));
}
Status dequantize_blockwise(Backend& b, Queue q, A a, View) {
  return b.dequantize_blockwise(q, a.out[0], a.in[0], a.in[1], a.in[2], whole(a.scalars[0]));
}
Status gather_rows_4bit(Backend& b, Queue q, A a, View) {
  return with_weight(b, a.in, a.scalars,
                     [&](const Weight4& w) { return b.gather_rows_4bit(q, a.out[0], w, a.in[5]); });
}
Status gather_rows_8bit(Backend& b, Queue q, A a, View) {
  return b.gather_rows_8bit(q, a.out[0], a.in[0], a.in[1], a.in[2]);
}

// ---- int8

Status int8_quantize_rows(Backend& b, Queue q, A a, View) {
  return b.int8_quantize_rows(q, a.out[0], a.out[1], a.out[2], a.in[0], real(a.scalars[0]),
                              a.scalars[1] != 0);
}
Status int8_dequantize_rows(Backend& b, Queue q, A a, View) {
  return b.int8_dequantize_rows(q, a.out[0], a.in[0], a.in[1]);
}
Status int8_matmul(Backend& b, Queue q, A a, View) { return b.int8_matmul(q, a.out[0], a.in[0], a.in[1]); }
Status int8_matmul_dequantize(Backend& b, Queue q, A a, View) {
  return b.int8_matmul_dequantize(q, a.out[0], a.in[0], a.in[1], a.in[2], a.in[3]);
}

// ---- linear: x, bias, residual, then the weight

Epilogue epilogue(A a) { return Epilogue{a.in[1], a.in[2]}; }

Status linear(Backend& b, Queue q, A a, View workspace) {
  return b.linear(q, a.out[0], a.in[0], a.in[3], epilogue(a), workspace);
}
size_t linear_space(const Backend& b, A a) { return b.linear_workspace(a.in[0], a.in[3]); }

Status linear_4bit(Backend& b, Queue q, A a, View workspace) {
  return with_weight(b, a.in + 3, a.scalars, [&](const Weight4& w) {
    return b.linear_4bit(q, a.out[0], a.in[0], w, epilogue(a), workspace);
  });
}
size_t linear_4bit_space(const Backend& b, A a) {
  const Weight4 w = weight4(a.in + 3, a.scalars);
  return check(b, w, a.scalars).ok() ? b.linear_4bit_workspace(a.in[0], w) : 0;
}

// ---- grouped: x, then for each weight its bias and itself; scalars five for each weight, a type of -1 ends
// the list

struct Group {
  Weight4 w[kMaxGroup];
  View bias[kMaxGroup];
  int count = 0;
};

Status group(const Backend& b, A a, int most, Group* out) {
  for (; out->count < most && a.scalars[5 * out->count] >= 0; ++out->count) {
    const int i = out->count;
    const View* in = a.in + 1 + 6 * i;
    out->bias[i] = in[0];
    out->w[i] = weight4(in + 1, a.scalars + 5 * i);
    if (!out->w[i].codes || !out->w[i].absmax) return Status::error(Code::value, "a weight is incomplete");
    if (Status status = check(b, out->w[i], a.scalars + 5 * i); !status.ok()) return status;
    if (out->w[i].k != out->w[0].k) return Status::error(Code::shape, "the weights differ in K");
  }
  return out->count > 0 ? Status{} : Status::error(Code::value, "there is no weight");
}

Status linear_4bit_group(Backend& b, Queue q, A a, View workspace) {
  Group g;
  if (Status status = group(b, a, kMaxGroup, &g); !status.ok()) return status;
  for (int i = 0; i < g.count; ++i) {
    if (!a.out[i]) return Status::error(Code::value, "a result is missing");
  }
  return b.linear_4bit_group(q, a.out, a.in[0], g.w, g.bias, g.count, workspace);
}
size_t linear_4bit_group_space(const Backend& b, A a) {
  Group g;
  return group(b, a, kMaxGroup, &g).ok() ? b.linear_4bit_group_workspace(a.in[0], g.w, g.count) : 0;
}

Status gated(const Backend& b, A a, Group* out) {
  if (Status status = group(b, a, 2, out); !status.ok()) return status;
  if (out->count != 2 || out->w[0].n != out->w[1].n)
    return Status::error(Code::shape, "gate and up must be two weights of one shape");
  return {};
}
Status linear_4bit_gated(Backend& b, Queue q, A a, View workspace) {
  Group g;
  if (Status status = gated(b, a, &g); !status.ok()) return status;
  return with(a.scalars[10], Activation::neg, "activation", [&](Activation act) {
    return b.linear_4bit_gated(q, a.out[0], a.in[0], g.w, g.bias, act, workspace);
  });
}
size_t linear_4bit_gated_space(const Backend& b, A a) {
  Group g;
  return gated(b, a, &g).ok() ? b.linear_4bit_gated_workspace(a.in[0], g.w) : 0;
}

Status linear_8bit(Backend& b, Queue q, A a, View workspace) {
  return b.linear_8bit(q, a.out[0], a.in[0], a.in[3], a.in[4], epilogue(a), real(a.scalars[0]),
                       a.scalars[1] != 0, workspace);
}
size_t linear_8bit_space(const Backend& b, A a) {
  return b.linear_8bit_workspace(a.in[0], a.in[3], real(a.scalars[0]));
}

// ---- mixtures of experts: the list has Experts::kParts views for each expert, those of gate before those of
// up

Experts form_of(const double* scalars) {
  const Weight4 w = form4(scalars + 1);
  Experts e;
  e.form = static_cast<Experts::Form>(whole(scalars[0]));
  e.n = w.n;
  e.k = w.k;
  e.type = w.type;
  e.blocksize = w.blocksize;
  e.layout = w.layout;
  e.threshold = real(scalars[6]);
  e.bnb_exact = scalars[7] != 0;
  return e;
}

bool is_form(double scalar) {
  return whole(scalar) >= 0 && whole(scalar) <= static_cast<int64_t>(Experts::Form::int8);
}

/// `lists` of them out of the list.
Status experts(const Backend& b, A a, const double* scalars, int lists, Experts* out) {
  if (!is_form(scalars[0])) return Status::error(Code::value, "unknown form of experts");
  if (a.listed % (lists * Experts::kParts) != 0)
    return Status::error(Code::value, "the list of experts has a part of one");
  Experts e = form_of(scalars);
  e.count = a.listed / (lists * Experts::kParts);
  if (e.n < 0 || e.k < 0) return Status::error(Code::value, "the weights' sizes are not sizes");
  if (e.form == Experts::Form::packed4) {
    if (Status status = check(b, form4(scalars + 1), scalars + 1); !status.ok()) return status;
  }
  const int needed = e.form == Experts::Form::dense ? 1 : 2;  // parts that are not optional
  for (int i = 0; i < lists; ++i) {
    out[i] = e;
    out[i].parts = a.list + i * e.count * Experts::kParts;
    for (int64_t j = 0; j < e.count; ++j) {
      for (int part = 0; part < needed; ++part) {
        if (!out[i].part(j, part)) return Status::error(Code::value, "an expert's weight is incomplete");
      }
    }
  }
  return {};
}

Status route_tokens(Backend& b, Queue q, A a, View) {
  return b.route_tokens(q, a.out[0], a.out[1], a.in[0], a.in[1], a.scalars[0] != 0, a.scalars[1] != 0,
                        real(a.scalars[2]), real(a.scalars[3]));
}
Status linear_experts(Backend& b, Queue q, A a, View workspace) {
  Experts e;
  if (Status status = experts(b, a, a.scalars, 1, &e); !status.ok()) return status;
  return b.linear_experts(q, a.out[0], a.in[0], a.in[1], e, workspace);
}
size_t linear_experts_space(const Backend& b, A a) {
  Experts e;
  return experts(b, a, a.scalars, 1, &e).ok() ? b.linear_experts_workspace(a.in[0], a.in[1], e) : 0;
}
Status linear_experts_gated(Backend& b, Queue q, A a, View workspace) {
  Experts e[2];
  if (Status status = experts(b, a, a.scalars, 2, e); !status.ok()) return status;
  return with(a.scalars[kExpertScalars], Activation::neg, "activation", [&](Activation act) {
    return b.linear_experts_gated(q, a.out[0], a.in[0], a.in[1], e[0], e[1], act, workspace);
  });
}
size_t linear_experts_gated_space(const Backend& b, A a) {
  Experts e[2];
  if (!experts(b, a, a.scalars, 2, e).ok()) return 0;
  return b.linear_experts_gated_workspace(a.in[0], a.in[1], e[0], e[1]);
}
Status weighted_sum(Backend& b, Queue q, A a, View) {
  return b.weighted_sum(q, a.out[0], a.in[0], a.in[1], a.in[2]);
}

// ---- attention

Status rope_tables(Backend& b, Queue q, A a, View) {
  return b.rope_tables(q, a.out[0], a.out[1], a.in[0], real(a.scalars[0]));
}
Status ragged_positions(Backend& b, Queue q, A a, View) {
  return b.ragged_positions(q, a.out[0], batch(a.in));
}
Status rope(Backend& b, Queue q, A a, View) {
  return b.rope(q, a.out[0], a.in[0], a.in[1], a.in[2], a.in[3], a.scalars[0] != 0);
}
Status paged_write(Backend& b, Queue q, A a, View) {
  return b.paged_write(q, a.out[0], a.out[1], a.in[0], a.in[1], batch(a.in + 2));
}
Status paged_attention(Backend& b, Queue q, A a, View workspace) {
  AttentionOptions options;
  options.scale = real(a.scalars[0]);
  options.causal = a.scalars[1] != 0;
  options.window = whole(a.scalars[2]);
  options.softcap = real(a.scalars[3]);
  options.round_weights = a.scalars[4] != 0;
  options.alibi_slopes = a.in[6];
  options.sinks = a.in[7];
  if (options.window < 0) return Status::error(Code::value, "the window is not a length");
  return b.paged_attention(q, a.out[0], a.in[0], a.in[1], a.in[2], batch(a.in + 3), options, workspace);
}
size_t paged_attention_space(const Backend& b, A a) {
  return b.paged_attention_workspace(a.in[0], a.in[1], a.in[2], batch(a.in + 3));
}

// ---- choosing tokens

Status cross_entropy(Backend& b, Queue q, A a, View) {
  return b.cross_entropy(q, a.out[0], a.in[0], a.in[1]);
}
Status argmax(Backend& b, Queue q, A a, View) { return b.argmax(q, a.out[0], a.in[0]); }
Status sample(Backend& b, Queue q, A a, View workspace) {
  return b.sample(q, a.out[0], a.in[0], a.in[1], a.out[1], a.out[2], workspace);
}
size_t sample_space(const Backend& b, A a) { return b.sample_workspace(a.in[0]); }

}  // namespace

bool takes_experts(const Backend& backend, const double* numbers) {
  const int64_t dtype = whole(numbers[0]);
  if (dtype < 0 || dtype > static_cast<int64_t>(DType::bf16) || !is_form(numbers[3])) return false;
  Experts experts = form_of(numbers + 3);
  experts.count = whole(numbers[2]);
  return backend.takes_experts(static_cast<DType>(dtype), whole(numbers[1]), experts);
}

const Op kOps[] = {
    {"fill", "r", "", 1, fill, nullptr},
    {"copy", "r", "r", 0, copy, nullptr},
    {"binary", "r", "rr", 1, binary, nullptr},
    {"activation", "r", "r", 1, activation, nullptr},
    {"gated_activation", "r", "rr", 1, gated_activation, nullptr},
    {"gather_rows", "r", "rr", 0, gather_rows, nullptr},
    {"mean", "r", "r", 0, mean, mean_space},
    {"count_nonfinite", "r", "r", 0, count_nonfinite, nullptr},
    {"rms_norm", "ro", "roo", 2, rms_norm, nullptr},
    {"layer_norm", "ro", "rooo", 1, layer_norm, nullptr},
    {"quantize_4bit", "rr", "r", 2, quantize_4bit, nullptr},
    {"dequantize_4bit", "r", "rrooo", 5, dequantize_4bit, nullptr},
    {"tile_4bit", "rr", "rr", 3, tile_4bit, nullptr},
    {"quantize_blockwise", "rr", "rr", 1, quantize_blockwise, nullptr},
    {"dequantize_blockwise", "r", "rrr", 1, dequantize_blockwise, nullptr},
    {"gather_rows_4bit", "r", "rrooor", 5, gather_rows_4bit, nullptr},
    {"gather_rows_8bit", "r", "rrr", 0, gather_rows_8bit, nullptr},
    {"int8_quantize_rows", "rro", "r", 2, int8_quantize_rows, nullptr},
    {"int8_dequantize_rows", "r", "rr", 0, int8_dequantize_rows, nullptr},
    {"int8_matmul", "r", "rr", 0, int8_matmul, nullptr},
    {"int8_matmul_dequantize", "r", "rrro", 0, int8_matmul_dequantize, nullptr},
    {"linear", "r", "roor", 0, linear, linear_space},
    {"linear_4bit", "r", "roorrooo", 5, linear_4bit, linear_4bit_space},
    {"linear_4bit_group", "roo", "rorrooooooooooooooo", 15, linear_4bit_group, linear_4bit_group_space},
    {"linear_4bit_gated", "r", "rorroooorrooo", 11, linear_4bit_gated, linear_4bit_gated_space},
    {"linear_8bit", "r", "roorr", 2, linear_8bit, linear_8bit_space},
    {"route_tokens", "rr", "ro", 4, route_tokens, nullptr},
    {"linear_experts", "r", "rr*", kExpertScalars, linear_experts, linear_experts_space},
    {"linear_experts_gated", "r", "rr*", kExpertScalars + 1, linear_experts_gated,
     linear_experts_gated_space},
    {"weighted_sum", "r", "rro", 0, weighted_sum, nullptr},
    {"rope_tables", "rr", "r", 1, rope_tables, nullptr},
    {"ragged_positions", "r", "rrr", 0, ragged_positions, nullptr},
    {"rope", "r", "rrrr", 1, rope, nullptr},
    {"paged_write", "RR", "rrrrr", 0, paged_write, nullptr},
    {"paged_attention", "r", "rrrrrroo", 5, paged_attention, paged_attention_space},
    {"cross_entropy", "r", "rr", 0, cross_entropy, nullptr},
    {"argmax", "r", "r", 0, argmax, nullptr},
    {"sample", "rRO", "rr", 0, sample, sample_space},
};
const int kOpCount = static_cast<int>(sizeof(kOps) / sizeof(kOps[0]));

}  // namespace halfbyte
