#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace halfbyte::cpu {
namespace {

int cgroup_quota() {
  // cgroup v2: "max 100000" or "200000 100000"
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    char quota[32] = "";
    long period = 0;
    const int fields = std::fscanf(f, "%31s %ld", quota, &period);
    std::fclose(f);
    if (fields == 2 && std::strcmp(quota, "max") != 0 && period > 0) {
      return std::max(1, static_cast<int>((std::atol(quota) + period - 1) / period));
    }
  }
  return 1 << 20;
}

struct Size {
  int threads = 1;
  std::string complaint;
};

constexpr int kMostThreads = 1024;

Size choose_size() {
  Size size;
  if (const char* wanted = std::getenv("HALFBYTE_NUM_THREADS"); wanted && *wanted) {
    char* end = nullptr;
    const long n = std::strtol(wanted, &end, 10);
    if (*end == '\0' && n >= 1 && n <= kMostThreads) {
      size.threads = static_cast<int>(n);
      return size;
    }
    size.complaint = "HALFBYTE_NUM_THREADS is '" + std::string(wanted) +
                     "'; it must be a whole number from 1 to " + std::to_string(kMostThreads);
  }
  int affinity = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) affinity = CPU_COUNT(&set);
#endif
  size.threads = std::max(1, std::min(affinity, cgroup_quota()));
  return size;
}

/// What the environment asks of the pool, as it was at the first question.
const Size& size() {
  static const Size chosen = choose_size();
  return chosen;
}

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void yield() { std::this_thread::yield(); }

constexpr int kSpins = 400;

thread_local bool inside_region = false;

struct Region {
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t chunks = 0;
};

class Pool {
 public:
  explicit Pool(int threads) {
    while (threads_ < threads) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        break;  // a limit on threads: go on with those there are
      }
      ++threads_;
    }
  }

  int threads() const { return threads_; }

  void run(const Region& region) {
    std::lock_guard<std::mutex> one_region(region_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_ = region;
      next_.store(0, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    inside_region = true;
    drain(region);
    inside_region = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_ = Region{};  // a worker that comes late finds nothing to join
    }
    // When the machine is busy a worker may not be running: let it.
    for (int i = 0; active_.load(std::memory_order_acquire) != 0; ++i) i < kSpins ? relax() : yield();
  }

 private:
  void drain(const Region& region) {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= region.chunks) return;
      region.body(region.context, chunk);
    }
  }

  /// Regions follow each other within microseconds in a forward pass, and waking a sleeper costs its waker
  /// more than ten: looks for the next one a while, giving way to other threads, before it sleeps.
  void await_region(uint64_t seen) {
    using Clock = std::chrono::steady_clock;
    const auto come = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    for (int i = 0; i < kSpins; ++i) {
      if (come()) return;
      relax();
    }
    const auto end = Clock::now() + std::chrono::microseconds(60);
    while (!come() && Clock::now() < end) yield();
  }

  void work() {
    inside_region = true;
    uint64_t seen = 0;
    for (;;) {
      await_region(seen);
      Region region;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        region = region_;
        if (!region.body) continue;
        active_.fetch_add(1, std::memory_order_relaxed);  // run() does not return before this is back at 0
      }
      drain(region);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  int threads_ = 1;  // fixed once constructed
  std::mutex region_mutex_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};
  Region region_;
};

// Never destroyed: its threads outlive every static object.
Pool& pool() {
  static Pool* instance = new Pool(size().threads);
  return *instance;
}

}  // namespace

int pool_threads() { return pool().threads(); }

const char* pool_complaint() { return size().complaint.c_str(); }

void pool_run(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  if (chunks <= 0) return;
  if (chunks == 1 || inside_region || pool().threads() == 1) {
    for (int64_t i = 0; i < chunks; ++i) body(context, i);
    return;
  }
  pool().run(Region{body, context, chunks});
}

}  // namespace halfbyte::cpu
