#include "device_handle.h"

#include <cstring>

#include "tensor_handle.h"
#include "works.h"

namespace halfbyte {
namespace {

DeviceHandle& this_device(Call& call) { return to_object<DeviceHandle>(call.self, call.receiver); }

StoragePtr new_storage(Environment& self, Device& device, size_t bytes) {
  self.tell_memory();
  return std::make_shared<Storage>(&device, bytes, self.link());
}

napi_value name(Call& call) { return make_string(call.env, this_device(call).device.backend().name()); }

napi_value tiles_4bit(Call& call) {
  napi_value result;
  check(call.env, napi_get_boolean(call.env, this_device(call).device.backend().tiles_4bit(), &result),
        "tiles4bit");
  return result;
}

napi_value empty(Call& call) {
  DeviceHandle& handle = this_device(call);
  size_t bytes;
  const View view = to_contiguous_view(call.env, call.arguments[0], call.arguments[1], &bytes);
  return make_tensor(call.self, new_storage(call.self, handle.device, bytes), view);
}

std::unique_ptr<HostBytes> copy_of(const HostView& host) {
  auto bytes = std::make_unique<HostBytes>(host.size);
  if (host.size) std::memcpy(bytes->data, host.data, host.size);
  return bytes;
}

napi_value from_host(Call& call) {
  DeviceHandle& handle = this_device(call);
  Backend& backend = handle.device.backend();
  size_t bytes;
  const View view = to_contiguous_view(call.env, call.arguments[0], call.arguments[1], &bytes);
  const HostView host = to_host_view(call.env, call.arguments[2]);
  const bool copy = to_bool(call.env, call.arguments[3], "copy");
  if (host.size != bytes) {
    fail("ERR_HALFBYTE_SHAPE", "fromHost: " + std::to_string(bytes) + " bytes are needed, the array has " +
                                   std::to_string(host.size));
  }
  if (!copy && backend.host_memory() && bytes > 0) {
    void* token = nullptr;
    std::shared_ptr<Borrow> borrow = call.self.borrow(host.array_buffer, &token);
    if (!borrow) fail("ERR_HALFBYTE_INTERNAL", "fromHost: the ArrayBuffer cannot be kept");
    return make_tensor(call.self,
                       std::make_shared<Storage>(&handle.device, bytes, call.self.link(), host.data,
                                                 std::move(borrow), token),
                       view);
  }
  StoragePtr storage = new_storage(call.self, handle.device, bytes);
  if (backend.issue_threads() == 2) {
    // Nothing is queued on new memory, and such a backend takes calls from any thread: one copy, made now.
    const Status status = storage->allocate(Queue::copy);
    if (!status.ok()) fail(name_of(status.code), "fromHost: " + status.message);
    if (bytes) std::memcpy(storage->data(), host.data, bytes);
  } else {
    auto work = std::make_shared<WriteWork>(storage, 0, copy_of(host));
    work->owner = call.self.link();
    handle.device.submit(Queue::copy, std::move(work));
  }
  return make_tensor(call.self, std::move(storage), view);
}

/// A tensor as an operand of an op; false for null.
bool take_operand(Call& call, DeviceHandle& handle, OpWork& work, napi_value value, const char* what,
                  View* view, OpWork::Operand* place, bool written, bool in_place) {
  napi_valuetype type;
  check(call.env, napi_typeof(call.env, value, &type), what);
  if (type == napi_null) return false;
  const TensorHandle& tensor = to_tensor(call.self, value);
  if (tensor.storage->device != &handle.device) {
    fail("ERR_HALFBYTE_DEVICE", std::string(work.op.name) + ": an operand lies on " +
                                    tensor.storage->device->backend().name() + ", not on " +
                                    handle.device.backend().name());
  }
  *view = tensor.view;
  *place = {tensor.storage.get(), tensor.offset};
  work.uses.push_back(
      Use{tensor.storage, !written || in_place, written, written && !in_place && tensor.covers_storage()});
  return true;
}

/// The largest list: gate and up of some thousand experts.
constexpr int kMostListed = 1 << 16;

/// Fills in one side of an op. `flags` are the letters of Op::outputs or Op::inputs.
void take_operands(Call& call, DeviceHandle& handle, OpWork& work, napi_value array, const char* flags,
                   View* views, OpWork::Operand* places, bool outputs) {
  const char* what = outputs ? "outputs" : "inputs";
  const int letters = static_cast<int>(std::strlen(flags));
  const bool lists = letters > 0 && flags[letters - 1] == '*';
  const int expected = lists ? letters - 1 : letters;
  const int count =
      each_of(call.env, array, lists ? expected + kMostListed : expected, what, [&](int i, napi_value value) {
        if (i >= expected) {
          View view;
          OpWork::Operand place;
          take_operand(call, handle, work, value, what, &view, &place, false, false);
          work.list.push_back(view);
          work.list_at.push_back(place);
          return;
        }
        const bool in_place = outputs && (flags[i] == 'R' || flags[i] == 'O');
        const bool there =
            take_operand(call, handle, work, value, what, views + i, places + i, outputs, in_place);
        if (!there && (flags[i] == 'r' || flags[i] == 'R')) {
          fail("ERR_HALFBYTE_VALUE", std::string(work.op.name) + ": operand " + std::to_string(i) +
                                         " of the " + what + " is not optional");
        }
      });
  if (count < expected) {
    fail("ERR_HALFBYTE_VALUE", std::string(work.op.name) + ": " + std::to_string(count) + " " + what +
                                   ", not " + std::to_string(expected));
  }
}

napi_value takes_experts(Call& call) {
  double numbers[3 + kExpertScalars];
  const int count =
      each_of(call.env, call.arguments[0], 3 + kExpertScalars, "form",
              [&](int i, napi_value value) { numbers[i] = to_double(call.env, value, "form"); });
  if (count != 3 + kExpertScalars) fail("ERR_HALFBYTE_VALUE", "takesExperts: a number is missing");
  const bool takes = takes_experts(this_device(call).device.backend(), numbers);
  return make_bool(call.env, takes);
}

napi_value run(Call& call) {
  DeviceHandle& handle = this_device(call);
  const int64_t id = to_size(call.env, call.arguments[0], "op");
  if (id >= kOpCount) fail("ERR_HALFBYTE_UNSUPPORTED", "There is no op " + std::to_string(id));
  const Op& op = kOps[id];
  auto work = std::make_shared<OpWork>(op);
  work->owner = call.self.link();
  work->uses.reserve(kMaxOutputs + kMaxInputs);
  take_operands(call, handle, *work, call.arguments[1], op.outputs, work->out, work->out_at, true);
  take_operands(call, handle, *work, call.arguments[2], op.inputs, work->in, work->in_at, false);
  const int scalars =
      each_of(call.env, call.arguments[3], op.scalars, "scalars",
              [&](int i, napi_value value) { work->scalars[i] = to_double(call.env, value, "scalar"); });
  if (scalars != op.scalars) {
    fail("ERR_HALFBYTE_VALUE", std::string(op.name) + ": " + std::to_string(scalars) + " scalars, not " +
                                   std::to_string(op.scalars));
  }
  handle.compute(std::move(work));
  return nullptr;
}

void refuse_in_capture(const DeviceHandle& handle, const char* what) {
  if (!handle.recording) return;
  fail("ERR_HALFBYTE_USAGE", std::string(what) + " inside of a capture on " + handle.device.backend().name() +
                                 ": ops are recorded there, not run; do it before or after");
}

TensorHandle& contiguous(Call& call, napi_value value, const char* what) {
  TensorHandle& tensor = to_tensor(call.self, value);
  if (!tensor.view.is_contiguous())
    fail("ERR_HALFBYTE_SHAPE", std::string(what) + ": the tensor is not contiguous");
  return tensor;
}

size_t bytes_of(const TensorHandle& tensor) {
  return static_cast<size_t>(tensor.view.size() * size_of(tensor.view.dtype));
}

/// The queue that wrote last: a read there waits for no other work than what came before it anyway.
Queue last_writer(const Storage& storage) {
  uint64_t compute = 0, copy = 0;
  for (const Mark& mark : storage.marks) {
    if (mark.device != storage.device) continue;
    (mark.queue == Queue::compute ? compute : copy) = mark.written;
  }
  if (compute == 0 || copy == 0) return copy > 0 ? Queue::copy : Queue::compute;
  return storage.device->progress(Queue::copy).reached(copy) ? Queue::compute : Queue::copy;
}

napi_value read(Call& call) {
  try {
    DeviceHandle& handle = this_device(call);
    refuse_in_capture(handle, "read");
    const TensorHandle& tensor = contiguous(call, call.arguments[0], "read");
    if (tensor.storage->device != &handle.device)
      fail("ERR_HALFBYTE_DEVICE", "read: the tensor lies on " + tensor.storage->device->backend().name());
    napi_deferred deferred;
    napi_value promise = call.self.promise(&deferred);
    if (!promise) throw PendingException{};
    auto work = std::make_shared<ReadWork>(tensor.storage, tensor.offset, bytes_of(tensor), deferred);
    work->owner = call.self.link();
    handle.device.submit(last_writer(*tensor.storage), std::move(work));
    return promise;
  } catch (const Failure& failure) {
    return call.self.rejected(failure);
  }
}

napi_value write(Call& call) {
  DeviceHandle& handle = this_device(call);
  const TensorHandle& tensor = contiguous(call, call.arguments[0], "write");
  const HostView host = to_host_view(call.env, call.arguments[1]);
  if (tensor.storage->device != &handle.device)
    fail("ERR_HALFBYTE_DEVICE", "write: the tensor lies on " + tensor.storage->device->backend().name());
  if (host.size != bytes_of(tensor)) {
    fail("ERR_HALFBYTE_SHAPE", "write: the tensor has " + std::to_string(bytes_of(tensor)) +
                                   " bytes, the array " + std::to_string(host.size));
  }
  auto work = std::make_shared<WriteWork>(tensor.storage, tensor.offset, copy_of(host));
  work->owner = call.self.link();
  handle.compute(std::move(work));
  return nullptr;
}

void transfer(Environment& self, Device& on, const StoragePtr& to, const StoragePtr& from, size_t offset) {
  auto work = std::make_shared<TransferWork>(to, from, offset);
  work->owner = self.link();
  on.submit(Queue::copy, std::move(work));
}

napi_value copy_from(Call& call) {
  DeviceHandle& handle = this_device(call);
  const TensorHandle& source = contiguous(call, call.arguments[0], "copyFrom");
  Device& from = *source.storage->device;
  refuse_in_capture(handle, "copyFrom");
  const auto found = call.self.devices.find(&from);
  if (found != call.self.devices.end()) {
    napi_value object;
    check(call.env, napi_get_reference_value(call.env, found->second, &object), "device");
    refuse_in_capture(to_object<DeviceHandle>(call.self, object), "copyFrom");
  }
  const size_t bytes = bytes_of(source);
  StoragePtr target = new_storage(call.self, handle.device, bytes);
  if (from.backend().host_memory()) {
    transfer(call.self, handle.device, target, source.storage, source.offset);
  } else if (handle.device.backend().host_memory()) {
    transfer(call.self, from, target, source.storage, source.offset);
  } else {
    const StoragePtr staging = new_storage(call.self, find_device("cpu"), bytes);
    transfer(call.self, from, staging, source.storage, source.offset);
    transfer(call.self, handle.device, target, staging, 0);
  }
  View view = source.view;
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return make_tensor(call.self, std::move(target), view);
}

napi_value synchronize(Call& call) {
  try {
    DeviceHandle& handle = this_device(call);
    refuse_in_capture(handle, "synchronize");
    napi_deferred deferred;
    napi_value promise = call.self.promise(&deferred);
    if (!promise) throw PendingException{};
    const auto shared = std::make_shared<FenceWork::Promise>(call.self.link(), deferred, 2);
    for (const Queue queue : {Queue::compute, Queue::copy}) {
      handle.device.submit(queue, std::make_shared<FenceWork>(shared));
    }
    return promise;
  } catch (const Failure& failure) {
    return call.self.rejected(failure);
  }
}

napi_value memory(Call& call) {
  const MemoryInfo info = this_device(call).device.backend().memory();
  napi_value result;
  check(call.env, napi_create_object(call.env, &result), "memory");
  const std::pair<const char*, int64_t> fields[] = {{"total", info.total},
                                                    {"free", info.free},
                                                    {"allocated", info.allocated},
                                                    {"reserved", info.reserved},
                                                    {"peak", info.peak}};
  for (const auto& [field, bytes] : fields) {
    napi_set_named_property(call.env, result, field, make_number(call.env, static_cast<double>(bytes)));
  }
  return result;
}

napi_value reset_peak(Call& call) {
  this_device(call).device.backend().reset_peak();
  return nullptr;
}

napi_value begin_capture(Call& call) {
  DeviceHandle& handle = this_device(call);
  if (handle.recording)
    fail("ERR_HALFBYTE_USAGE",
         "beginCapture: a capture is going on already on " + handle.device.backend().name());
  handle.recording = std::make_shared<Recording>();
  return nullptr;
}

napi_value end_capture(Call& call) {
  DeviceHandle& handle = this_device(call);
  if (!handle.recording)
    fail("ERR_HALFBYTE_USAGE", "endCapture: no capture is going on on " + handle.device.backend().name());
  return make_graph(call.self, handle.device, std::move(handle.recording));
}

}  // namespace

void DeviceHandle::compute(WorkPtr work) {
  if (recording) {
    recording->works.push_back(std::move(work));
  } else {
    device.submit(Queue::compute, std::move(work));
  }
}

void define_device_class(Environment& self) {
  self.device_class = define_class(
      self.env, "NativeDevice",
      {getter<name>("name"), getter<tiles_4bit>("tiles4bit"), method<empty>("empty"),
       method<from_host>("fromHost"), method<run>("run"), method<takes_experts>("takesExperts"),
       method<read>("read"), method<write>("write"), method<copy_from>("copyFrom"),
       method<synchronize>("synchronize"), method<memory>("memory"), method<reset_peak>("resetPeak"),
       method<begin_capture>("beginCapture"), method<end_capture>("endCapture")});
}

napi_value device_object(Environment& self, Device& device) {
  const auto found = self.devices.find(&device);
  napi_value object;
  if (found != self.devices.end()) {
    check(self.env, napi_get_reference_value(self.env, found->second, &object), "device");
    return object;
  }
  object = make_object(self, self.device_class, std::make_unique<DeviceHandle>(device));
  napi_ref reference;
  check(self.env, napi_create_reference(self.env, object, 1, &reference), "device");
  self.devices.emplace(&device, reference);
  return object;
}

}  // namespace halfbyte
