// Rows chosen by id from a table of floats, of 4-bit codes, of int8 codes. Fast for rows of some hundred
// elements and more; 4-bit rows may begin inside a block and inside a byte. An id outside the table gives a
// row of NaN.
#include <cstring>
#include <string>
#include <type_traits>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

#define HALFBYTE_FILE "gather.cc"
#include "per_isa.h"

#ifdef HALFBYTE_ISA
#include "simd.h"
//
#include "blocks4.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

static void row_4bit(DType dtype, void* y, const Weight4& w, const float* code, int64_t row) {
  with_float_type(dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    expand_range(static_cast<T*>(y), w, code, row * w.k, (row + 1) * w.k);
  });
}

static void codebook_values(QuantType type, float* values) { values_of(type, values); }

}  // namespace halfbyte::cpu::HALFBYTE_ISA

#else

namespace halfbyte::cpu {
namespace {

int64_t id_at(const View& ids, int64_t i) {
  if (ids.dtype == DType::i64) {
    int64_t id;
    std::memcpy(&id, ids.as<const char>() + i * 8, sizeof id);
    return id;
  }
  int32_t id;
  std::memcpy(&id, ids.as<const char>() + i * 4, sizeof id);
  return id;
}

/// A row that cannot be mistaken for data.
void fill_nan(DType dtype, char* row, int64_t cols) {
  with_float_type(dtype, [&](auto* type) {
    std::remove_pointer_t<decltype(type)> nan;
    from_float(bits_to_float(0x7fc00000u), &nan);
    for (int64_t c = 0; c < cols; ++c) std::memcpy(row + c * sizeof nan, &nan, sizeof nan);
  });
}

Status check_gather(const char* op, const View& y, const View& ids, int64_t cols) {
  if (ids.dtype != DType::i32 && ids.dtype != DType::i64)
    return refuse_dtype(op, "ids must be int32 or int64");
  if (!is_float(y.dtype)) return refuse_dtype(op, "y must be of a float dtype");
  if (!y.is_contiguous() || !ids.is_contiguous()) return refuse(op, "y and ids must be contiguous");
  if (y.size() != ids.size() * cols) return refuse(op, "y does not hold one row per id");
  return {};
}

/// Calls copy(row of y, id) for every id that is in the table.
template <typename Copy>
void each_row(const View& y, const View& ids, int64_t vocabulary, int64_t cols, const Copy& copy) {
  const int64_t bytes = cols * size_of(y.dtype);
  parallel_for(ids.size(), 1 + 16384 / (bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = id_at(ids, i);
      char* row = y.as<char>() + i * bytes;
      if (id < 0 || id >= vocabulary) {
        fill_nan(y.dtype, row, cols);
      } else {
        copy(row, id);
      }
    }
  });
}

}  // namespace

Status CpuBackend::gather_rows(Queue, View y, View table, View ids) {
  const int64_t cols = table.cols();
  if (Status status = check_gather("gather_rows", y, ids, cols); !status.ok()) return status;
  if (y.dtype != table.dtype) return refuse_dtype("gather_rows", "table and result must be of one dtype");
  if (!table.is_contiguous()) return refuse("gather_rows", "the table must be contiguous");
  const int64_t bytes = cols * size_of(y.dtype);
  each_row(y, ids, table.rows(), cols, [&](char* row, int64_t id) {
    if (bytes > 0) std::memcpy(row, table.as<const char>() + id * bytes, static_cast<size_t>(bytes));
  });
  return {};
}

Status CpuBackend::gather_rows_4bit(Queue, View y, const Weight4& w, View ids) {
  if (Status status = check_weight4("gather_rows_4bit", w); !status.ok()) return status;
  if (Status status = check_gather("gather_rows_4bit", y, ids, w.k); !status.ok()) return status;
  float code[16];
  HALFBYTE_PICK(codebook_values)(w.type, code);
  const auto expand = HALFBYTE_PICK(row_4bit);
  each_row(y, ids, w.n, w.k, [&](char* row, int64_t id) { expand(y.dtype, row, w, code, id); });
  return {};
}

Status CpuBackend::gather_rows_8bit(Queue, View y, View codes, View scb, View ids) {
  const int64_t cols = codes.cols();
  if (Status status = check_gather("gather_rows_8bit", y, ids, cols); !status.ok()) return status;
  if (codes.dtype != DType::i8 || scb.dtype != DType::f32) {
    return refuse_dtype("gather_rows_8bit", "codes must be int8 and scb float32");
  }
  if (!codes.is_contiguous() || !scb.is_contiguous() || scb.size() != codes.rows()) {
    return refuse("gather_rows_8bit", "scb must have one entry for each row of contiguous codes");
  }
  with_float_type(y.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    each_row(y, ids, codes.rows(), cols, [&](char* row, int64_t id) {
      float scale;
      std::memcpy(&scale, scb.as<const char>() + id * 4, sizeof scale);
      const int8_t* in = codes.as<int8_t>() + id * cols;
      for (int64_t c = 0; c < cols; ++c) {
        T value;
        from_float(static_cast<float>(in[c]) * scale * kInt8Scale, &value);
        std::memcpy(row + c * static_cast<int64_t>(sizeof value), &value, sizeof value);
      }
    });
  });
  return {};
}

}  // namespace halfbyte::cpu
#endif
