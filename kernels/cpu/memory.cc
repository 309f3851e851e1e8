// Memory, queues and events of the CPU device. Work runs inside the call, so there is nothing to order: every
// event is null, a point already passed. Freed blocks of activation size are kept by size for the next op,
// which spares the page faults of a fresh mapping.
#include "cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "pool.h"

namespace halfbyte::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeFrom = 4 * kHugePage;
constexpr size_t kLargestCached = size_t{64} << 20;
constexpr size_t kMostCached = size_t{256} << 20;

size_t round_up(size_t bytes) {
  if (bytes == 0) return kAlignment;
  // four sizes per power of two: at most a quarter is wasted and sizes of one shape family share blocks
  size_t step = kAlignment;
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

/// Large blocks lie on huge pages where the system grants them: a weight is read from front to back once a
/// token, and at every border of a small page the hardware's prefetch stops and an address must be looked up.
void* map(size_t bytes) {
  const bool huge = bytes >= kHugeFrom;
  void* block = nullptr;
  if (posix_memalign(&block, huge ? kHugePage : kAlignment, bytes) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
  if (huge) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish: no error matters
#endif
  return block;
}

class BlockCache {
 public:
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& blocks = free_[bytes];
    if (blocks.empty()) return nullptr;
    void* block = blocks.back();
    blocks.pop_back();
    cached_ -= bytes;
    return block;
  }
  bool give(void* block, size_t bytes) {
    if (bytes > kLargestCached) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    if (cached_ + bytes > kMostCached) return false;
    free_[bytes].push_back(block);
    cached_ += bytes;
    return true;
  }
  void trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [bytes, blocks] : free_) {
      for (void* block : blocks) std::free(block);
    }
    free_.clear();
    cached_ = 0;
  }
  size_t cached() {
    std::lock_guard<std::mutex> lock(mutex_);
    return cached_;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t cached_ = 0;
};

BlockCache& block_cache() {
  static BlockCache* cache = new BlockCache;
  return *cache;
}

int64_t read_number(const char* path) {
  int64_t n = -1;
  if (FILE* f = std::fopen(path, "r")) {
    long long value;
    if (std::fscanf(f, "%lld", &value) == 1) n = value;
    std::fclose(f);
  }
  return n;
}

}  // namespace

CpuBackend::~CpuBackend() { block_cache().trim(); }

std::string CpuBackend::name() const { return index_ == 0 ? "cpu" : "cpu:" + std::to_string(index_); }

Status CpuBackend::allocate(Queue, size_t bytes, void** out) {
  const size_t size = round_up(bytes);
  void* block = block_cache().take(size);
  if (!block) block = map(size);
  if (!block) {
    block_cache().trim();
    block = map(size);
  }
  if (!block) {
    return no_memory(name(), bytes, memory());
  }
  const int64_t now = allocated_.fetch_add(static_cast<int64_t>(size)) + static_cast<int64_t>(size);
  int64_t peak = peak_.load();
  while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
  }
  *out = block;
  return {};
}

void CpuBackend::release(Queue, void* data, size_t bytes) {
  if (!data) return;
  const size_t size = round_up(bytes);
  allocated_.fetch_sub(static_cast<int64_t>(size));
  if (!block_cache().give(data, size)) std::free(data);
}

MemoryInfo CpuBackend::memory() const {
  MemoryInfo info;
  const int64_t page = sysconf(_SC_PAGESIZE);
  info.total = sysconf(_SC_PHYS_PAGES) * page;
  info.free = sysconf(_SC_AVPHYS_PAGES) * page;
  if (FILE* f = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    long long kib;
    while (std::fgets(line, sizeof line, f)) {
      if (std::sscanf(line, "MemAvailable: %lld kB", &kib) == 1) info.free = kib * 1024;
    }
    std::fclose(f);
  }
  const int64_t limit = read_number("/sys/fs/cgroup/memory.max");
  const int64_t used = read_number("/sys/fs/cgroup/memory.current");
  if (limit > 0 && limit < info.total) {
    info.total = limit;
    if (used >= 0 && limit - used < info.free) info.free = limit - used;
  }
  info.allocated = allocated_.load();
  info.reserved = info.allocated + static_cast<int64_t>(block_cache().cached());
  info.peak = peak_.load();
  return info;
}

void CpuBackend::reset_peak() { peak_.store(allocated_.load()); }

Status CpuBackend::allocate_host(size_t bytes, void** out) { return allocate(Queue::copy, bytes, out); }
void CpuBackend::release_host(void* data, size_t bytes) { release(Queue::copy, data, bytes); }

Status CpuBackend::upload(Queue, void* device, const void* host, size_t bytes) {
  if (bytes) std::memcpy(device, host, bytes);
  return {};
}
Status CpuBackend::download(Queue queue, void* host, const void* device, size_t bytes) {
  return upload(queue, host, device, bytes);
}

Status CpuBackend::record(Queue, Event* out) {
  out->reset();
  return {};
}
Status CpuBackend::wait(Queue, const Event&) { return {}; }
Status CpuBackend::synchronize(const Event&) { return {}; }

namespace {
Status no_graphs() { return Status::error(Code::unsupported, "the CPU backend has no native graphs"); }
}  // namespace

Status CpuBackend::begin_capture() { return no_graphs(); }
Status CpuBackend::end_capture(Graph*) { return no_graphs(); }
Status CpuBackend::launch(const Graph&) { return no_graphs(); }

}  // namespace halfbyte::cpu

namespace halfbyte {
std::unique_ptr<Backend> make_cpu_backend(int index) { return std::make_unique<cpu::CpuBackend>(index); }
}  // namespace halfbyte
