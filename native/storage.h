// Memory of a device, and what is known about it: who uses it, which queued work touched it last, and the
// failure that spoilt it. A Storage is held by tensor handles, queued work and graphs; the last one to let go
// frees it.
//
// `data` and `failure` belong to the executor's threads, whose order the marks establish. The marks belong to
// the one JavaScript thread that made the storage: handles do not travel between environments.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"
#include "errors.h"

namespace halfbyte {

class Device;
class EnvironmentLink;

/// Host memory that belongs to a JavaScript ArrayBuffer. It may be used between enter() and leave(); revoke()
/// waits for those who are inside and lets nobody in again: an environment that ends takes its ArrayBuffers
/// along.
class Borrow {
 public:
  bool enter();
  void leave();
  void revoke();

 private:
  std::mutex mutex_;
  std::condition_variable left_;
  int inside_ = 0;
  bool revoked_ = false;
};

/// The last work on one queue that touched a storage, and the last that wrote it. 0: none.
struct Mark {
  Device* device;
  Queue queue;
  uint64_t touched = 0;
  uint64_t written = 0;
};

class Storage {
 public:
  Storage(Device* device, size_t bytes, std::shared_ptr<EnvironmentLink> home);
  /// On memory of an ArrayBuffer. `token` names the reference that keeps the ArrayBuffer
  /// (EnvironmentLink::unborrow).
  Storage(Device* device, size_t bytes, std::shared_ptr<EnvironmentLink> home, void* data,
          std::shared_ptr<Borrow> borrow, void* token);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  /// Memory is taken when the first work that touches the storage runs, so that it follows the queue's order.
  Status allocate(Queue queue);
  void* data() const { return data_.load(std::memory_order_acquire); }

  Mark& mark(Device* by, Queue queue);
  /// What the environment keeps the ArrayBuffer by; null for memory of the device.
  void* token() const { return token_; }

  Device* const device;
  const size_t bytes;
  const uint64_t id;
  const std::shared_ptr<Borrow> borrow;
  FailurePtr failure;
  std::vector<Mark> marks;

 private:
  std::atomic<void*> data_{nullptr};
  Queue allocated_on_ = Queue::compute;
  const std::shared_ptr<EnvironmentLink> home_;
  void* const token_ = nullptr;
};

using StoragePtr = std::shared_ptr<Storage>;

}  // namespace halfbyte
