// The NativeFile class: ranges of a file as tensors.
//
// The ranges are read with pread, straight into the tensor's memory on a host device, through pinned buffers
// on another (reader.h). A mapping would be one copy as well, but a file that is truncated under a mapping,
// or a network disk that fails, kills the process with SIGBUS; here it is an error that names the file.
#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "device_handle.h"
#include "reader.h"
#include "tensor_handle.h"
#include "work.h"

namespace halfbyte {
namespace {

/// An open file. Work that is queued keeps it open.
class File {
 public:
  explicit File(const std::string& path) : path_(path) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) refuse("cannot be opened", errno);
    struct stat info;
    if (fstat(descriptor_, &info) != 0) {
      const int error = errno;
      close(descriptor_);
      refuse("cannot be examined", error);
    }
    if (!S_ISREG(info.st_mode)) {
      close(descriptor_);
      refuse("is not a regular file", 0);
    }
    size_ = info.st_size;
#if defined(POSIX_FADV_SEQUENTIAL)
    posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
  }
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const { return size_; }

  void check_range(int64_t begin, int64_t end) const {
    if (begin <= end && end <= size_) return;
    fail("ERR_HALFBYTE_IO", path_ + ": bytes " + std::to_string(begin) + " to " + std::to_string(end) +
                                " are not within the file of " + std::to_string(size_) + " bytes");
  }

  /// Throws a Failure that names the file.
  void read(void* to, size_t bytes, int64_t at) const {
    char* out = static_cast<char*>(to);
    while (bytes > 0) {
      const ssize_t got = pread(descriptor_, out, std::min(bytes, size_t{1} << 30), at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) refuse("cannot be read at byte " + std::to_string(at), errno);
      if (got == 0) {
        // the end, whichever of several pieces behind it this is
        struct stat now;
        const int64_t end = fstat(descriptor_, &now) == 0 ? std::min<int64_t>(at, now.st_size) : at;
        fail("ERR_HALFBYTE_IO", path_ + ": the file ends at byte " + std::to_string(end) + ", it had " +
                                    std::to_string(size_) + " bytes when it was opened");
      }
      out += got;
      at += got;
      bytes -= static_cast<size_t>(got);
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& what, int error) const {
    fail("ERR_HALFBYTE_IO", path_ + " " + what + (error ? std::string(": ") + strerror(error) : ""));
  }

  const std::string path_;
  int descriptor_ = -1;
  int64_t size_ = 0;
};

struct FileHandle final : Handle {
  static constexpr Kind kKind = Kind::file;
  explicit FileHandle(const std::string& path) : Handle(kKind), file(std::make_shared<const File>(path)) {}
  std::shared_ptr<const File> file;  // null once closed
};

class FileWork final : public Work {
 public:
  FileWork(const StoragePtr& storage, const std::shared_ptr<const File>& file, int64_t begin)
      : storage_(storage.get()),
        begin_(begin),
        read_([file](void* to, size_t bytes, int64_t at) { file->read(to, bytes, at); }) {
    uses.push_back(Use{storage, false, true, true});
    Backend& backend = storage->device->backend();
    if (!backend.host_memory()) ahead_ = std::make_unique<ReadAhead>(backend, read_, begin, storage->bytes);
  }
  const char* name() const override { return "openFile"; }
  Status run(Backend&, Queue queue) override {
    if (ahead_) return ahead_->upload(queue, storage_->data());
    read_range(read_, storage_->data(), storage_->bytes, begin_);
    return {};
  }

 private:
  Storage* storage_;
  int64_t begin_;
  ReadFunction read_;
  std::unique_ptr<ReadAhead> ahead_;
};

/// Held from the beginning of a read until its work is queued: both in one order. See ReadAhead.
std::mutex queueing;

const std::shared_ptr<const File>& this_file(Call& call) {
  const auto& file = to_object<FileHandle>(call.self, call.receiver).file;
  if (!file) fail("ERR_HALFBYTE_DISPOSED", "The file was closed");
  return file;
}

napi_value size(Call& call) { return make_number(call.env, static_cast<double>(this_file(call)->size())); }

napi_value bytes(Call& call) {
  const auto& file = this_file(call);
  const int64_t begin = to_size(call.env, call.arguments[0], "begin");
  const int64_t end = to_size(call.env, call.arguments[1], "end");
  file->check_range(begin, end);
  void* data = nullptr;
  napi_value result;
  const napi_status status =
      napi_create_arraybuffer(call.env, static_cast<size_t>(end - begin), &data, &result);
  if (status != napi_ok) {
    check(call.env, status, "bytes");
  }
  file->read(data, static_cast<size_t>(end - begin), begin);
  return result;
}

napi_value tensor(Call& call) {
  const auto& file = this_file(call);
  Device& device = to_object<DeviceHandle>(call.self, call.arguments[0]).device;
  size_t bytes;
  const View view = to_contiguous_view(call.env, call.arguments[1], call.arguments[2], &bytes);
  const int64_t begin = to_size(call.env, call.arguments[3], "byteOffset");
  file->check_range(begin, begin + static_cast<int64_t>(bytes));
  auto storage = std::make_shared<Storage>(&device, bytes, call.self.link());
  call.self.tell_memory();
  const std::lock_guard<std::mutex> in_order(queueing);
  auto work = std::make_shared<FileWork>(storage, file, begin);
  work->owner = call.self.link();
  // work that is to be done before memory is taken for this
  napi_valuetype after;
  check(call.env, napi_typeof(call.env, call.arguments[4], &after), "after");
  if (after == napi_object)
    work->uses.push_back(Use{to_tensor(call.self, call.arguments[4]).storage, false, true, false});
  device.submit(Queue::copy, std::move(work));
  return make_tensor(call.self, std::move(storage), view);
}

napi_value close_file(Call& call) {
  to_object<FileHandle>(call.self, call.receiver).file.reset();
  return nullptr;
}

}  // namespace

void define_file_class(Environment& self) {
  self.file_class = define_class(
      self.env, "NativeFile",
      {getter<size>("size"), method<bytes>("bytes"), method<tensor>("tensor"), method<close_file>("close")});
}

napi_value make_file(Environment& self, const std::string& path) {
  return make_object(self, self.file_class, std::make_unique<FileHandle>(path));
}

}  // namespace halfbyte
