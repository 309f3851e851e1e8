// What went wrong, in the two forms that native/ deals in: a Failure, which travels with the data that it
// spoilt until somebody reads it, and a thrown Failure, which becomes a JavaScript exception at the end of
// the call.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "backend.h"

namespace halfbyte {

/// `code` is one of the ERR_HALFBYTE_ names of lib/errors.ts; always a literal.
struct Failure {
  const char* code;
  std::string message;
};
using FailurePtr = std::shared_ptr<const Failure>;

inline const char* name_of(Code code) {
  switch (code) {
    case Code::shape:
      return "ERR_HALFBYTE_SHAPE";
    case Code::dtype:
      return "ERR_HALFBYTE_DTYPE";
    case Code::value:
      return "ERR_HALFBYTE_VALUE";
    case Code::out_of_memory:
      return "ERR_HALFBYTE_OUT_OF_MEMORY";
    case Code::unsupported:
      return "ERR_HALFBYTE_UNSUPPORTED";
    case Code::cuda:
      return "ERR_HALFBYTE_CUDA";
    case Code::driver:
      return "ERR_HALFBYTE_DRIVER";
    case Code::device_lost:
      return "ERR_HALFBYTE_DEVICE_LOST";
    case Code::ok:
    case Code::internal:
      break;
  }
  return "ERR_HALFBYTE_INTERNAL";
}

/// The failure of work called `name`, whose message begins with that name.
inline FailurePtr failure_of(const char* name, const Status& status) {
  const std::string prefix = std::string(name) + ":";
  const bool named = status.message.compare(0, prefix.size(), prefix) == 0;
  return std::make_shared<const Failure>(
      Failure{name_of(status.code), named ? status.message : prefix + " " + status.message});
}

[[noreturn]] inline void fail(const char* code, std::string message) {
  throw Failure{code, std::move(message)};
}

}  // namespace halfbyte
