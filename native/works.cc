#include "works.h"

#include <system_error>

#include "device.h"
#include "reader.h"

namespace halfbyte {
namespace {

// From so many bytes on an upload goes through pinned buffers: several threads that fill them are several
// times as fast as the driver's own staging.
constexpr size_t kStaged = 8 << 20;

char* at(const Storage* storage, size_t offset) { return static_cast<char*>(storage->data()) + offset; }

void locate(View* views, const OpWork::Operand* operands, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (operands[i].storage) views[i].data = at(operands[i].storage, operands[i].offset);
  }
}

/// Ordinary host memory to a device. The memory is not looked at any more when this returns, or the queue has
/// been waited for.
Status upload(Backend& backend, Queue queue, void* to, const void* from, size_t bytes) {
  if (backend.host_memory() || bytes < kStaged) return backend.upload(queue, to, from, bytes);
  const ReadFunction copy = [from](void* piece, size_t length, int64_t offset) {
    std::memcpy(piece, static_cast<const char*>(from) + offset, length);
  };
  try {
    return ReadAhead(backend, copy, 0, bytes, true).upload(queue, to);
  } catch (const std::system_error&) {
    return backend.upload(queue, to, from, bytes);  // there are no threads to be had
  }
}

/// Memory for the time of one op.
class Workspace {
 public:
  Workspace(Backend& backend, Queue queue, size_t bytes) : backend_(backend), queue_(queue) {
    if (bytes == 0) return;
    status_ = backend.allocate(queue, bytes, &view_.data);
    if (!status_.ok()) return;
    view_.dtype = DType::u8;
    view_.ndim = 1;
    view_.shape[0] = static_cast<int64_t>(bytes);
    view_.strides[0] = 1;
  }
  ~Workspace() {
    if (view_) backend_.release(queue_, view_.data, static_cast<size_t>(view_.shape[0]));
  }
  const Status& status() const { return status_; }
  const View& view() const { return view_; }

 private:
  Backend& backend_;
  Queue queue_;
  View view_;
  Status status_;
};

}  // namespace

Status OpWork::run(Backend& backend, Queue queue) {
  locate(out, out_at, kMaxOutputs);
  locate(in, in_at, kMaxInputs);
  locate(list.data(), list_at.data(), list.size());
  const Arguments arguments{out, in, scalars, list.data(), static_cast<int64_t>(list.size())};
  if (!op.workspace) return op.run(backend, queue, arguments, View{});
  const Workspace workspace(backend, queue, op.workspace(backend, arguments));
  if (!workspace.status().ok()) return workspace.status();
  return op.run(backend, queue, arguments, workspace.view());
}

Status ReadWork::run(Backend& backend, Queue queue) {
  bytes_ = std::make_unique<HostBytes>(size_);
  return backend.download(queue, bytes_->data, at(storage_, offset_), size_);
}

void ReadWork::done(const FailurePtr& failure) { owner->settle({promise_, failure, std::move(bytes_)}); }

Status WriteWork::run(Backend& backend, Queue queue) {
  return upload(backend, queue, at(storage_, offset_), bytes_->data, bytes_->size);
}

Status TransferWork::run(Backend& backend, Queue queue) {
  if (from_->device->backend().host_memory()) {
    return upload(backend, queue, to_->data(), at(from_, offset_), to_->bytes);
  }
  return backend.download(queue, to_->data(), at(from_, offset_), to_->bytes);
}

}  // namespace halfbyte
