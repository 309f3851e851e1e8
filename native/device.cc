#include "device.h"

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

/// N of "cpu:N", or -1.
int cpu_index(const std::string& name) {
  if (name == "cpu") return 0;
  if (name.compare(0, 4, "cpu:") != 0 || name.size() < 5 || name.size() > 7) return -1;
  int index = 0;
  for (size_t i = 4; i < name.size(); ++i) {
    if (name[i] < '0' || name[i] > '9') return -1;
    index = index * 10 + (name[i] - '0');
  }
  return index;
}

}  // namespace

Device::Device(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {
  lanes_[0] = new Lane(*this);
  lanes_[1] = backend_->issue_threads() == 2 ? new Lane(*this) : lanes_[0];
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
  if (point.device != this) return;
  Event event;
  if (source.record(point.queue, &event).ok()) source.wait(queue, event);
}

void Device::release(Queue queue, void* data, size_t bytes, const std::vector<Mark>& marks) {
  if (backend_->issue_threads() == 2) {
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

std::vector<std::string> device_names() { return {"cpu"}; }

Device& find_device(const std::string& name) {
  static std::mutex* mutex = new std::mutex;
  static auto* devices = new std::map<int, Device*>;
  const int index = cpu_index(name);
  if (index < 0 || index >= kMostCpuDevices) {
    if (name.compare(0, 4, "cuda") == 0) {
      fail("ERR_HALFBYTE_DEVICE",
           "There is no device " + name +
               ": this build of the addon has no CUDA backend. Use 'cpu', or build on a "
               "machine with the CUDA toolkit (nvcc)");
    }
    fail("ERR_HALFBYTE_DEVICE", "There is no device " + name + "; the names are cpu, cpu:1 to cpu:" +
                                    std::to_string(kMostCpuDevices - 1) + " and cuda:N");
  }
  std::lock_guard<std::mutex> lock(*mutex);
  Device*& device = (*devices)[index];
  if (!device) device = new Device(make_cpu_backend(index));
  return *device;
}

}  // namespace halfbyte
