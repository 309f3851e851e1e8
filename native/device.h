// The devices of the process. All environments (the main thread and worker_threads) share them, and they are
// never destroyed: their threads may still be at work when the process exits.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "executor.h"

namespace halfbyte {

class Device {
 public:
  explicit Device(std::unique_ptr<Backend> backend);

  Backend& backend() const { return *backend_; }
  Progress& progress(Queue queue) { return progress_[static_cast<int>(queue)]; }

  /// Appends work to a queue, after everything that touched its storages elsewhere. From any JavaScript
  /// thread.
  void submit(Queue queue, WorkPtr work);

  /// Makes what comes next on `queue` run after `point`. On the executor's thread.
  void order_after(Queue queue, const Point& point);

  /// Gives back memory that nobody refers to any more. From any thread.
  void release(Queue queue, void* data, size_t bytes, const std::vector<Mark>& marks);
  /// Drops a graph of the backend on the executor's thread: never while that captures another. From any
  /// thread.
  void release(Graph graph);

 private:
  /// Work of `queue` from here on runs after all that was issued on the other one.
  void follow(Queue queue, Queue other);
  Lane& lane(Queue queue) { return *lanes_[static_cast<int>(queue)]; }
  void append(Queue queue, WorkPtr work, std::vector<Point> after);

  std::unique_ptr<Backend> backend_;
  // One per queue; the same one twice for a backend that wants a single issuing thread.
  Lane* lanes_[2];
  uint64_t submitted_[2] = {0, 0};
  Progress progress_[2];
};

/// Names of the devices that are present without being asked for.
std::vector<std::string> device_names();

/// The device of that name. Throws a Failure when there is none.
Device& find_device(const std::string& name);

}  // namespace halfbyte
