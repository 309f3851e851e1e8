// The one thread pool of the process: min(affinity, cgroup quota) threads, or HALFBYTE_NUM_THREADS. Devices
// and JavaScript workers share it; one parallel region runs at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace halfbyte::cpu {

/// Threads that a parallel region runs on, the caller included.
int pool_threads();

/// Why HALFBYTE_NUM_THREADS was not obeyed; "" when it was, or is not set.
const char* pool_complaint();

/// Calls body(context, chunk) for every chunk in 0 .. chunks-1, spread over the pool; returns when all are
/// done. Called from inside a region it runs in the calling thread.
void pool_run(int64_t chunks, void (*body)(void* context, int64_t chunk), void* context);

/// body(begin, end) over 0 .. n in ranges of at least `grain`, a few per thread so that uneven ones even out.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t most = static_cast<int64_t>(pool_threads()) * 4;
  int64_t chunks = grain > 0 ? (n + grain - 1) / grain : n;
  if (chunks > most) chunks = most;
  if (chunks <= 1) {
    body(static_cast<int64_t>(0), n);
    return;
  }
  struct Context {
    const Body* body;
    int64_t n, chunks;
  } context{&body, n, chunks};
  pool_run(
      chunks,
      [](void* p, int64_t chunk) {
        const auto& c = *static_cast<Context*>(p);
        const int64_t size = c.n / c.chunks, extra = c.n % c.chunks;
        const int64_t begin = chunk * size + (chunk < extra ? chunk : extra);
        (*c.body)(begin, begin + size + (chunk < extra ? 1 : 0));
      },
      &context);
}

}  // namespace halfbyte::cpu
