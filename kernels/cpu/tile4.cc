// Between the flat and the tiled layout of a 4-bit weight (formats.h). The CPU computes on flat weights; it
// re-orders those that come from a device which keeps them tiled, or go to one.
#include <cstring>

#include "common.h"
#include "cpu_backend.h"
#include "pool.h"

namespace halfbyte::cpu {

Status CpuBackend::tile_4bit(Queue, View codes, View absmax, View from_codes, View from_absmax, int64_t n,
                             int64_t k, Layout4 to) {
  if (!can_tile(n, k, kTileK)) return refuse("tile_4bit", "these sizes cannot be tiled");
  const bool tile = to == Layout4::tiled;
  const size_t width = static_cast<size_t>(size_of(absmax.dtype));
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < k / 2; ++i) {
        const int64_t flat = r * (k / 2) + i, tiled = tiled_byte(r, i, k);
        codes.as<uint8_t>()[tile ? tiled : flat] = from_codes.as<const uint8_t>()[tile ? flat : tiled];
      }
      for (int64_t b = 0; b < k / kTileK; ++b) {
        const int64_t flat = r * (k / kTileK) + b, tiled = tiled_block(r, b, k);
        std::memcpy(absmax.as<char>() + static_cast<size_t>(tile ? tiled : flat) * width,
                    from_absmax.as<const char>() + static_cast<size_t>(tile ? flat : tiled) * width, width);
      }
    }
  });
  return {};
}

}  // namespace halfbyte::cpu
