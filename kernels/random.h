// The random numbers that sampling draws, the same on every device: Philox 4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), keyed by the seed, with the draw counter as its counter. A
// draw depends on (seed, counter) and on nothing else.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HALFBYTE_ANYWHERE __host__ __device__
#else
#define HALFBYTE_ANYWHERE
#endif

namespace halfbyte {

/// The four words of a Philox 4x32-10 block, in place.
HALFBYTE_ANYWHERE inline void philox(uint32_t (&x)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    const uint32_t y0 = static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0;
    const uint32_t y2 = static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1;
    x[0] = y0;
    x[1] = static_cast<uint32_t>(b);
    x[2] = y2;
    x[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/// Uniform in [0, 1), a multiple of 2^-53: the block of counter (counter, 0), its first word above, the upper
/// 21 bits of its second below.
HALFBYTE_ANYWHERE inline double uniform(int64_t seed, int64_t counter) {
  const uint64_t c = static_cast<uint64_t>(counter);
  uint32_t x[4] = {static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), 0, 0};
  philox(x, static_cast<uint64_t>(seed));
  const uint64_t bits = (static_cast<uint64_t>(x[0]) << 21) | (x[1] >> 11);
  return static_cast<double>(bits) * 1.1102230246251565e-16;  // 2^-53
}

}  // namespace halfbyte
