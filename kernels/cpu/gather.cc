// gather_rows: rows of a float table chosen by id.
#include <cstring>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"
#include "strided.h"

namespace halfbyte::cpu {
namespace {

int64_t id_at(const View& ids, int64_t i) {
  return ids.dtype == DType::i64 ? get(ids.as<int64_t>() + i) : get(ids.as<int32_t>() + i);
}

/// A row that cannot be mistaken for data.
void fill_nan(DType dtype, char* row, int64_t cols) {
  with_float_type(dtype, [&](auto* type) {
    std::remove_pointer_t<decltype(type)> nan;
    from_float(bits_to_float(0x7fc00000u), &nan);
    for (int64_t c = 0; c < cols; ++c) std::memcpy(row + c * sizeof nan, &nan, sizeof nan);
  });
}

}  // namespace

Status CpuBackend::gather_rows(Queue, View y, View table, View ids) {
  const int64_t vocabulary = table.rows(), cols = table.cols(), count = ids.size();
  if (y.size() != count * cols) return refuse("gather_rows", "y does not hold one row per id");
  if (y.dtype != table.dtype || !is_float(y.dtype)) {
    return refuse_dtype("gather_rows", "table and result must be of one float dtype");
  }
  const size_t bytes = static_cast<size_t>(cols * size_of(y.dtype));
  parallel_for(count, 1 + 32768 / (static_cast<int64_t>(bytes) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = id_at(ids, i);
      char* row = y.as<char>() + static_cast<size_t>(i) * bytes;
      if (id < 0 || id >= vocabulary) {
        fill_nan(y.dtype, row, cols);
      } else {
        std::memcpy(row, table.as<const char>() + static_cast<size_t>(id) * bytes, bytes);
      }
    }
  });
  return {};
}

}  // namespace halfbyte::cpu
