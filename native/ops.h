// The table of ops: how the operands and scalars that lib/tensor/ops/ passes become a call of the backend.
#pragma once

#include "backend.h"

namespace halfbyte {

constexpr int kMaxOutputs = 3;
constexpr int kMaxInputs = 19;
constexpr int kMaxScalars = 16;

struct Arguments {
  const View* out;
  const View* in;
  const double* scalars;
  /// The operands of a list, and how many.
  const View* list;
  int64_t listed;
};

/// `outputs` and `inputs` have a letter for each operand:
///   r  required          o  optional
///   R  required output that is also read, or written only in part
///   O  the same, optional
///   *  at the end of the inputs: a list of any length follows, of optional operands
struct Op {
  const char* name;
  const char* outputs;
  const char* inputs;
  int scalars;
  Status (*run)(Backend&, Queue, const Arguments&, View workspace);
  /// Bytes of workspace; null for none. Looks at shapes only.
  size_t (*workspace)(const Backend&, const Arguments&);
};

/// Of the experts' weights of a product: form, type, blocksize, n, k, layout, threshold, exact.
constexpr int kExpertScalars = 8;

/// Backend::takes_experts() for dtype, pairs, count and those.
bool takes_experts(const Backend& backend, const double* numbers);

extern const Op kOps[];
extern const int kOpCount;

}  // namespace halfbyte
