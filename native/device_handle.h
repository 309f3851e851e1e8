// The NativeDevice class: a device as one environment sees it, with the capture that is going on there.
#pragma once

#include "convert.h"
#include "device.h"
#include "graph.h"

namespace halfbyte {

struct DeviceHandle final : Handle {
  static constexpr Kind kKind = Kind::device;
  explicit DeviceHandle(Device& device) : Handle(kKind), device(device) {}

  /// Queues compute work, or records it.
  void compute(WorkPtr work);

  Device& device;
  std::shared_ptr<Recording> recording;  // null outside of a capture
};

void define_device_class(Environment& self);

/// The one object of this environment for the device.
napi_value device_object(Environment& self, Device& device);

}  // namespace halfbyte
