// Two 4-bit weights at a time: a byte of codes becomes a register of two 16-bit values by one look-up.
//
// The table has an entry for each of the 256 bytes, repeated for each lane: lane l reads its own bank, so
// look-ups never collide, and the address is put together by one byte permute:
//
//   byte 3, 2  0 | byte 1  the codes | byte 0  4 * lane        entry e of lane l at 256 e + 4 l
//
// That takes 64 KiB of which every other 128 bytes are free; they hold the 256-entry map of double
// quantisation (fp32, at 256 q + 128 + 4 l), looked up in the same way.
#pragma once

#include <type_traits>

#include "tiled4.cuh"

namespace halfbyte::cuda {

constexpr int kTable4Bytes = 64 << 10;

/// The 16 values as a kernel parameter: it is there when the kernel begins, a table in memory would be a
/// miss.
struct Book4 {
  uint16_t bits[16];
};
template <typename T>
Book4 book_of(QuantType type) {
  Book4 book;
  for (int i = 0; i < 16; ++i) {
    float value = codebook(type)[i];
    if (type == QuantType::fp4 && i == 8) value = -0.0f;
    book.bits[i] = std::is_same_v<T, half_t> ? float_to_f16(value) : float_to_bf16(value);
  }
  return book;
}

/// Fills the table in dynamic shared memory; the block synchronises afterwards. `map` is the nested code or
/// null. Of a byte the high half is the even k, in the low half of the register.
__device__ __forceinline__ void fill_table4(char* table, const Book4& book, const float* map) {
  constexpr int kPieces = 256 * 8, kOnce = 8;  // kOnce: reads of the map of a thread, under way together
  for (int first = threadIdx.x; first < kPieces; first += kOnce * blockDim.x) {
    float values[kOnce] = {};
    if (map) {
#pragma unroll
      for (int j = 0; j < kOnce; ++j) values[j] = map[min(first + j * blockDim.x, kPieces - 1u) / 8];
    }
#pragma unroll
    for (int j = 0; j < kOnce; ++j) {
      const int i = first + j * blockDim.x, byte = i / 8;
      if (i >= kPieces) break;
      char* const to = table + byte * 256 + i % 8 * 16;
      const uint32_t pair = book.bits[byte >> 4] | static_cast<uint32_t>(book.bits[byte & 15]) << 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(pair, pair, pair, pair);
      if (map) *reinterpret_cast<float4*>(to + 128) = make_float4(values[j], values[j], values[j], values[j]);
    }
  }
}

/// Byte i of `word` between the bytes of `lane4` = 4 * lane.
template <int i>
__device__ __forceinline__ uint32_t table_offset(uint32_t word, uint32_t lane4) {
  uint32_t offset;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(word), "r"(lane4), "n"(0x5504 | i << 4));
  return offset;
}

/// The A fragment that a word of a tile stands for.
__device__ __forceinline__ void look_up(uint32_t (&a)[4], const char* table, uint32_t word, uint32_t lane4) {
  a[0] = *reinterpret_cast<const uint32_t*>(table + table_offset<0>(word, lane4));
  a[1] = *reinterpret_cast<const uint32_t*>(table + table_offset<1>(word, lane4));
  a[2] = *reinterpret_cast<const uint32_t*>(table + table_offset<2>(word, lane4));
  a[3] = *reinterpret_cast<const uint32_t*>(table + table_offset<3>(word, lane4));
}

/// Entry `code` of the nested map.
__device__ __forceinline__ float map_value(const char* table, uint32_t code, uint32_t lane4) {
  return *reinterpret_cast<const float*>(table + (code << 8 | lane4) + 128);
}

/// The same without gaps: entry e of lane l at 128 e + 4 l. Addresses take a multiply-add of bytes, and the
/// nested map follows once, so that its look-ups may collide.
constexpr int kCompactTable4Bytes = 256 * 128, kCompactMap4Bytes = 256 * 4;

/// By so many threads, from number 0 on; the block synchronises afterwards. `map` as above.
__device__ __forceinline__ void fill_compact_table4(char* table, const Book4& book, const float* map,
                                                    int threads) {
  const int thread = threadIdx.x;
  const float value = map && thread < 256 ? map[thread] : 0.0f;  // under way meanwhile
  for (int i = thread; i < 256 * 8; i += threads) {
    const int byte = i / 8;
    const uint32_t pair = book.bits[byte >> 4] | static_cast<uint32_t>(book.bits[byte & 15]) << 16;
    *reinterpret_cast<uint4*>(table + i * 16) = make_uint4(pair, pair, pair, pair);
  }
  if (!map) return;
  float* const to = reinterpret_cast<float*>(table + kCompactTable4Bytes);
  if (thread < 256) to[thread] = value;
  if (threads >= 256) return;
  for (int i = thread + threads; i < 256; i += threads) to[i] = map[i];
}
/// As look_up(): a byte times 128 + 4 * lane is an address.
__device__ __forceinline__ void look_up_compact(uint32_t (&a)[4], const char* table, uint32_t word,
                                                uint32_t lane4) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = *reinterpret_cast<const uint32_t*>(table + __dp4a(word, 128u << (8 * i), lane4));
}

/// Both halves of `pair` times those of `scale`.
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, uint32_t scale, half_t) {
  const __half2 scaled = __hmul2(*reinterpret_cast<__half2*>(&pair), *reinterpret_cast<__half2*>(&scale));
  return *reinterpret_cast<const uint32_t*>(&scaled);
}
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, uint32_t scale, bf16_t) {
  const __nv_bfloat162 scaled =
      __hmul2(*reinterpret_cast<__nv_bfloat162*>(&pair), *reinterpret_cast<__nv_bfloat162*>(&scale));
  return *reinterpret_cast<const uint32_t*>(&scaled);
}

}  // namespace halfbyte::cuda
