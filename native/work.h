// A piece of work for a device's queue, and the storages that it touches. The executor looks after order,
// memory and failures; a Work says only what to do.
#pragma once

#include <memory>
#include <vector>

#include "errors.h"
#include "storage.h"

namespace halfbyte {

/// How work touches a storage. Work that reads spoilt data does not run. Work that overwrites all of a
/// storage makes it good again; work that writes a part of it does not.
struct Use {
  StoragePtr storage;
  bool reads;
  bool writes;
  bool overwrites;
};

class Work {
 public:
  virtual ~Work() = default;
  virtual Status run(Backend& backend, Queue queue) = 0;
  /// After run(), or in its place when an operand had failed. On the executor's thread.
  virtual void done(const FailurePtr&) {}
  /// Name for messages.
  virtual const char* name() const = 0;
  /// True when done() hands results to the host: the backend has to have finished, not only begun.
  virtual bool ends_on_host() const { return false; }

  /// False for work that is made of other work: its uses order it, and each part looks after failures by
  /// itself.
  virtual bool passes_failures() const { return true; }

  std::vector<Use> uses;
  /// Work of an environment that has ended is dropped. May be null.
  std::shared_ptr<EnvironmentLink> owner;
};

using WorkPtr = std::shared_ptr<Work>;

}  // namespace halfbyte
