// Walking several strided views of one shape together. Neighbouring dimensions that lie in memory like one
// are merged, so that a contiguous operand is a single run however many dimensions it has, and a matrix with
// a row stride is one run per row. Runs are cut into pieces and spread over the pool.
#pragma once

#include <cstring>

#include "../backend.h"
#include "pool.h"

namespace halfbyte::cpu {

/// Element access at any address.
template <typename T>
inline T get(const T* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <typename T>
inline void put(T* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

/// N views of one shape after merging: `ndim` outer dimensions and a run of `run` elements inside, with
/// strides in elements for each operand.
template <int N>
struct StridedLoop {
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[N][kMaxDims] = {};
  int64_t run = 1;
  int64_t step[N] = {};
  int64_t rows = 1;

  explicit StridedLoop(const View* const (&views)[N]) {
    const View& first = *views[0];
    for (int d = 0; d < first.ndim; ++d) {
      if (first.shape[d] == 1) continue;
      bool merges = ndim > 0;
      for (int i = 0; i < N && merges; ++i) {
        merges = strides[i][ndim - 1] == views[i]->strides[d] * first.shape[d];
      }
      if (!merges) {
        shape[ndim] = 1;
        ++ndim;
      }
      shape[ndim - 1] *= first.shape[d];
      for (int i = 0; i < N; ++i) strides[i][ndim - 1] = views[i]->strides[d];
    }
    if (ndim > 0) {
      --ndim;
      run = shape[ndim];
      for (int i = 0; i < N; ++i) step[i] = strides[i][ndim];
    } else {
      for (int i = 0; i < N; ++i) step[i] = 1;
    }
    for (int d = 0; d < ndim; ++d) rows *= shape[d];
  }

  bool contiguous_runs() const {
    for (int i = 0; i < N; ++i) {
      if (step[i] != 1) return false;
    }
    return true;
  }

  /// Calls body(offsets, count) for pieces of at most `piece` elements; offsets[i] is the piece's first
  /// element of operand i.
  template <typename Body>
  void each(int64_t piece, const Body& body) const {
    if (rows <= 0 || run <= 0) return;
    const int64_t pieces = (run + piece - 1) / piece;
    const int64_t grain = run >= piece ? 1 : (piece + run - 1) / run;
    parallel_for(rows * pieces, grain, [&](int64_t begin, int64_t end) {
      int64_t index[kMaxDims] = {};
      int64_t offsets[N] = {};
      int64_t rest = begin / pieces, part = begin % pieces;
      for (int d = ndim - 1; d >= 0; --d) {
        index[d] = rest % shape[d];
        rest /= shape[d];
        for (int i = 0; i < N; ++i) offsets[i] += index[d] * strides[i][d];
      }
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t start = part * piece;
        int64_t at[N];
        for (int i = 0; i < N; ++i) at[i] = offsets[i] + start * step[i];
        body(at, run - start < piece ? run - start : piece);
        if (++part < pieces) continue;
        part = 0;
        for (int d = ndim - 1; d >= 0; --d) {
          for (int i = 0; i < N; ++i) offsets[i] += strides[i][d];
          if (++index[d] < shape[d]) break;
          for (int i = 0; i < N; ++i) offsets[i] -= strides[i][d] * shape[d];
          index[d] = 0;
        }
      }
    });
  }
};

inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
  }
  return true;
}

}  // namespace halfbyte::cpu
