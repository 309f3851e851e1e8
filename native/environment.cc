#include "environment.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace halfbyte {
namespace {

// Below this an ArrayBuffer of V8's own is cheaper than one around our memory.
constexpr size_t kSmallResult = 16 << 10;
// Node 20 makes none above 4 GiB, and frees the memory when it refuses, so that its owner here would free it
// again; one of V8's own ends the process where there is no memory for it. Larger reads come in pieces.
constexpr size_t kLargestResult = size_t{1} << 31;
// V8 is told of memory in lumps: the call may start a garbage collection.
constexpr int64_t kLump = 1 << 20;

napi_value array_buffer_of(napi_env env, std::unique_ptr<HostBytes> bytes) {
  napi_value result = nullptr;
  if (bytes->size > kLargestResult) return nullptr;
  if (bytes->size > kSmallResult) {
    HostBytes* raw = bytes.get();
    const auto finalize = [](napi_env, void*, void* hint) { delete static_cast<HostBytes*>(hint); };
    const napi_status status =
        napi_create_external_arraybuffer(env, raw->data, raw->size, finalize, raw, &result);
    if (status == napi_ok) {
      bytes.release();
      return result;
    }
    if (status != napi_no_external_buffers_allowed) return nullptr;
  }
  void* data = nullptr;
  if (napi_create_arraybuffer(env, bytes->size, &data, &result) != napi_ok) return nullptr;
  if (bytes->size) std::memcpy(data, bytes->data, bytes->size);
  return result;
}

}  // namespace

HostBytes::HostBytes(size_t size) : data(std::malloc(size ? size : 1)), size(size) {
  if (!data) throw std::bad_alloc();
}
HostBytes::~HostBytes() { std::free(data); }

napi_value make_error(napi_env env, const Failure& failure) {
  napi_value code = nullptr, message = nullptr, error = nullptr;
  napi_create_string_utf8(env, failure.code, NAPI_AUTO_LENGTH, &code);
  napi_create_string_utf8(env, failure.message.data(), failure.message.size(), &message);
  napi_create_error(env, code, message, &error);
  return error;
}

// ---- the side of native threads

void EnvironmentLink::wake() {
  if (awake_) return;
  awake_ = napi_call_threadsafe_function(function_, nullptr, napi_tsfn_nonblocking) == napi_ok;
}

void EnvironmentLink::settle(Settlement settlement) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  settled_.push_back(std::move(settlement));
  wake();
}

void EnvironmentLink::unborrow(void* reference) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  unborrowed_.push_back(static_cast<napi_ref>(reference));
  wake();
}

// ---- the side of JavaScript

Environment::Environment(napi_env env) : env(env), link_(std::make_shared<EnvironmentLink>()) {}

Environment* Environment::of(napi_env env) {
  void* self = nullptr;
  napi_get_instance_data(env, &self);
  return static_cast<Environment*>(self);
}

Environment* Environment::create(napi_env env) {
  auto* self = new Environment(env);
  napi_value name;
  napi_create_string_utf8(env, "halfbyte", NAPI_AUTO_LENGTH, &name);
  if (napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, self, on_settled,
                                      &self->link_->function_) != napi_ok) {
    delete self;
    return nullptr;
  }
  napi_unref_threadsafe_function(env, self->link_->function_);
  // Hooks run last in, first out: ours, added after the function's own, finds the function still there.
  napi_add_env_cleanup_hook(env, on_teardown, self);
  napi_set_instance_data(
      env, self, [](napi_env, void* data, void*) { delete static_cast<Environment*>(data); }, nullptr);
  return self;
}

void Environment::on_teardown(void* data) {
  auto* self = static_cast<Environment*>(data);
  EnvironmentLink& link = *self->link_;
  std::vector<Settlement> settled;
  {
    std::lock_guard<std::mutex> lock(link.mutex_);
    link.closed_ = true;
    napi_release_threadsafe_function(link.function_, napi_tsfn_abort);
    settled.swap(link.settled_);
  }
  // V8 frees the ArrayBuffers soon after this returns.
  for (const auto& [reference, weak] : self->borrows_) {
    if (const std::shared_ptr<Borrow> borrow = weak.lock()) borrow->revoke();
  }
}

void Environment::on_settled(napi_env env, napi_value, void* context, void*) {
  if (!env) return;  // torn down
  static_cast<Environment*>(context)->drain();
}

void Environment::drain() {
  std::vector<Settlement> settled;
  std::vector<napi_ref> unborrowed;
  {
    std::lock_guard<std::mutex> lock(link_->mutex_);
    link_->awake_ = false;
    settled.swap(link_->settled_);
    unborrowed.swap(link_->unborrowed_);
  }
  for (napi_ref reference : unborrowed) {
    napi_delete_reference(env, reference);
    for (size_t i = 0; i < borrows_.size(); ++i) {
      if (borrows_[i].first != reference) continue;
      borrows_[i] = std::move(borrows_.back());
      borrows_.pop_back();
      break;
    }
  }
  // A worker that is being terminated refuses every one of these calls; then there is nobody to tell.
  for (Settlement& s : settled) {
    napi_handle_scope scope;
    if (napi_open_handle_scope(env, &scope) != napi_ok) return;
    napi_value value = nullptr;
    if (!s.failure && s.bytes) {
      value = array_buffer_of(env, std::move(s.bytes));
      if (!value) {
        s.failure = std::make_shared<const Failure>(
            Failure{"ERR_HALFBYTE_OUT_OF_MEMORY", "read: no ArrayBuffer could be made for the result"});
        bool pending = false;
        napi_value ignored;
        if (napi_is_exception_pending(env, &pending) == napi_ok && pending)
          napi_get_and_clear_last_exception(env, &ignored);
      }
    }
    if (s.failure) {
      napi_reject_deferred(env, s.promise, make_error(env, *s.failure));
    } else {
      if (!value) napi_get_undefined(env, &value);
      napi_resolve_deferred(env, s.promise, value);
    }
    napi_close_handle_scope(env, scope);
    if (--open_promises_ == 0) napi_unref_threadsafe_function(env, link_->function_);
  }
  tell_memory();
}

napi_value Environment::promise(napi_deferred* deferred) {
  napi_value promise = nullptr;
  if (napi_create_promise(env, deferred, &promise) != napi_ok) return nullptr;
  if (open_promises_++ == 0) napi_ref_threadsafe_function(env, link_->function_);
  return promise;
}

napi_value Environment::rejected(const Failure& failure) {
  napi_deferred deferred;
  napi_value promise = nullptr;
  if (napi_create_promise(env, &deferred, &promise) != napi_ok) return nullptr;
  napi_reject_deferred(env, deferred, make_error(env, failure));
  return promise;
}

std::shared_ptr<Borrow> Environment::borrow(napi_value array_buffer, void** token) {
  napi_ref reference = nullptr;
  if (napi_create_reference(env, array_buffer, 1, &reference) != napi_ok) return nullptr;
  auto borrow = std::make_shared<Borrow>();
  borrows_.emplace_back(reference, borrow);
  *token = reference;
  return borrow;
}

void Environment::tell_memory() {
  const int64_t untold = link_->untold_.load(std::memory_order_relaxed);
  if (untold < kLump && untold > -kLump) return;
  link_->untold_.fetch_sub(untold, std::memory_order_relaxed);
  int64_t total;
  napi_adjust_external_memory(env, untold, &total);
}

}  // namespace halfbyte
