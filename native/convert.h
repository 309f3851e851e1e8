// JavaScript values to C++ values, every type checked. What does not fit is thrown as a Failure; an exception
// that JavaScript itself has pending is thrown as PendingException. guarded() turns both back at the end of a
// call.
#pragma once

#include <node_api.h>

#include <new>
#include <string>
#include <memory>
#include <system_error>
#include <vector>

#include "environment.h"
#include "errors.h"

namespace halfbyte {

struct PendingException {};

/// Throws when Node did not do what was asked.
inline void check(napi_env env, napi_status status, const char* what) {
  if (status == napi_ok) return;
  bool pending = false;
  napi_is_exception_pending(env, &pending);
  if (pending) throw PendingException{};
  fail("ERR_HALFBYTE_VALUE", std::string(what) + " has the wrong type");
}

inline double to_double(napi_env env, napi_value value, const char* what) {
  double number;
  check(env, napi_get_value_double(env, value, &number), what);
  return number;
}

/// A whole number of 0 .. 2^53 - 1.
inline int64_t to_size(napi_env env, napi_value value, const char* what) {
  const double number = to_double(env, value, what);
  if (!(number >= 0 && number <= 9007199254740991.0) ||
      number != static_cast<double>(static_cast<int64_t>(number)))
    fail("ERR_HALFBYTE_VALUE", std::string(what) + " is not a whole number of 0 or more");
  return static_cast<int64_t>(number);
}

inline bool to_bool(napi_env env, napi_value value, const char* what) {
  bool boolean;
  check(env, napi_get_value_bool(env, value, &boolean), what);
  return boolean;
}

inline std::string to_string(napi_env env, napi_value value, const char* what) {
  size_t length = 0;
  check(env, napi_get_value_string_utf8(env, value, nullptr, 0, &length), what);
  std::string text(length, '\0');
  check(env, napi_get_value_string_utf8(env, value, &text[0], length + 1, &length), what);
  return text;
}

inline DType to_dtype(napi_env env, napi_value value) {
  const int64_t id = to_size(env, value, "dtype");
  if (id > static_cast<int64_t>(DType::i64))
    fail("ERR_HALFBYTE_DTYPE", "dtype " + std::to_string(id) + " is not one");
  return static_cast<DType>(id);
}

/// Array elements by index, the length checked against `most`.
template <typename Each>
int each_of(napi_env env, napi_value array, int most, const char* what, const Each& each) {
  uint32_t length = 0;
  check(env, napi_get_array_length(env, array, &length), what);
  if (length > static_cast<uint32_t>(most)) {
    fail("ERR_HALFBYTE_SHAPE", std::string(what) + " has " + std::to_string(length) + " entries, at most " +
                                   std::to_string(most) + " are possible");
  }
  for (uint32_t i = 0; i < length; ++i) {
    napi_value element;
    check(env, napi_get_element(env, array, i, &element), what);
    each(static_cast<int>(i), element);
  }
  return static_cast<int>(length);
}

/// The bytes of a typed array, DataView or Buffer on an ordinary ArrayBuffer. Shared, resizable and detached
/// memory can change or vanish under work that is queued, so it is refused.
struct HostView {
  void* data;
  size_t size;
  napi_value array_buffer;
};
HostView to_host_view(napi_env env, napi_value value);

inline napi_value make_number(napi_env env, double number) {
  napi_value value = nullptr;
  napi_create_double(env, number, &value);
  return value;
}
inline napi_value make_string(napi_env env, const std::string& text) {
  napi_value value = nullptr;
  napi_create_string_utf8(env, text.data(), text.size(), &value);
  return value;
}
inline napi_value make_bool(napi_env env, bool boolean) {
  napi_value value = nullptr;
  napi_get_boolean(env, boolean, &value);
  return value;
}

// ---- calls

constexpr size_t kMaxArguments = 5;

struct Call {
  napi_env env;
  Environment& self;
  napi_value receiver;
  napi_value arguments[kMaxArguments];
};

/// Body is napi_value (*)(Call&); a null result is undefined.
template <napi_value (*Body)(Call&)>
napi_value guarded(napi_env env, napi_callback_info info) {
  try {
    Environment* self = Environment::of(env);
    if (!self) return nullptr;
    Call call{env, *self, nullptr, {}};
    size_t count = kMaxArguments;
    if (napi_get_cb_info(env, info, &count, call.arguments, &call.receiver, nullptr) != napi_ok)
      return nullptr;
    return Body(call);
  } catch (const Failure& failure) {
    napi_throw(env, make_error(env, failure));
  } catch (const PendingException&) {
  } catch (const std::bad_alloc&) {
    napi_throw(env, make_error(env, {"ERR_HALFBYTE_OUT_OF_MEMORY", "The process is out of memory"}));
  } catch (const std::system_error& error) {
    napi_throw(env,
               make_error(env, {"ERR_HALFBYTE_DEVICE", std::string("No native thread: ") + error.what()}));
  }
  return nullptr;
}

template <napi_value (*Body)(Call&)>
napi_property_descriptor method(const char* name) {
  return {name, nullptr, guarded<Body>, nullptr, nullptr, nullptr, napi_default_method, nullptr};
}
template <napi_value (*Body)(Call&)>
napi_property_descriptor getter(const char* name) {
  return {name, nullptr, nullptr, guarded<Body>, nullptr, nullptr, napi_default_jsproperty, nullptr};
}

// ---- objects of ours

enum class Kind : uint8_t { tensor, device, graph, file };

/// What a JavaScript object of ours wraps, and owns.
struct Handle {
  explicit Handle(Kind kind) : kind(kind) {}
  virtual ~Handle() = default;
  const Kind kind;
};

/// Defines a class whose objects only make_object() can make.
napi_ref define_class(napi_env env, const char* name,
                      const std::vector<napi_property_descriptor>& properties);

napi_value make_object(Environment& self, napi_ref type, std::unique_ptr<Handle> handle);

/// The handle inside of an object of ours. Throws for any other value.
Handle& to_handle(Environment& self, napi_value value, Kind kind);

template <typename T>
T& to_object(Environment& self, napi_value value) {
  return static_cast<T&>(to_handle(self, value, T::kKind));
}

}  // namespace halfbyte
