#include "works.h"

#include "device.h"

namespace halfbyte {
namespace {

char* at(const Storage* storage, size_t offset) { return static_cast<char*>(storage->data()) + offset; }

template <size_t N>
void locate(View (&views)[N], const OpWork::Operand (&operands)[N]) {
  for (size_t i = 0; i < N; ++i) {
    if (operands[i].storage) views[i].data = at(operands[i].storage, operands[i].offset);
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
  locate(out, out_at);
  locate(in, in_at);
  const Arguments arguments{out, in, scalars};
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
  return backend.upload(queue, at(storage_, offset_), bytes_->data, bytes_->size);
}

Status TransferWork::run(Backend& backend, Queue queue) {
  if (from_->device->backend().host_memory()) {
    return backend.upload(queue, to_->data(), at(from_, offset_), to_->bytes);
  }
  return backend.download(queue, to_->data(), at(from_, offset_), to_->bytes);
}

}  // namespace halfbyte
