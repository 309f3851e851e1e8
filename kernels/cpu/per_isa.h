// Compiles the file that includes this once per instruction set, without per-file compiler flags:
//
//   #include <everything from std that is needed>   // before: std code must not be built for one ISA
//   #include "pool.h" ...
//   #define HALFBYTE_FILE "norms.cc"
//   #include "per_isa.h"
//   #ifdef HALFBYTE_ISA
//   #include "simd.h"
//   namespace halfbyte::cpu::HALFBYTE_ISA { /* kernels on simd.h; HALFBYTE_ISA_LEVEL is 0, 2 or 512 */ }
//   #else
//   namespace halfbyte::cpu { /* compiled once: checks, then HALFBYTE_PICK(kernel)(args...) */ }
//   #endif
//
// In the per-ISA part use no std templates (their instantiations would be shared between instruction sets).
// No include guard: the file includes itself again through HALFBYTE_FILE.
#ifndef HALFBYTE_ISA

#include "isa.h"

#define HALFBYTE_ISA plain
#define HALFBYTE_ISA_LEVEL 0
#include HALFBYTE_FILE
#undef HALFBYTE_ISA
#undef HALFBYTE_ISA_LEVEL

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define HALFBYTE_ISA avx2
#define HALFBYTE_ISA_LEVEL 2
#include HALFBYTE_FILE
#undef HALFBYTE_ISA
#undef HALFBYTE_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define HALFBYTE_ISA avx512
#define HALFBYTE_ISA_LEVEL 512
#include HALFBYTE_FILE
#undef HALFBYTE_ISA
#undef HALFBYTE_ISA_LEVEL
#pragma GCC pop_options

#define HALFBYTE_PICK(kernel)                                              \
  (::halfbyte::cpu::isa() == ::halfbyte::cpu::Isa::avx512 ? avx512::kernel \
   : ::halfbyte::cpu::isa() == ::halfbyte::cpu::Isa::avx2 ? avx2::kernel   \
                                                          : plain::kernel)
#else
#define HALFBYTE_PICK(kernel) (plain::kernel)
#endif

#endif  // HALFBYTE_ISA
