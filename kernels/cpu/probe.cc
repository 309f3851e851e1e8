// The read bandwidth and the multiply-add peak of this machine, measured on the pool that the ops run on.
//
// Reading: every thread takes chunks of a large buffer, which the pool handed out as the ops' weights are,
// and adds up whole vectors from four streams at once; the sum is stored so that no load is dropped.
// Multiply-add: sixteen independent chains per thread, enough to fill two units of four to five cycles
// latency; the plain level, which has no fused instruction, multiplies and adds.
#include "probe.h"

#include <chrono>
#include <cstring>

#include "cpu_backend.h"
#include "pool.h"

#define HALFBYTE_FILE "probe.cc"
#include "per_isa.h"
#ifdef HALFBYTE_ISA
#include "simd.h"

namespace halfbyte::cpu::HALFBYTE_ISA {

/// Sums `n` floats, n a multiple of 256, as four streams of a quarter each.
static float read_floats(const float* p, int64_t n) {
  const int64_t quarter = n / 4;
  F a[4][2];
  for (int s = 0; s < 4; ++s) a[s][0] = a[s][1] = set1(0.0f);
  for (int64_t i = 0; i < quarter; i += 2 * W) {
    for (int s = 0; s < 4; ++s) {
#if defined(__x86_64__)
      __builtin_prefetch(p + s * quarter + i + 512);
#endif
      a[s][0] = add(a[s][0], load(p + s * quarter + i));
      a[s][1] = add(a[s][1], load(p + s * quarter + i + W));
    }
  }
  F sum = set1(0.0f);
  for (int s = 0; s < 4; ++s) sum = add(sum, add(a[s][0], a[s][1]));
  return reduce_add(sum);
}

constexpr int kChains = HALFBYTE_ISA_LEVEL == 2 ? 12 : 16;

/// Runs `steps` multiply-adds in each of kChains vectors; *operations counts them.
static float multiply_add(int64_t steps, double* operations) {
  const F scale = set1(0.999f), shift = set1(0.001f);
  F chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = set1(1.0f + static_cast<float>(c));
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
#if HALFBYTE_ISA_LEVEL == 0
      chain[c] = add(mul(chain[c], scale), shift);
#else
      chain[c] = fma(chain[c], scale, shift);
#endif
    }
  }
  F sum = set1(0.0f);
  for (int c = 0; c < kChains; ++c) sum = add(sum, chain[c]);
  *operations = 2.0 * W * kChains * static_cast<double>(steps);
  return reduce_add(sum);
}

}  // namespace halfbyte::cpu::HALFBYTE_ISA
#else

namespace halfbyte::cpu {
namespace {

volatile float sink;

template <typename Body>
double seconds(const Body& body) {
  const auto began = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace

double probe_read_bandwidth(int64_t bytes, int repeats) {
  constexpr int64_t kChunk = int64_t{1} << 20;
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  if (chunks <= 0) return 0.0;
  const auto backend = make_cpu_backend(0);
  void* buffer = nullptr;
  if (!backend->allocate(Queue::compute, static_cast<size_t>(chunks * kChunk), &buffer).ok()) return 0.0;
  const char* const data = static_cast<char*>(buffer);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(buffer) + begin * kChunk, 0, static_cast<size_t>((end - begin) * kChunk));
  });
  const auto read = HALFBYTE_PICK(read_floats);
  double best = 0.0;
  for (int i = 0; i < repeats; ++i) {
    const double elapsed = seconds([&] {
      parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
        sink = read(reinterpret_cast<const float*>(data + begin * kChunk), (end - begin) * kChunk / 4);
      });
    });
    const double rate = static_cast<double>(chunks * kChunk) / elapsed;
    if (rate > best) best = rate;
  }
  backend->release(Queue::compute, buffer, static_cast<size_t>(chunks * kChunk));
  return best;
}

double probe_fma_peak(int repeats) {
  constexpr int64_t kSteps = 2'000'000;
  const int threads = pool_threads();
  const auto burst = HALFBYTE_PICK(multiply_add);
  double best = 0.0;
  for (int i = 0; i < repeats; ++i) {
    double operations = 0.0;
    const double elapsed = seconds([&] {
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          double mine = 0.0;
          sink = burst(kSteps, &mine);
          if (thread == 0) operations = mine;
        }
      });
    });
    const double rate = operations * threads / elapsed;
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace halfbyte::cpu
#endif
