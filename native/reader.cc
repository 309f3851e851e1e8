#include "reader.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace halfbyte {
namespace {

constexpr size_t kPiece = ReadAhead::kBytes;
constexpr int kMostThreads = 8;

FailurePtr caught() {
  try {
    throw;
  } catch (const Failure& failure) {
    return std::make_shared<const Failure>(failure);
  } catch (const std::bad_alloc&) {
    return std::make_shared<const Failure>(
        Failure{"ERR_HALFBYTE_OUT_OF_MEMORY", "openFile: there is no memory to read into"});
  }
}

/// A range that is read into host memory by whoever has time.
struct HostRange {
  HostRange(const ReadFunction& read, char* to, size_t bytes, int64_t at)
      : read(read), to(to), bytes(bytes), at(at), pieces((bytes + kPiece - 1) / kPiece) {}

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= pieces; }

  void help() {
    for (size_t i; (i = next.fetch_add(1)) < pieces;) {
      const size_t begin = i * kPiece;
      try {
        read(to + begin, std::min(kPiece, bytes - begin), at + static_cast<int64_t>(begin));
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = caught();
      }
      if (done.fetch_add(1) + 1 == pieces) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load() == pieces; });
  }

  const ReadFunction& read;
  char* const to;
  const size_t bytes;
  const int64_t at;
  const size_t pieces;
  std::atomic<size_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
  FailurePtr failure;
};

/// A pinned buffer, and the upload that last read it.
struct Buffer {
  void* data = nullptr;
  Event uploaded;
};

}  // namespace

struct ReadAhead::Range {
  enum class State { waiting, reading, read, taken };
  struct Piece {
    State state = State::waiting;
    Buffer buffer;
  };
  Range(Backend& backend, ReadFunction read, int64_t at, size_t bytes, bool at_once)
      : backend(backend),
        read(std::move(read)),
        at(at),
        bytes(bytes),
        at_once(at_once),
        pieces((bytes + kPiece - 1) / kPiece) {}

  size_t begin(size_t piece) const { return piece * kPiece; }
  size_t length(size_t piece) const { return std::min(kPiece, bytes - begin(piece)); }

  Backend& backend;
  const ReadFunction read;
  const int64_t at;
  const size_t bytes;
  const bool at_once;
  // What follows belongs to the mutex of the readers.
  std::vector<Piece> pieces;
  size_t next = 0;  // the first piece that no thread has taken up
  bool given_up = false;
  FailurePtr failure;
};

/// The threads of the process. Never destroyed, as they do not end.
class Readers {
 public:
  using Range = ReadAhead::Range;
  using State = Range::State;

  static Readers& instance() {
    static Readers* readers = new Readers;
    return *readers;
  }

  void add(std::shared_ptr<Range> range) {
    std::lock_guard<std::mutex> lock(mutex_);
    start();
    auto& station = stations_[key(*range)];
    if (!station) {
      station = std::make_unique<Station>();
      station->most = range->at_once ? ReadAhead::kBuffersAtOnce : ReadAhead::kBuffers;
      station->free.reserve(static_cast<size_t>(station->most));  // giving back must not fail
      halt_at_exit();
    }
    station->waiting.push_back(std::move(range));
    work_.notify_all();
  }

  void give_up(const std::shared_ptr<Range>& range) {
    std::unique_lock<std::mutex> lock(mutex_);
    range->given_up = true;
    Station& station = *stations_[key(*range)];
    for (Range::Piece& piece : range->pieces) {
      if (piece.state == State::read) station.free.push_back(piece.buffer);
      if (piece.state != State::reading) piece.state = State::taken;
    }
    work_.notify_all();
    if (!range->at_once) return;
    // also while the process ends: what is being read from may go next
    read_.wait(lock, [&] {
      return std::none_of(range->pieces.begin(), range->pieces.end(),
                          [](const Range::Piece& piece) { return piece.state == State::reading; });
    });
  }

  /// The buffer with a piece of the range, once it has been read.
  Buffer take(Range& range, size_t piece) {
    std::unique_lock<std::mutex> lock(mutex_);
    read_.wait(lock, [&] { return halted_ || range.failure || range.pieces[piece].state == State::read; });
    if (range.failure) throw *range.failure;
    if (range.pieces[piece].state != State::read) fail("ERR_HALFBYTE_IO", "openFile: the process is ending");
    range.pieces[piece].state = State::taken;
    return range.pieces[piece].buffer;
  }

  /// Gives a buffer back that is free once `buffer.uploaded` has come.
  void uploaded(Range& range, Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    stations_[key(range)]->flying.push_back(std::move(buffer));
    work_.notify_one();
  }

  void help(HostRange& range) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        start();
      } catch (const std::system_error&) {
        // the caller does it alone
      }
      host_.push_back(&range);
      work_.notify_all();
    }
    range.help();
    range.wait();
    // A thread that is about to look at the range holds the mutex, and counts itself.
    std::unique_lock<std::mutex> lock(mutex_);
    host_.erase(std::remove(host_.begin(), host_.end(), &range), host_.end());
    left_.wait(lock, [&] { return std::count(helped_.begin(), helped_.end(), &range) == 0; });
  }

 private:
  struct Station {
    std::deque<std::shared_ptr<Range>> waiting;
    std::vector<Buffer> free;
    std::deque<Buffer> flying;
    int made = 0, most = 0;
  };
  /// Ranges that somebody waits for sort first.
  using Key = std::pair<bool, Backend*>;
  static Key key(const Range& range) { return {!range.at_once, &range.backend}; }

  /// Throws std::system_error where there is no thread to be had.
  void start() {
    if (threads_ > 0) return;
    helped_.reserve(kMostThreads);
    const int wanted = std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 2, 2, kMostThreads);
    while (threads_ < wanted) {
      try {
        std::thread([this] { loop(); }).detach();
      } catch (const std::system_error&) {
        if (threads_ == 0) throw;
        return;
      }
      ++threads_;
    }
  }

  /// The driver takes itself and its buffers down at exit while these threads still run: then they must
  /// neither call it nor write to a buffer any more, and nobody may wait for what they were about to do.
  void halt_at_exit() {
    if (halts_) return;
    halts_ = true;
    std::atexit([] { instance().halt(); });
  }

  /// Lets the pieces that are being read end, and none begin after them.
  void halt() {
    std::unique_lock<std::mutex> lock(mutex_);
    halted_ = true;
    read_.notify_all();
    still_.wait(lock, [&] { return reading_ == 0; });
  }

  /// A device with something to read and a buffer to read it into.
  Station* next_station() {
    for (auto& [device, station] : stations_) {
      auto& waiting = station->waiting;
      while (!waiting.empty() &&
             (waiting.front()->given_up || waiting.front()->next == waiting.front()->pieces.size()))
        waiting.pop_front();
      if (waiting.empty()) continue;
      if (!station->free.empty() || !station->flying.empty() || station->made < station->most)
        return station.get();
    }
    return nullptr;
  }

  HostRange* next_host_range() {
    for (HostRange* range : host_) {
      if (!range->exhausted()) return range;
    }
    return nullptr;
  }

  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (HostRange* range = next_host_range()) {
        helped_.push_back(range);
        lock.unlock();
        range->help();
        lock.lock();
        helped_.erase(std::find(helped_.begin(), helped_.end(), range));
        left_.notify_all();
      } else if (Station* station = halted_ ? nullptr : next_station()) {
        read_piece(*station, lock);
      } else {
        work_.wait(lock);
      }
    }
  }

  /// Takes up the next piece of the station. Called with the lock held, which is let go meanwhile.
  void read_piece(Station& station, std::unique_lock<std::mutex>& lock) {
    const std::shared_ptr<Range> range = station.waiting.front();
    const size_t piece = range->next++;
    range->pieces[piece].state = State::reading;
    Buffer buffer;
    if (!station.free.empty()) {
      buffer = std::move(station.free.back());
      station.free.pop_back();
    } else if (station.made < station.most) {
      ++station.made;
    } else {
      buffer = std::move(station.flying.front());
      station.flying.pop_front();
    }
    ++reading_;
    lock.unlock();
    FailurePtr failure = prepare(range->backend, buffer);
    if (!failure) {
      try {
        range->read(buffer.data, range->length(piece), range->at + static_cast<int64_t>(range->begin(piece)));
      } catch (...) {
        failure = caught();
      }
    }
    lock.lock();
    if (--reading_ == 0) still_.notify_all();
    range->pieces[piece].buffer = buffer;
    range->pieces[piece].state = failure || range->given_up ? State::taken : State::read;
    if (range->pieces[piece].state == State::taken) {
      if (buffer.data) {
        station.free.push_back(std::move(buffer));
      } else {
        --station.made;
      }
    }
    if (failure && !range->failure) range->failure = failure;
    read_.notify_all();
    work_.notify_one();
  }

  /// Sees to it that the buffer is there, and that nothing reads it any more.
  FailurePtr prepare(Backend& backend, Buffer& buffer) {
    const Status status = buffer.data ? backend.synchronize(buffer.uploaded)
                                      : backend.allocate_host(ReadAhead::kBytes, &buffer.data);
    buffer.uploaded.reset();
    return status.ok() ? nullptr : failure_of("openFile", status);
  }

  std::mutex mutex_;
  std::condition_variable work_, read_, left_, still_;
  std::map<Key, std::unique_ptr<Station>> stations_;
  std::deque<HostRange*> host_;
  std::vector<HostRange*> helped_;
  int threads_ = 0;
  int reading_ = 0;  // threads with a piece in hand: they call a driver, and write to its buffers
  bool halts_ = false, halted_ = false;
};

void read_range(const ReadFunction& read, void* to, size_t bytes, int64_t at) {
  if (bytes <= kPiece) {
    if (bytes) read(to, bytes, at);
    return;
  }
  HostRange range(read, static_cast<char*>(to), bytes, at);
  Readers::instance().help(range);
  if (range.failure) throw *range.failure;
}

ReadAhead::ReadAhead(Backend& backend, ReadFunction read, int64_t at, size_t bytes, bool at_once)
    : range_(std::make_shared<Range>(backend, std::move(read), at, bytes, at_once)) {
  if (bytes) Readers::instance().add(range_);
}

ReadAhead::~ReadAhead() {
  if (range_->bytes) Readers::instance().give_up(range_);
}

Status ReadAhead::upload(Queue queue, void* to) {
  Backend& backend = range_->backend;
  for (size_t i = 0; i < range_->pieces.size(); ++i) {
    Buffer buffer = Readers::instance().take(*range_, i);
    Status status =
        backend.upload(queue, static_cast<char*>(to) + range_->begin(i), buffer.data, range_->length(i));
    if (status.ok()) status = backend.record(queue, &buffer.uploaded);
    Readers::instance().uploaded(*range_, std::move(buffer));
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace halfbyte
