#include "convert.h"

namespace halfbyte {
namespace {

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::tensor:
      return "tensor";
    case Kind::device:
      return "device";
    case Kind::graph:
      return "graph";
    default:
      return "file";
  }
}

void finalize(napi_env, void* data, void* hint) {
  auto* handle = static_cast<Handle*>(data);
  static_cast<Environment*>(hint)->handles.erase(handle);
  delete handle;
}

napi_value construct(Call& call) {
  Handle* handle = call.self.under_construction;
  call.self.under_construction = nullptr;
  if (!handle) fail("ERR_HALFBYTE_USAGE", "This class has no constructor; its objects come from the binding");
  check(call.env, napi_wrap(call.env, call.receiver, handle, finalize, &call.self, nullptr), "object");
  call.self.handles.insert(handle);
  return call.receiver;
}

}  // namespace

HostView to_host_view(napi_env env, napi_value value) {
  HostView view{};
  bool is_typed = false, is_data = false, is_plain = false;
  napi_is_typedarray(env, value, &is_typed);
  if (!is_typed) napi_is_dataview(env, value, &is_data);
  if (is_typed) {
    napi_typedarray_type type;
    size_t length = 0, offset = 0;
    check(env, napi_get_typedarray_info(env, value, &type, &length, &view.data, &view.array_buffer, &offset),
          "data");
    size_t element = 1;
    switch (type) {
      case napi_int16_array:
      case napi_uint16_array:
        element = 2;
        break;
      case napi_int32_array:
      case napi_uint32_array:
      case napi_float32_array:
        element = 4;
        break;
      case napi_float64_array:
      case napi_bigint64_array:
      case napi_biguint64_array:
        element = 8;
        break;
      default:
        break;
    }
    view.size = length * element;
  } else if (is_data) {
    size_t offset = 0;
    check(env, napi_get_dataview_info(env, value, &view.size, &view.data, &view.array_buffer, &offset),
          "data");
  } else {
    fail("ERR_HALFBYTE_VALUE", "data is not a typed array, DataView or Buffer");
  }
  check(env, napi_is_arraybuffer(env, view.array_buffer, &is_plain), "data");
  if (!is_plain)
    fail("ERR_HALFBYTE_VALUE", "data lies in a SharedArrayBuffer; copy it into an ordinary one first");
  bool detached = false;
  check(env, napi_is_detached_arraybuffer(env, view.array_buffer, &detached), "data");
  if (detached) fail("ERR_HALFBYTE_VALUE", "data lies in an ArrayBuffer that was transferred away");
  napi_value resizable;
  check(env, napi_get_named_property(env, view.array_buffer, "resizable", &resizable), "data");
  bool is_resizable = false;
  if (napi_get_value_bool(env, resizable, &is_resizable) == napi_ok && is_resizable) {
    fail("ERR_HALFBYTE_VALUE", "data lies in a resizable ArrayBuffer; copy it into an ordinary one first");
  }
  return view;
}

napi_ref define_class(napi_env env, const char* name,
                      const std::vector<napi_property_descriptor>& properties) {
  napi_value type;
  napi_ref reference;
  check(env,
        napi_define_class(env, name, NAPI_AUTO_LENGTH, guarded<construct>, nullptr, properties.size(),
                          properties.data(), &type),
        name);
  check(env, napi_create_reference(env, type, 1, &reference), name);
  return reference;
}

napi_value make_object(Environment& self, napi_ref type, std::unique_ptr<Handle> handle) {
  napi_value constructor, object;
  check(self.env, napi_get_reference_value(self.env, type, &constructor), "class");
  self.under_construction = handle.get();
  const napi_status status = napi_new_instance(self.env, constructor, 0, nullptr, &object);
  self.under_construction = nullptr;
  if (self.handles.count(handle.get())) handle.release();
  check(self.env, status, "object");
  return object;
}

Handle& to_handle(Environment& self, napi_value value, Kind kind) {
  void* wrapped = nullptr;
  if (napi_unwrap(self.env, value, &wrapped) == napi_ok &&
      self.handles.count(static_cast<Handle*>(wrapped))) {
    auto* handle = static_cast<Handle*>(wrapped);
    if (handle->kind == kind) return *handle;
  }
  fail("ERR_HALFBYTE_VALUE", std::string("Not a ") + name_of(kind) + " of this binding, or a disposed one");
}

}  // namespace halfbyte
