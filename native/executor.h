// A native thread that runs the work of one queue, or of both queues of a device, in the order of submission.
//
// Every submission to a queue gets a ticket, and a queue's `Progress` says up to which ticket work has run.
// Work that touches a storage which work of another queue touched waits for that ticket. Waits only ever
// point to earlier submissions, so they cannot form a circle.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "work.h"

namespace halfbyte {

/// A place on a queue.
struct Point {
  Device* device;
  Queue queue;
  uint64_t ticket;
};

class Progress {
 public:
  bool reached(uint64_t ticket) const { return done_.load(std::memory_order_acquire) >= ticket; }
  void advance(uint64_t ticket);
  /// Also returns when the process ends: the work that is waited for may not be done any more.
  void wait(uint64_t ticket);

 private:
  std::atomic<uint64_t> done_{0};
  std::atomic<int> waiting_{0};
  std::mutex mutex_;
  std::condition_variable advanced_;
};

struct Entry {
  WorkPtr work;
  Queue queue;
  uint64_t ticket;
  std::vector<Point> after;
};

class Lane {
 public:
  explicit Lane(Device& device) : device_(device) {}
  /// Takes the next ticket of `queue`, whose counter is `submitted`, and appends the work. Starts the thread
  /// on first use; throws std::system_error when there is none to be had.
  uint64_t push(WorkPtr work, Queue queue, std::vector<Point> after, uint64_t& submitted);

  /// Lets the entry that is being worked on end, and none start after it. At process exit only, after
  /// end_process(): a driver that is being taken down must not be called any more.
  void halt() { busy_.lock(); }

 private:
  void loop();

  Device& device_;
  std::mutex busy_;  // held while an entry is worked on
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Entry> entries_;
  std::atomic<size_t> waiting_entries_{0};
  bool started_ = false;
  bool asleep_ = false;
};

/// From here on lanes do not wait for each other, and begin no entry that would have had to.
void end_process();

/// The device whose work the calling thread runs, or null.
Device* running_device();

/// Runs one piece of work: passes failures on, allocates, calls run() and done(). Never throws.
void perform(Work& work, Backend& backend, Queue queue);

}  // namespace halfbyte
