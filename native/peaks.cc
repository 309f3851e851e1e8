#include "peaks.h"

#include <memory>

#include "cpu/probe.h"

namespace halfbyte {
namespace {

constexpr int64_t kReadBytes = int64_t{256} << 20;
constexpr int kRepeats = 5;

struct Measurement {
  napi_async_work work = nullptr;
  napi_deferred promise = nullptr;
  double read = 0.0, fma = 0.0;
};

void measure(napi_env, void* data) {
  auto& m = *static_cast<Measurement*>(data);
  m.read = cpu::probe_read_bandwidth(kReadBytes, kRepeats);
  m.fma = cpu::probe_fma_peak(kRepeats);
}

void resolve(napi_env env, napi_status, void* data) {
  const std::unique_ptr<Measurement> m(static_cast<Measurement*>(data));
  napi_delete_async_work(env, m->work);
  napi_value pair, read, fma;
  if (napi_create_array_with_length(env, 2, &pair) != napi_ok ||
      napi_create_double(env, m->read, &read) != napi_ok || napi_create_double(env, m->fma, &fma) != napi_ok)
    return;  // the environment is closing
  napi_set_element(env, pair, 0, read);
  napi_set_element(env, pair, 1, fma);
  napi_resolve_deferred(env, m->promise, pair);
}

}  // namespace

napi_value cpu_peaks(Call& call) {
  const napi_env env = call.env;
  auto m = std::make_unique<Measurement>();
  napi_value promise;
  check(env, napi_create_promise(env, &m->promise, &promise), "promise");
  check(env,
        napi_create_async_work(env, nullptr, make_string(env, "halfbyte.cpuPeaks"), measure, resolve, m.get(),
                               &m->work),
        "work");
  check(env, napi_queue_async_work(env, m->work), "work");
  m.release();
  return promise;
}

}  // namespace halfbyte
