#include "tensor_handle.h"

namespace halfbyte {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 53;

std::string show(const View& view) {
  std::string text = std::string(name_of(view.dtype)) + " [";
  for (int i = 0; i < view.ndim; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + "]";
}

/// Elements from the start of the view to the end of its last element. Throws past 2^53.
int64_t extent(const View& view) {
  int64_t last = 0;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) return 0;
    int64_t step;
    if (__builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &step) ||
        __builtin_add_overflow(last, step, &last) || last >= kMostBytes) {
      fail("ERR_HALFBYTE_SHAPE", "view: " + show(view) + " is too large");
    }
  }
  return last + 1;
}

napi_value view(Call& call) {
  const napi_env env = call.env;
  const TensorHandle& base = to_tensor(call.self, call.receiver);
  auto handle = std::make_unique<TensorHandle>();
  handle->storage = base.storage;
  View& view = handle->view;
  view.dtype = to_dtype(env, call.arguments[0]);
  view.ndim = each_of(env, call.arguments[1], kMaxDims, "shape",
                      [&](int i, napi_value n) { view.shape[i] = to_size(env, n, "shape"); });
  const int strides = each_of(env, call.arguments[2], kMaxDims, "strides",
                              [&](int i, napi_value n) { view.strides[i] = to_size(env, n, "strides"); });
  if (strides != view.ndim) fail("ERR_HALFBYTE_SHAPE", "view: shape and strides differ in length");
  const int64_t offset = to_size(env, call.arguments[3], "offset");
  const int64_t item = size_of(view.dtype);
  const int64_t available = static_cast<int64_t>(handle->storage->bytes) / item;
  const int64_t length = extent(view);
  if (offset > available || length > available - offset) {
    fail("ERR_HALFBYTE_SHAPE", "view: " + show(view) + " at element " + std::to_string(offset) +
                                   " reaches beyond the " + std::to_string(handle->storage->bytes) +
                                   " bytes of its storage");
  }
  // The product of the lengths may exceed the storage (strides of 0); ops count elements in 64 bits.
  int64_t elements = 1;
  for (int i = 0; i < view.ndim && length > 0; ++i) {
    if (__builtin_mul_overflow(elements, view.shape[i], &elements) || elements > kMostBytes)
      fail("ERR_HALFBYTE_SHAPE", "view: " + show(view) + " has too many elements");
  }
  handle->offset = static_cast<size_t>(offset * item);
  return make_object(call.self, call.self.tensor_class, std::move(handle));
}

napi_value dispose(Call& call) {
  void* wrapped = nullptr;
  if (napi_unwrap(call.env, call.receiver, &wrapped) != napi_ok) return nullptr;  // disposed before
  // Checked before it goes: the object need not be ours. What is unwrapped spares the garbage collector a
  // finalizer.
  auto& handle = to_object<TensorHandle>(call.self, call.receiver);
  napi_remove_wrap(call.env, call.receiver, &wrapped);
  call.self.handles.erase(&handle);
  delete &handle;
  call.self.tell_memory();
  return nullptr;
}

napi_value storage_bytes(Call& call) {
  return make_number(call.env, static_cast<double>(to_tensor(call.self, call.receiver).storage->bytes));
}

napi_value storage_id(Call& call) {
  return make_number(call.env, static_cast<double>(to_tensor(call.self, call.receiver).storage->id));
}

}  // namespace

void define_tensor_class(Environment& self) {
  self.tensor_class = define_class(self.env, "NativeTensor",
                                   {method<view>("view"), method<dispose>("dispose"),
                                    getter<storage_bytes>("storageBytes"), getter<storage_id>("storageId")});
}

View to_contiguous_view(napi_env env, napi_value dtype, napi_value shape, size_t* bytes) {
  View view;
  view.dtype = to_dtype(env, dtype);
  view.ndim = each_of(env, shape, kMaxDims, "shape",
                      [&](int i, napi_value n) { view.shape[i] = to_size(env, n, "shape"); });
  int64_t size = size_of(view.dtype);
  bool empty = false;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(size, view.shape[i], &size) || size > kMostBytes) {
      fail("ERR_HALFBYTE_SHAPE", show(view) + " is too large");
    }
  }
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  *bytes = empty ? 0 : static_cast<size_t>(size);
  return view;
}

napi_value make_tensor(Environment& self, StoragePtr storage, const View& view) {
  auto handle = std::make_unique<TensorHandle>();
  handle->storage = std::move(storage);
  handle->view = view;
  return make_object(self, self.tensor_class, std::move(handle));
}

TensorHandle& to_tensor(Environment& self, napi_value value) {
  auto& handle = to_object<TensorHandle>(self, value);
  if (void* token = handle.storage->token()) {
    // The buffer is marked untransferable, but Node 22's ArrayBuffer.prototype.transfer() takes it away all
    // the same.
    napi_value buffer = nullptr;
    bool detached = false;
    napi_get_reference_value(self.env, static_cast<napi_ref>(token), &buffer);
    if (buffer) napi_is_detached_arraybuffer(self.env, buffer, &detached);
    if (detached) fail("ERR_HALFBYTE_VALUE", "The ArrayBuffer that the tensor uses was transferred away");
  }
  return handle;
}

}  // namespace halfbyte
