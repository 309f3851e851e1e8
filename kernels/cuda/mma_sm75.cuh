// What mma.cuh's names mean on sm_75, which has neither asynchronous copies nor products of 16 k, and none of
// bfloat16 at all: correct, and slower.
#pragma once

#include "common.cuh"

namespace halfbyte::cuda {

__device__ __forceinline__ void store_now(uint32_t shared, const uint4& piece) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(piece.x), "r"(piece.y),
               "r"(piece.z), "r"(piece.w)
               : "memory");
}
/// The copy has happened when this returns. `bytes` as in copy_async().
__device__ __forceinline__ void copy_now(uint32_t shared, const void* global, int bytes) {
  uint4 piece = make_uint4(0, 0, 0, 0);
  if (bytes == 16) {
    piece = *static_cast<const uint4*>(global);
  } else {
    uint32_t* const words = &piece.x;
    for (int i = 0; i < bytes; ++i)
      words[i / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(global)[i]) << (i % 4 * 8);
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(piece.x), "r"(piece.y),
               "r"(piece.z), "r"(piece.w)
               : "memory");
}

__device__ __forceinline__ void copy_word_now(uint32_t shared, const void* global, int bytes) {
  const uint32_t word = bytes > 0 ? *static_cast<const uint32_t*>(global) : 0;
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared), "r"(word) : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8] as two products of 8 k: the fragments of the larger one are theirs, side
/// by side.
__device__ __forceinline__ void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1, half_t) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// c [16, 8] += a [16, 32] b [32, 8] of int8 as four products of 8 rows and 16 k.
__device__ __forceinline__ void multiply_quarters(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    asm volatile(
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%4}, {%0, %1};\n"
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%3}, {%5}, {%0, %1};\n"
        : "+r"(c[2 * h]), "+r"(c[2 * h + 1])
        : "r"(a[h]), "r"(a[h + 2]), "r"(b0), "r"(b1));
  }
}

/// multiply_halves() of bfloat16, which has no tensor cores here. Lane 4 g + t has c of rows g, g + 8 and
/// columns 2 t, 2 t + 1, a of rows g, g + 8 and k = 2 t, 2 t + 1 and 8 further, b of column g and those k:
/// every lane asks the others for its rows and columns.
__device__ __forceinline__ void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1, bf16_t) {
  const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
  const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b = half ? b1 : b0;
      const uint32_t left = __shfl_sync(0xffffffffu, b, column + t);
      const uint32_t right = __shfl_sync(0xffffffffu, b, column + 4 + t);
      const uint32_t top = __shfl_sync(0xffffffffu, a[2 * half], row + t);
      const uint32_t bottom = __shfl_sync(0xffffffffu, a[2 * half + 1], row + t);
      c[0] = fmaf(high(top), high(left), fmaf(low(top), low(left), c[0]));
      c[1] = fmaf(high(top), high(right), fmaf(low(top), low(right), c[1]));
      c[2] = fmaf(high(bottom), high(left), fmaf(low(bottom), low(left), c[2]));
      c[3] = fmaf(high(bottom), high(right), fmaf(low(bottom), low(right), c[3]));
    }
  }
}

}  // namespace halfbyte::cuda
