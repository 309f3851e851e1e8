#include "device.h"

#include <cstdlib>
#include <map>
#include <mutex>

namespace halfbyte {
namespace {

constexpr int kMostCpuDevices = 64;

class ReleaseWork final : public Work {
 public:
  ReleaseWork(void* data, size_t bytes) : data_(data), bytes_(bytes) {}
  const char* name() const override { return "release"; }
  Status run(Backend& backend, Queue queue) override {
    backend.release(queue, data_, bytes_);
    return {};
  }

 private:
  void* data_;
  size_t bytes_;
};

class ReleaseGraphWork final : public Work {
 public:
  explicit ReleaseGraphWork(Graph graph) : graph_(std::move(graph)) {}
  const char* name() const override { return "release"; }
  Status run(Backend&, Queue) override {
    graph_.reset();
    return {};
  }

 private:
  Graph graph_;
};

/// N of "<type>:N", 0 of "<type>", or -1.
int index_of(const std::string& name, const std::string& type) {
  if (name == type) return 0;
  const size_t digits = type.size() + 1;
  if (name.compare(0, digits, type + ":") != 0 || name.size() == digits || name.size() > digits + 3)
    return -1;
  int index = 0;
  for (size_t i = digits; i < name.size(); ++i) {
    if (name[i] < '0' || name[i] > '9') return -1;
    index = index * 10 + (name[i] - '0');
  }
  return index;
}

/// A backend with one issuing thread calls a driver that takes itself down at exit, while that thread still
/// runs. Registered after the driver's own handler, so run before it.
void halt_at_exit(Lane* lane) {
  static auto* lanes = new std::vector<Lane*>;
  if (lanes->empty()) {
    std::atexit([] {
      end_process();
      for (Lane* lane : *lanes) lane->halt();
    });
  }
  lanes->push_back(lane);
}

}  // namespace

Device::Device(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {
  lanes_[0] = new Lane(*this);
  lanes_[1] = backend_->issue_threads() == 2 ? new Lane(*this) : lanes_[0];
  if (lanes_[0] == lanes_[1]) halt_at_exit(lanes_[0]);
}

void Device::append(Queue queue, WorkPtr work, std::vector<Point> after) {
  lane(queue).push(std::move(work), queue, std::move(after), submitted_[static_cast<int>(queue)]);
}

void Device::submit(Queue queue, WorkPtr work) {
  std::vector<Point> after;
  for (const Use& use : work->uses) {
    for (const Mark& mark : use.storage->marks) {
      const uint64_t ticket = use.writes ? mark.touched : mark.written;
      if (ticket == 0 || (mark.device == this && mark.queue == queue)) continue;
      if (mark.device->progress(mark.queue).reached(ticket) && mark.device->backend().issue_threads() == 2)
        continue;
      after.push_back(Point{mark.device, mark.queue, ticket});
    }
  }
  const WorkPtr keep = work;
  const uint64_t ticket =
      lane(queue).push(std::move(work), queue, std::move(after), submitted_[static_cast<int>(queue)]);
  for (const Use& use : keep->uses) {
    Mark& mark = use.storage->mark(this, queue);
    mark.touched = ticket;
    if (use.writes) mark.written = ticket;
  }
}

void Device::order_after(Queue queue, const Point& point) {
  point.device->progress(point.queue).wait(point.ticket);
  Backend& source = point.device->backend();
  if (source.issue_threads() == 2) return;  // its work is done when it has been called
  // Issued is not done. Work of this device goes through this thread, so an event recorded now lies behind
  // the point; another device's work that others wait for ends on the host (Work::ends_on_host).
  if (point.device == this) follow(queue, point.queue);
}

void Device::follow(Queue queue, Queue other) {
  Event event;
  if (backend_->record(other, &event).ok()) backend_->wait(queue, event);
}

void Device::release(Queue queue, void* data, size_t bytes, const std::vector<Mark>& marks) {
  if (backend_->issue_threads() == 2) {
    backend_->release(queue, data, bytes);
    return;
  }
  if (running_device() == this) {
    // The last to let go was work that this thread has just issued, so all that touched the memory is issued:
    // it is free for what comes next on its queue, once that stands behind the device's other queue.
    for (const Mark& mark : marks) {
      if (mark.device == this && mark.queue != queue) follow(queue, mark.queue);
    }
    backend_->release(queue, data, bytes);
    return;
  }
  std::vector<Point> after;
  for (const Mark& mark : marks) {
    if (mark.device != this || mark.queue != queue)
      after.push_back(Point{mark.device, mark.queue, mark.touched});
  }
  append(queue, std::make_shared<ReleaseWork>(data, bytes), std::move(after));
}

void Device::release(Graph graph) {
  if (!graph || running_device() == this) return;
  append(Queue::compute, std::make_shared<ReleaseGraphWork>(std::move(graph)), {});
}

std::vector<std::string> device_names() {
  std::vector<std::string> names{"cpu"};
  const CudaInfo info = cuda_info();
  for (int i = 0; i < info.devices; ++i) names.push_back("cuda:" + std::to_string(i));
  return names;
}

Device& find_device(const std::string& name) {
  static std::mutex* mutex = new std::mutex;
  static auto* devices = new std::map<std::pair<bool, int>, Device*>;
  const int cpu = index_of(name, "cpu"), cuda = index_of(name, "cuda");
  if (cuda < 0 && (cpu < 0 || cpu >= kMostCpuDevices)) {
    fail("ERR_HALFBYTE_DEVICE", "There is no device " + name + "; the names are cpu, cpu:1 to cpu:" +
                                    std::to_string(kMostCpuDevices - 1) + " and cuda:N");
  }
  std::lock_guard<std::mutex> lock(*mutex);
  Device*& device = (*devices)[{cuda >= 0, cuda >= 0 ? cuda : cpu}];
  if (device) return *device;
  std::unique_ptr<Backend> backend;
  if (cuda < 0) {
    backend = make_cpu_backend(cpu);
  } else if (Status status = make_cuda_backend(cuda, &backend); !status.ok()) {
    fail(status.code == Code::driver ? "ERR_HALFBYTE_DRIVER" : "ERR_HALFBYTE_DEVICE",
         "There is no device " + name + ": " + status.message +
             ". Use 'cpu', or see what `halfbyte doctor` says");
  }
  device = new Device(std::move(backend));
  return *device;
}

}  // namespace halfbyte
