// What the addon exports; lib/native.ts has the same list as types.
#include <cstring>

#include "convert.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "device_handle.h"
#include "formats.h"
#include "graph.h"
#include "file.h"
#include "ops.h"
#include "peaks.h"
#include "tensor_handle.h"

namespace halfbyte {
namespace {

template <typename Name>
napi_value string_array(napi_env env, size_t count, const Name& name) {
  napi_value array;
  check(env, napi_create_array_with_length(env, count, &array), "array");
  for (size_t i = 0; i < count; ++i)
    napi_set_element(env, array, static_cast<uint32_t>(i), make_string(env, name(i)));
  return array;
}

napi_value devices(Call& call) {
  const auto names = device_names();
  return string_array(call.env, names.size(), [&](size_t i) { return names[i]; });
}

napi_value device(Call& call) {
  return device_object(call.self, find_device(to_string(call.env, call.arguments[0], "name")));
}

napi_value codebook(Call& call) {
  const std::string name = to_string(call.env, call.arguments[0], "name");
  const void* table;
  size_t entries = 16;
  if (name == "nf4") {
    table = kNf4;
  } else if (name == "fp4") {
    table = kFp4;
  } else if (name == "dynamic" || name == "dynamic_unsigned") {
    table = name == "dynamic" ? kDynamicSignedBits : kDynamicUnsignedBits;
    entries = 256;
  } else {
    fail("ERR_HALFBYTE_VALUE", "codebook: " + name + " is not one of nf4, fp4, dynamic, dynamic_unsigned");
  }
  void* data;
  napi_value buffer, array;
  check(call.env, napi_create_arraybuffer(call.env, entries * sizeof(float), &data, &buffer), "codebook");
  std::memcpy(data, table, entries * sizeof(float));
  check(call.env, napi_create_typedarray(call.env, napi_float32_array, entries, buffer, 0, &array),
        "codebook");
  return array;
}

struct Field {
  const char* name;
  napi_value value;
};

template <size_t N>
napi_value object_of(napi_env env, const Field (&fields)[N]) {
  napi_value object;
  check(env, napi_create_object(env, &object), "object");
  for (const Field& field : fields) napi_set_named_property(env, object, field.name, field.value);
  return object;
}

napi_value cpu_info(Call& call) {
  const napi_env env = call.env;
  return object_of(env, {{"isa", make_string(env, cpu::isa_name())},
                         {"vnni", make_bool(env, cpu::has_vnni())},
                         {"threads", make_number(env, cpu::pool_threads())},
                         {"isaComplaint", make_string(env, cpu::isa_complaint())},
                         {"threadsComplaint", make_string(env, cpu::pool_complaint())}});
}

napi_value cuda_info(Call& call) {
  const napi_env env = call.env;
  const CudaInfo info = halfbyte::cuda_info();
  return object_of(env, {{"compiled", make_bool(env, info.compiled)},
                         {"archs", make_string(env, info.archs)},
                         {"driver", make_number(env, info.driver)},
                         {"runtime", make_number(env, info.runtime)},
                         {"devices", make_number(env, info.devices)},
                         {"failure", make_string(env, info.failure)}});
}

napi_value dense_library(Call& call) {
  const DenseLibrary library = cuda_dense_library();
  return object_of(call.env, {{"found", make_bool(call.env, library.found)},
                              {"where", make_string(call.env, library.where)}});
}

napi_value open_file(Call& call) {
  return make_file(call.self, to_string(call.env, call.arguments[0], "path"));
}

napi_value define(Call& call) {
  const napi_env env = call.env;
  define_tensor_class(call.self);
  define_device_class(call.self);
  define_graph_class(call.self);
  define_file_class(call.self);
  const napi_value exports = call.receiver;
  const napi_property_descriptor functions[] = {
      method<devices>("devices"),    method<device>("device"),
      method<codebook>("codebook"),  method<cpu_info>("cpuInfo"),
      method<cuda_info>("cudaInfo"), method<open_file>("openFile"),
      method<cpu_peaks>("cpuPeaks"), method<dense_library>("denseLibrary"),
  };
  check(env, napi_define_properties(env, exports, sizeof(functions) / sizeof(functions[0]), functions),
        "exports");
  napi_set_named_property(env, exports, "version", make_string(env, HALFBYTE_VERSION));
  napi_set_named_property(env, exports, "ops", string_array(env, static_cast<size_t>(kOpCount), [](size_t i) {
                            return kOps[i].name;
                          }));
  return exports;
}

}  // namespace
}  // namespace halfbyte

NAPI_MODULE_INIT() {
  using namespace halfbyte;
  Environment* self = Environment::create(env);
  if (!self) return nullptr;
  try {
    Call call{env, *self, exports, {}};
    return define(call);
  } catch (const Failure& failure) {
    napi_throw(env, make_error(env, failure));
  } catch (const PendingException&) {
  }
  return nullptr;
}
