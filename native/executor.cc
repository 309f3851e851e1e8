#include "executor.h"

#include <chrono>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "device.h"
#include "environment.h"

namespace halfbyte {
namespace {

// Ops of a forward pass follow each other within microseconds: look a little while before sleeping, since
// waking a thread costs the JavaScript side a system call.
constexpr int kSpins = 1000;

// How often somebody who waits looks whether the process ends.
constexpr std::chrono::milliseconds kLook{50};

thread_local Device* running = nullptr;
std::atomic<bool> ending{false};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

const FailurePtr& out_of_host_memory() {
  static const FailurePtr* failure = new FailurePtr(std::make_shared<const Failure>(
      Failure{"ERR_HALFBYTE_OUT_OF_MEMORY", "The process is out of memory for its own bookkeeping"}));
  return *failure;
}

/// Makes the operands usable: memory that is there, ArrayBuffers that are held.
class Operands {
 public:
  Operands(Work& work, Queue queue) : work_(work) {
    for (; entered_ < work.uses.size(); ++entered_) {
      Storage& storage = *work.uses[entered_].storage;
      if (storage.borrow) {
        if (!storage.borrow->enter()) {
          status_ =
              Status::error(Code::internal, "the environment that owns an operand's ArrayBuffer has ended");
          return;
        }
      } else if (Status status = storage.allocate(queue); !status.ok()) {
        status_ = std::move(status);
        return;
      }
    }
  }
  ~Operands() {
    for (size_t i = 0; i < entered_; ++i) {
      if (Borrow* borrow = work_.uses[i].storage->borrow.get()) borrow->leave();
    }
  }
  const Status& status() const { return status_; }

 private:
  Work& work_;
  size_t entered_ = 0;
  Status status_;
};

FailurePtr attempt(Work& work, Backend& backend, Queue queue) {
  if (!work.passes_failures()) {
    work.run(backend, queue);
    return nullptr;
  }
  for (const Use& use : work.uses) {
    if (use.reads && use.storage->failure) return use.storage->failure;
  }
  try {
    const Operands operands(work, queue);
    Status status = operands.status();
    if (status.ok()) status = work.run(backend, queue);
    if (status.ok() && work.ends_on_host()) {
      Event event;
      status = backend.record(queue, &event);
      if (status.ok()) status = backend.synchronize(event);
    }
    if (!status.ok()) return failure_of(work.name(), status);
  } catch (const Failure& failure) {
    return std::make_shared<const Failure>(failure);
  } catch (const std::bad_alloc&) {
    return out_of_host_memory();
  }
  return nullptr;
}

}  // namespace

void perform(Work& work, Backend& backend, Queue queue) {
  if (work.owner && work.owner->closed()) return;
  const FailurePtr failure = attempt(work, backend, queue);
  if (!work.passes_failures()) return;
  for (const Use& use : work.uses) {
    if (!use.writes) continue;
    if (failure) {
      use.storage->failure = failure;
    } else if (use.overwrites) {
      use.storage->failure = nullptr;
    }
  }
  try {
    work.done(failure);
  } catch (const std::bad_alloc&) {
    // done() only hands over; without memory for that the promise stays open, and the process lives.
  }
}

void Progress::advance(uint64_t ticket) {
  done_.store(ticket, std::memory_order_seq_cst);
  if (waiting_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  advanced_.notify_all();
}

void Progress::wait(uint64_t ticket) {
  for (int i = 0; i < kSpins; ++i) {
    if (reached(ticket)) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_.fetch_add(1, std::memory_order_seq_cst);
  const auto come = [&] { return done_.load(std::memory_order_seq_cst) >= ticket; };
  while (!advanced_.wait_for(lock, kLook, come) && !ending.load(std::memory_order_acquire)) {
  }
  waiting_.fetch_sub(1, std::memory_order_seq_cst);
}

uint64_t Lane::push(WorkPtr work, Queue queue, std::vector<Point> after, uint64_t& submitted) {
  bool wake;
  uint64_t ticket;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!started_) {
      // Detached: it belongs to the process, and the device that it works for is never destroyed.
      std::thread([this] { loop(); }).detach();
      started_ = true;
    }
    entries_.push_back(Entry{std::move(work), queue, submitted + 1, std::move(after)});
    ticket = ++submitted;
    waiting_entries_.store(entries_.size(), std::memory_order_release);
    wake = asleep_;
  }
  if (wake) wake_.notify_one();
  return ticket;
}

Device* running_device() { return running; }

void end_process() { ending.store(true, std::memory_order_release); }

void Lane::loop() {
  running = &device_;
  std::vector<Entry> batch;
  for (;;) {
    for (int i = 0; i < kSpins && waiting_entries_.load(std::memory_order_acquire) == 0; ++i) relax();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_ = true;
      wake_.wait(lock, [&] { return !entries_.empty(); });
      asleep_ = false;
      batch.swap(entries_);
      waiting_entries_.store(0, std::memory_order_release);
    }
    for (Entry& entry : batch) {
      std::unique_lock<std::mutex> busy(busy_);
      for (const Point& point : entry.after) {
        device_.order_after(entry.queue, point);
        if (point.device->progress(point.queue).reached(point.ticket)) continue;
        busy.unlock();
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));  // the process ends
      }
      perform(*entry.work, device_.backend(), entry.queue);
      // Memory goes before the ticket is reported, so that whoever waited sees it gone.
      entry.work.reset();
      device_.progress(entry.queue).advance(entry.ticket);
    }
    batch.clear();
  }
}

}  // namespace halfbyte
