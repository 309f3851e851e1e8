// PTX behind names: asynchronous copies into shared memory, ldmatrix, and the warp matrix product of sm_80
// and up; sm_75 does what they say in its own way.
#pragma once

#include "common.cuh"
#include "mma_sm75.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define HALFBYTE_SM75 1
#else
#define HALFBYTE_SM75 0
#endif

namespace halfbyte::cuda {

/// 16 bytes from global to shared memory; `bytes` < 16 fills the rest with zeros (0: all of it, src is not
/// read).
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
#if HALFBYTE_SM75
  copy_now(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
#endif
}
/// The same for 4 bytes, or zeros.
__device__ __forceinline__ void copy_word_async(uint32_t shared, const void* global, int bytes) {
#if HALFBYTE_SM75
  copy_word_now(shared, global, bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
#endif
}
/// For what is not read again: it is the first to leave L2.
__device__ __forceinline__ uint64_t once_policy() {
  uint64_t policy = 0;
#if !HALFBYTE_SM75
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
#endif
  return policy;
}
/// 16 bytes with that policy.
__device__ __forceinline__ void copy_once(uint32_t shared, const void* global, uint64_t policy) {
#if HALFBYTE_SM75
  copy_now(shared, global, 16);
#else
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "l"(policy)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#if !HALFBYTE_SM75
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
/// Waits until at most `pending` groups are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#if !HALFBYTE_SM75
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
#endif
}

/// kCount such copies of 16 bytes or none: begun one by one, then handed over. On sm_75 they are on the way
/// to registers in between.
template <int kCount>
struct Copies {
#if HALFBYTE_SM75
  uint4 pieces[kCount];
  uint32_t places[kCount];
  bool begun = false;
#endif
  __device__ __forceinline__ void begin(int i, uint32_t shared, const void* global, int bytes) {
#if HALFBYTE_SM75
    pieces[i] = bytes > 0 ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
    places[i] = shared;
    begun = true;
#else
    copy_async(shared, global, bytes);
#endif
  }
  __device__ __forceinline__ void hand_over() {
#if HALFBYTE_SM75
    if (!begun) return;
    begun = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) store_now(places[i], pieces[i]);
#endif
  }
};

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

/// The same, each of the matrices transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

/// c [16, 8] += a [16, 16] b [16, 8], fp32 accumulation.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         half_t) {
#if HALFBYTE_SM75
  multiply_halves(c, a, b0, b1, half_t{});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         bf16_t) {
#if HALFBYTE_SM75
  multiply_halves(c, a, b0, b1, bf16_t{});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, "
      "%2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// c [16, 8] += a [16, 32] b [32, 8] of int8; a register has four k.
__device__ __forceinline__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         int8_t) {
#if HALFBYTE_SM75
  multiply_quarters(c, a, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// c = a b: the first of a sum.
__device__ __forceinline__ void multiply_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1, half_t) {
#if HALFBYTE_SM75
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  multiply_halves(c, a, b0, b1, half_t{});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, "
      "%10, %10, %10};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
#endif
}
__device__ __forceinline__ void multiply_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1, bf16_t) {
#if HALFBYTE_SM75
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  multiply_halves(c, a, b0, b1, bf16_t{});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace halfbyte::cuda
