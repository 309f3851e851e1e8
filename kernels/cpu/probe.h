// What this machine can do at most: the yardsticks that benchmarks hold the kernels against.
#pragma once

#include <cstdint>

namespace halfbyte::cpu {

/// Bytes per second at which the pool reads `bytes` of memory once from front to back; the best of `repeats`
/// passes. 0 when the memory cannot be had. Use several times the size of the last-level cache.
double probe_read_bandwidth(int64_t bytes, int repeats);

/// fp32 operations per second (a fused multiply-add counts two) of the pool on registers alone, on the
/// instruction set in use; the best of `repeats` bursts of some milliseconds.
double probe_fma_peak(int repeats);

}  // namespace halfbyte::cpu
