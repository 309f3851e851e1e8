#include "graph.h"

#include <unordered_map>

#include "device.h"

namespace halfbyte {
namespace {

/// All works of a recording, in order. Its uses only make the order: each work looks after failures by
/// itself.
class Replay final : public Work {
 public:
  Replay(Device& device, std::shared_ptr<const Recording> recording)
      : device_(device), recording_(std::move(recording)) {
    std::unordered_map<Storage*, size_t> index;
    for (const WorkPtr& work : recording_->works) {
      for (const Use& use : work->uses) {
        const auto [at, fresh] = index.emplace(use.storage.get(), uses.size());
        if (fresh) uses.push_back(Use{use.storage, false, false, false});
        uses[at->second].writes |= use.writes;
      }
    }
  }
  ~Replay() override { device_.release(std::move(graph_)); }
  const char* name() const override { return "replay"; }
  bool passes_failures() const override { return false; }
  Status run(Backend& backend, Queue queue) override {
    if (!graph_ && !listed_ && !(backend.has_graphs() && capture(backend, queue))) listed_ = true;
    if (graph_ && !spoilt()) return launch(backend);
    for (const WorkPtr& work : recording_->works) perform(*work, backend, queue);
    return {};
  }

 private:
  /// Turns the works into a graph of the backend's own, on the first replay. Failing that, replays stay a
  /// list.
  bool capture(Backend& backend, Queue queue) {
    for (const WorkPtr& work : recording_->works) {
      if (work->ends_on_host()) return false;
    }
    if (!backend.begin_capture().ok()) return false;
    for (const WorkPtr& work : recording_->works) perform(*work, backend, queue);
    const bool captured = backend.end_capture(&graph_).ok();
    if (!captured || spoilt()) graph_ = nullptr;  // the list finds the failure again, where it belongs
    return graph_ != nullptr;
  }

  bool spoilt() const {
    for (const Use& use : uses) {
      if (use.storage->failure) return true;
    }
    return false;
  }

  Status launch(Backend& backend) {
    const Status status = backend.launch(graph_);
    if (status.ok()) return status;
    const FailurePtr failure = failure_of(name(), status);
    for (const Use& use : uses) {
      if (use.writes) use.storage->failure = failure;
    }
    return status;
  }

  Device& device_;
  std::shared_ptr<const Recording> recording_;
  Graph graph_;
  bool listed_ = false;
};

struct GraphHandle final : Handle {
  static constexpr Kind kKind = Kind::graph;
  GraphHandle(Device& device, WorkPtr replay) : Handle(kKind), device(device), replay(std::move(replay)) {}
  Device& device;
  WorkPtr replay;  // null once disposed
};

napi_value replay(Call& call) {
  auto& graph = to_object<GraphHandle>(call.self, call.receiver);
  if (!graph.replay) fail("ERR_HALFBYTE_DISPOSED", "replay: the graph was disposed");
  graph.device.submit(Queue::compute, graph.replay);
  return nullptr;
}

napi_value dispose(Call& call) {
  to_object<GraphHandle>(call.self, call.receiver).replay.reset();
  call.self.tell_memory();
  return nullptr;
}

}  // namespace

void define_graph_class(Environment& self) {
  self.graph_class =
      define_class(self.env, "NativeGraph", {method<replay>("replay"), method<dispose>("dispose")});
}

napi_value make_graph(Environment& self, Device& device, std::shared_ptr<Recording> recording) {
  auto replay = std::make_shared<Replay>(device, std::move(recording));
  replay->owner = self.link();
  return make_object(self, self.graph_class, std::make_unique<GraphHandle>(device, std::move(replay)));
}

}  // namespace halfbyte
