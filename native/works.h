// The kinds of work that are queued on a device.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "environment.h"
#include "ops.h"
#include "work.h"

namespace halfbyte {

/// An op of the table. Operands keep the order of the table; an absent one has no view.
class OpWork final : public Work {
 public:
  explicit OpWork(const Op& op) : op(op) {}
  const char* name() const override { return op.name; }
  Status run(Backend& backend, Queue queue) override;

  struct Operand {
    Storage* storage = nullptr;
    size_t offset = 0;
  };
  const Op& op;
  View out[kMaxOutputs], in[kMaxInputs];
  Operand out_at[kMaxOutputs], in_at[kMaxInputs];
  std::vector<View> list;
  std::vector<Operand> list_at;
  double scalars[kMaxScalars] = {};
};

/// The bytes of a storage, for a promise.
class ReadWork final : public Work {
 public:
  ReadWork(const StoragePtr& storage, size_t offset, size_t size, napi_deferred promise)
      : storage_(storage.get()), offset_(offset), size_(size), promise_(promise) {
    uses.push_back(Use{storage, true, false, false});
  }
  const char* name() const override { return "read"; }
  bool ends_on_host() const override { return true; }
  Status run(Backend& backend, Queue queue) override;
  void done(const FailurePtr& failure) override;

 private:
  Storage* storage_;
  size_t offset_, size_;
  napi_deferred promise_;
  std::unique_ptr<HostBytes> bytes_;
};

/// Host bytes into a storage.
class WriteWork final : public Work {
 public:
  WriteWork(const StoragePtr& storage, size_t offset, std::unique_ptr<HostBytes> bytes)
      : storage_(storage.get()), offset_(offset), bytes_(std::move(bytes)) {
    uses.push_back(Use{storage, false, true, offset == 0 && bytes_->size == storage->bytes});
  }
  const char* name() const override { return "write"; }
  bool ends_on_host() const override { return true; }  // bytes_ goes with the work
  Status run(Backend& backend, Queue queue) override;

 private:
  Storage* storage_;
  size_t offset_;
  std::unique_ptr<HostBytes> bytes_;
};

/// A storage's bytes from another device, one of the two being the host.
class TransferWork final : public Work {
 public:
  TransferWork(const StoragePtr& to, const StoragePtr& from, size_t offset)
      : to_(to.get()), from_(from.get()), offset_(offset) {
    uses.push_back(Use{to, false, true, true});
    uses.push_back(Use{from, true, false, false});
  }
  const char* name() const override { return "to"; }
  bool ends_on_host() const override { return true; }
  Status run(Backend& backend, Queue queue) override;

 private:
  Storage *to_, *from_;
  size_t offset_;
};

/// Reports to a promise when every queue that it was put on has come to it.
class FenceWork final : public Work {
 public:
  struct Promise {
    Promise(std::shared_ptr<EnvironmentLink> link, napi_deferred deferred, int queues)
        : link(std::move(link)), deferred(deferred), open(queues) {}
    std::shared_ptr<EnvironmentLink> link;
    napi_deferred deferred;
    std::atomic<int> open;
  };
  explicit FenceWork(std::shared_ptr<Promise> promise) : promise_(std::move(promise)) {}
  const char* name() const override { return "synchronize"; }
  bool ends_on_host() const override { return true; }
  Status run(Backend&, Queue) override { return {}; }
  void done(const FailurePtr& failure) override {
    if (promise_->open.fetch_sub(1) == 1) promise_->link->settle({promise_->deferred, failure, nullptr});
  }

 private:
  std::shared_ptr<Promise> promise_;
};

}  // namespace halfbyte
