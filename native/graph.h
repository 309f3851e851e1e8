// Captured work: a list that is queued as one. The works hold the storages that they touch, so what was
// allocated inside of a capture lives as long as its graph.
#pragma once

#include <memory>
#include <vector>

#include "convert.h"
#include "work.h"

namespace halfbyte {

struct Recording {
  std::vector<WorkPtr> works;
};

struct DeviceHandle;

void define_graph_class(Environment& self);
napi_value make_graph(Environment& self, Device& device, std::shared_ptr<Recording> recording);

}  // namespace halfbyte
