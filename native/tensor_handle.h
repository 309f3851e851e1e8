// The NativeTensor class: a view on a storage. Views are checked against their storage when they are made, so
// no op can leave it.
#pragma once

#include "convert.h"
#include "storage.h"

namespace halfbyte {

struct TensorHandle final : Handle {
  static constexpr Kind kKind = Kind::tensor;
  TensorHandle() : Handle(kKind) {}

  StoragePtr storage;
  View view;          // data is not filled in: the memory may not be there yet
  size_t offset = 0;  // bytes from the storage's start

  bool covers_storage() const {
    return view.is_contiguous() && static_cast<size_t>(view.size() * size_of(view.dtype)) == storage->bytes;
  }
};

void define_tensor_class(Environment& self);

/// A contiguous view's shape from JavaScript. `bytes` is its size; throws where that does not fit 53 bits.
View to_contiguous_view(napi_env env, napi_value dtype, napi_value shape, size_t* bytes);

napi_value make_tensor(Environment& self, StoragePtr storage, const View& view);

/// Throws for what is not a tensor, or not any more.
TensorHandle& to_tensor(Environment& self, napi_value value);

}  // namespace halfbyte
