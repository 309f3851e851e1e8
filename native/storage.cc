#include "storage.h"

#include "device.h"
#include "environment.h"

namespace halfbyte {
namespace {

std::atomic<uint64_t> next_id{1};
// Only the first touch of a storage takes it, and only for the time of an allocation.
std::mutex allocation_mutex;

}  // namespace

bool Borrow::enter() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (revoked_) return false;
  ++inside_;
  return true;
}

void Borrow::leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (--inside_ == 0) left_.notify_all();
}

void Borrow::revoke() {
  std::unique_lock<std::mutex> lock(mutex_);
  revoked_ = true;
  left_.wait(lock, [&] { return inside_ == 0; });
}

Storage::Storage(Device* device, size_t bytes, std::shared_ptr<EnvironmentLink> home)
    : device(device), bytes(bytes), id(next_id.fetch_add(1)), home_(std::move(home)) {}

Storage::Storage(Device* device, size_t bytes, std::shared_ptr<EnvironmentLink> home, void* data,
                 std::shared_ptr<Borrow> borrow, void* token)
    : device(device),
      bytes(bytes),
      id(next_id.fetch_add(1)),
      borrow(std::move(borrow)),
      data_(data),
      home_(std::move(home)),
      token_(token) {}

Storage::~Storage() {
  if (borrow) {
    home_->unborrow(token_);
    return;
  }
  void* const memory = data();
  if (!memory) return;
  if (device->backend().host_memory()) home_->memory_taken(-static_cast<int64_t>(bytes));
  device->release(allocated_on_, memory, bytes, marks);
}

Status Storage::allocate(Queue queue) {
  if (data()) return {};
  std::lock_guard<std::mutex> lock(allocation_mutex);
  if (data()) return {};
  void* memory = nullptr;
  Status status = device->backend().allocate(queue, bytes, &memory);
  if (!status.ok()) return status;
  if (device->backend().host_memory()) home_->memory_taken(static_cast<int64_t>(bytes));
  allocated_on_ = queue;
  data_.store(memory, std::memory_order_release);
  return {};
}

Mark& Storage::mark(Device* by, Queue queue) {
  for (Mark& mark : marks) {
    if (mark.device == by && mark.queue == queue) return mark;
  }
  marks.push_back(Mark{by, queue});
  return marks.back();
}

}  // namespace halfbyte
