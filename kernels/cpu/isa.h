// Which instruction set the CPU backend runs on: the best of this machine, or the one HALFBYTE_CPU_ISA names.
#pragma once

namespace halfbyte::cpu {

enum class Isa { plain, avx2, avx512 };

/// avx2 means AVX2 + FMA + F16C; avx512 means F + BW + DQ + VL. Decided once per process.
Isa isa();
const char* isa_name();

/// Whether the code has AVX-VNNI: assemblers of the age of these compilers know it (binutils 2.36).
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HALFBYTE_AVX_VNNI 1
#else
#define HALFBYTE_AVX_VNNI 0
#endif

/// AVX512-VNNI when isa() is avx512, AVX-VNNI when it is avx2; HALFBYTE_CPU_VNNI=off says no to both.
bool has_vnni();

/// Why HALFBYTE_CPU_ISA or HALFBYTE_CPU_VNNI was not obeyed, or an empty string.
const char* isa_complaint();

}  // namespace halfbyte::cpu
