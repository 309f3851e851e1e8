// Threads that read files, so that neither a device's queues nor JavaScript wait for a disk longer than the
// bytes themselves take.
//
// Into host memory a range is read by several threads at once. On its way to another device it goes through
// pinned buffers: reading starts when the work is queued and runs ahead of it as far as the device's buffers
// reach (kBuffers of kBytes, the host memory that loading takes), while earlier buffers are uploaded and
// earlier tensors computed with. A buffer is filled anew when its upload is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "backend.h"
#include "errors.h"

namespace halfbyte {

/// Reads bytes of a file; throws a Failure. Called from several threads at once.
using ReadFunction = std::function<void(void* to, size_t bytes, int64_t at)>;

/// Fills host memory. Throws what `read` throws.
void read_range(const ReadFunction& read, void* to, size_t bytes, int64_t at);

/// A range of a file on its way to a device that is not the host.
class ReadAhead {
 public:
  static constexpr size_t kBytes = size_t{2} << 20;
  static constexpr int kBuffers = 32;
  static constexpr int kBuffersAtOnce = 8;

  /// Starts reading. Ranges for one device must be uploaded, or given up, in the order in which they were
  /// begun: a later one may have the buffers that an earlier one gives back. Ranges that are uploaded
  /// `at_once`, by the thread that begins them, have buffers of their own; `read` is not called after their
  /// end.
  ReadAhead(Backend& backend, ReadFunction read, int64_t at, size_t bytes, bool at_once = false);
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  /// Appends the upload to `queue`, piece by piece as they arrive. Throws what `read` threw.
  Status upload(Queue queue, void* to);

 private:
  struct Range;
  std::shared_ptr<Range> range_;
  friend class Readers;
};

}  // namespace halfbyte
