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
  const float* nested;  // that of the first absmax of its first row
  int rest;             // place of that absmax in its nested block
  int part;
};

/// That of the row tile whose first tile has number `tile`; `absmax` is fp32 or, nested, uint8.
__device__ __forceinline__ RowTile row_tile_of(const uint8_t* codes, const void* absmax, const float* nested,
                                               bool is_nested, int64_t tile, int part) {
  const int64_t block = tile * kTileRows;
  const char* const scales = static_cast<const char*>(absmax) + block * (is_nested ? 1 : 4);
  return {codes + tile * 512, scales, is_nested ? nested + block / kNestedBlocksize : nullptr,
          static_cast<int>(block % kNestedBlocksize), part};
}

/// Read by nobody else, and not again.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 value;  // where it stands: what comes before has to free registers
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

/// Where the codes of a lane begin in the unit whose first tile is `tile`; those of the next tile are 32
/// further.
__device__ __forceinline__ const uint4* unit_codes(const RowTile& at, int tile, int lane) {
  return reinterpret_cast<const uint4*>(at.codes + (tile * 512 + lane * 16));
}

/// What a lane 4 g + t holds of a unit: its 16 bytes of each tile, and of one tile, t where it is fetched as
/// a whole, the absmax of rows g and g + 8.
template <bool kNested>
struct Unit {
  uint4 codes[kUnit];
  float2 scale;   // nested: their nested absmax
  uint32_t code;  // nested: two bytes

  __device__ __forceinline__ void fetch(const RowTile& at, int tile, int tiles, int lane) {
    fetch_codes(at, tile, lane);
    fetch_scale(at, tile + lane % 4, tiles, lane);
  }
  __device__ __forceinline__ void fetch_codes(const RowTile& at, int tile, int lane) {
    const uint4* const from = unit_codes(at, tile, lane);
#pragma unroll
    for (int kk = 0; kk < kUnit; ++kk) codes[kk] = __ldcs(from + kk * 32);
  }
  __device__ __forceinline__ void fetch_scale(const RowTile& at, int tile, int tiles, int lane) {
    const int g = lane / 4;
    if (kNested) {
      code = *reinterpret_cast<const uint16_t*>(at.absmax + tile * 16 + 2 * g);
      constexpr uint32_t kBlock = kNestedBlocksize;
      const uint32_t block = at.rest + g * tiles + tile;
      scale.x = at.nested[block / kBlock];
      scale.y = at.nested[(block + 8 * tiles) / kBlock];
    } else {
      scale = *reinterpret_cast<const float2*>(at.absmax + tile * 64 + 8 * g);
    }
  }
};

}  // namespace halfbyte::cuda
