// One JavaScript environment (the main thread, or a worker) that loaded the addon.
//
// Environment is what belongs to its thread. EnvironmentLink is the part that native threads hold, and
// outlives it: through it they settle promises, give ArrayBuffers back and report freed memory, or learn that
// it has ended.
#pragma once

#include <node_api.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "errors.h"
#include "storage.h"

namespace halfbyte {

/// Bytes on their way to an ArrayBuffer.
struct HostBytes {
  explicit HostBytes(size_t size);
  ~HostBytes();
  HostBytes(const HostBytes&) = delete;
  HostBytes& operator=(const HostBytes&) = delete;

  void* data;
  size_t size;
};

/// A promise with its outcome: a failure, or bytes, or undefined.
struct Settlement {
  napi_deferred promise;
  FailurePtr failure;
  std::unique_ptr<HostBytes> bytes;
};

class Environment;
struct Handle;

class EnvironmentLink {
 public:
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  // From any thread.
  void settle(Settlement settlement);
  void unborrow(void* reference);
  /// Host memory taken (or given back, when negative); V8 hears of it at the next call.
  void memory_taken(int64_t bytes) { untold_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  friend class Environment;
  void wake();  // with mutex_ held

  std::mutex mutex_;
  std::atomic<bool> closed_{false};
  napi_threadsafe_function function_ = nullptr;
  bool awake_ = false;
  std::vector<Settlement> settled_;
  std::vector<napi_ref> unborrowed_;
  std::atomic<int64_t> untold_{0};
};

class Environment {
 public:
  /// Sets up the environment and its teardown; nullptr (and a pending exception) when Node refuses.
  static Environment* create(napi_env env);
  static Environment* of(napi_env env);

  /// A promise that is settled through link()->settle(); keeps the event loop alive until then.
  napi_value promise(napi_deferred* deferred);
  /// A promise rejected here and now.
  napi_value rejected(const Failure& failure);

  /// Keeps `array_buffer` until the storage that is made with `token` dies.
  std::shared_ptr<Borrow> borrow(napi_value array_buffer, void** token);

  /// Tells V8 about the host memory that was taken and given back since the last time.
  void tell_memory();

  const std::shared_ptr<EnvironmentLink>& link() const { return link_; }

  const napi_env env;
  /// Wrapped objects of ours, by address: what napi_unwrap gives for somebody else's object is not in here.
  std::unordered_set<const Handle*> handles;
  napi_ref tensor_class = nullptr, device_class = nullptr, graph_class = nullptr, file_class = nullptr;
  /// The object that the next construction of one of our classes wraps.
  Handle* under_construction = nullptr;
  std::unordered_map<Device*, napi_ref> devices;

 private:
  explicit Environment(napi_env env);
  static void on_settled(napi_env env, napi_value, void* context, void*);
  static void on_teardown(void* self);
  void drain();

  std::shared_ptr<EnvironmentLink> link_;
  std::vector<std::pair<napi_ref, std::weak_ptr<Borrow>>> borrows_;
  int open_promises_ = 0;
};

/// A JavaScript Error with code and message.
napi_value make_error(napi_env env, const Failure& failure);

}  // namespace halfbyte
