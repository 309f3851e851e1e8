#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace halfbyte::cpu {
namespace {

struct Choice {
  Isa isa = Isa::plain;
  bool vnni = false;
  const char* complaint = "";
};

#if defined(__x86_64__)
/// AVX-VNNI; asked of the CPU itself, as not every compiler's __builtin_cpu_supports() knows its name.
bool supports_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return HALFBYTE_AVX_VNNI && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
#endif

Choice choose() {
  Isa best = Isa::plain;
  bool vnni = false, vnni256 = false;  // of AVX-512, and of AVX2
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    vnni256 = supports_avx_vnni();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
      vnni = __builtin_cpu_supports("avx512vnni");
    }
  }
#endif
  Choice choice;
  choice.isa = best;
  if (const char* wanted = std::getenv("HALFBYTE_CPU_ISA"); wanted && *wanted) {
    if (!std::strcmp(wanted, "plain")) {
      choice.isa = Isa::plain;
    } else if (!std::strcmp(wanted, "avx2")) {
      choice.isa = best < Isa::avx2 ? best : Isa::avx2;
      if (best < Isa::avx2) choice.complaint = "HALFBYTE_CPU_ISA=avx2, but this CPU lacks AVX2, FMA or F16C";
    } else if (!std::strcmp(wanted, "avx512")) {
      if (best < Isa::avx512)
        choice.complaint = "HALFBYTE_CPU_ISA=avx512, but this CPU lacks AVX-512 F, BW, DQ or VL";
    } else {
      choice.complaint = "HALFBYTE_CPU_ISA must be plain, avx2 or avx512";
    }
  }
  choice.vnni = choice.isa == Isa::avx512 ? vnni : choice.isa == Isa::avx2 && vnni256;
  if (const char* wanted = std::getenv("HALFBYTE_CPU_VNNI"); wanted && *wanted) {
    if (!std::strcmp(wanted, "off")) {
      choice.vnni = false;
    } else if (std::strcmp(wanted, "on") != 0) {
      choice.complaint = "HALFBYTE_CPU_VNNI must be on or off";
    } else if (!choice.vnni) {
      choice.complaint = "HALFBYTE_CPU_VNNI=on, but this CPU or the instruction set chosen lacks VNNI";
    }
  }
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

Isa isa() { return choice().isa; }
bool has_vnni() { return choice().vnni; }
const char* isa_complaint() { return choice().complaint; }
const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "plain";
  }
}

}  // namespace halfbyte::cpu
