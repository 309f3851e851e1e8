// How a warp reads a tiled 4-bit weight for a few rows of x: units of 4 tiles, 256 k, straight into
// registers.
#pragma once

#include "tiled4.cuh"

namespace halfbyte::cuda {

constexpr int kUnit = 4;  // tiles

/// Where a row tile of one of the weights begins.
struct RowTile {
  const uint8_t* codes;
  const char* absmax;
  const float* nested;
  int64_t block;  // number of the first absmax of its first row, in the flat order
  int part;
};

/// That of the row tile whose first tile has number `tile`; `absmax` is fp32 or, nested, uint8.
__device__ __forceinline__ RowTile row_tile_of(const uint8_t* codes, const void* absmax, const float* nested,
                                               bool is_nested, int64_t tile, int part) {
  const char* const scales = static_cast<const char*>(absmax) + tile * kTileRows * (is_nested ? 1 : 4);
  return {codes + tile * 512, scales, nested, tile * kTileRows, part};
}

/// What a lane 4 g + t holds of a unit: its 16 bytes of each tile, and of tile t the absmax of rows g and
/// g + 8.
template <bool kNested>
struct Unit {
  uint4 codes[kUnit];
  float2 scale;   // nested: their nested absmax
  uint32_t code;  // nested: two bytes

  __device__ __forceinline__ void fetch(const RowTile& at, int tile, int tiles, int lane) {
    const uint8_t* from = at.codes + (tile * 512 + lane * 16);
#pragma unroll
    for (int kk = 0; kk < kUnit; ++kk) codes[kk] = __ldcs(reinterpret_cast<const uint4*>(from) + kk * 32);
    const int mine = tile + lane % 4, g = lane / 4;
    if (kNested) {
      code = *reinterpret_cast<const uint16_t*>(at.absmax + mine * 16 + 2 * g);
      const int64_t block = at.block + static_cast<int64_t>(g) * tiles + mine;
      scale.x = at.nested[block / kNestedBlocksize];
      scale.y = at.nested[(block + int64_t{8} * tiles) / kNestedBlocksize];
    } else {
      scale = *reinterpret_cast<const float2*>(at.absmax + mine * 64 + 8 * g);
    }
  }
};

}  // namespace halfbyte::cuda
