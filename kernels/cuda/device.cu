// Memory, streams, events and graphs of one CUDA device.
//
// Memory comes from the device's stream-ordered pool with a release threshold that keeps it, so that a warm
// op allocates without a call into the driver's allocator. During a capture memory is taken on the copy
// stream and waited for: it is an address that the graph keeps, not a node of it. What is released during a
// capture is handed out again within it and then belongs to the graph, which frees it at its end.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cublaslt.h"
#include "int8_rows.cuh"
#include "tiled4.cuh"

namespace halfbyte {

struct EventState {
  cudaEvent_t event = nullptr;
  ~EventState() {
    if (event) cudaEventDestroy(event);
  }
};

struct GraphState {
  cudaGraphExec_t exec = nullptr;
  int device = 0;
  cudaStream_t stream = nullptr;
  std::vector<void*> arena;
  ~GraphState() {
    if (cudaSetDevice(device) != cudaSuccess) return;
    if (exec) cudaGraphExecDestroy(exec);
    for (void* block : arena) cudaFreeAsync(block, stream);
  }
};

namespace cuda {
namespace {

constexpr size_t kLarge = size_t{1} << 30;  // bytes for which it is worth asking what is free

/// Errors after which the context is gone for the process.
bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
      return true;
    default:
      return false;
  }
}

/// Only its attributes are asked for.
__global__ void empty_kernel() {}

/// The number in an environment variable if it lies in [least, most), else most.
int lowered_to(const char* variable, int least, int most) {
  const char* text = std::getenv(variable);
  const int wanted = text ? std::atoi(text) : most;
  return wanted >= least && wanted < most ? wanted : most;
}

/// The architecture that the code chosen for the current device was written for (90a code says 90).
/// HALFBYTE_CUDA_KERNELS names an older one whose kernels are to run instead: 80 on a Hopper, say.
cudaError_t newest_code(Launch* on) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, empty_kernel);
  if (error != cudaSuccess) return error;
  on->code = attributes.ptxVersion;
  on->arch = lowered_to("HALFBYTE_CUDA_KERNELS", 75, on->code);
  return cudaSuccess;
}

cudaError_t describe(int index, Launch* on) {
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, index);
  };
  int major = 0, minor = 0;
  cudaError_t error = read(&on->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = read(&on->shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (error == cudaSuccess) error = read(&on->block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = read(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = read(&minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = newest_code(on);
  on->large_parameters = cuda_info().driver >= 12010;
  // HALFBYTE_CUDA_SHARED, in KiB, lets a block have no more than on a smaller device
  on->block_shared = lowered_to("HALFBYTE_CUDA_SHARED", 64, on->block_shared >> 10) << 10;
  if (error != cudaSuccess || on->arch < 90) return error;
#ifdef HALFBYTE_CUDA_ARCHS
  // of 90 alone: what is newer has no such products, and empty kernels in their place
  on->wgmma = on->arch == 90 && major == 9 && minor == 0 && std::strstr(HALFBYTE_CUDA_ARCHS, "90a");
#endif
  const int room = on->shared - 1024;  // all that a block can have: one on a multiprocessor
  error = cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
  for (int i = 0; i < 3 && error == cudaSuccess; ++i) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2u << i;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::max(on->multiprocessors / 8, 1)) * 8);
    config.blockDim = dim3(512);
    config.dynamicSmemBytes = static_cast<size_t>(room);
    config.attrs = &cluster;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&on->clusters[i], empty_kernel, &config);
  }
  return error;
}

}  // namespace

Status CudaBackend::check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return {};
  early_ = false;      // it may not have been queued
  cudaGetLastError();  // a launch error that is not sticky must not be met again by the next op
  const std::string text = name() + ": " + op + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation)
    return Status::error(Code::out_of_memory, text + ", " + std::to_string(memory().free) + " bytes free");
  if (is_sticky(error)) {
    lost_ = true;
    return Status::error(Code::device_lost, text + "; the device is lost to this process");
  }
  return Status::error(Code::cuda, text);
}

Status CudaBackend::enter() const {
  early_ = false;
  return make_current();
}

Status CudaBackend::enter_early(Queue queue, Launch* on, const Spans& results, const Spans& ahead,
                                bool settles) {
  if (Status status = make_current(); !status.ok()) return status;
  *on = launch_;
  on->stream = stream(queue);
  on->early = early_ && queue == Queue::compute && !ahead.meets(written_);
  early_ = queue == Queue::compute && launch_.arch >= 90;
  if (!on->early || settles) written_.count = 0;
  for (int i = 0; early_ && i < results.count; ++i)
    early_ = written_.add(results.at[i].begin, results.at[i].end);
  return {};
}

Status CudaBackend::make_current() const {
  if (lost_) return Status::error(Code::device_lost, name() + " was lost to an earlier CUDA failure");
  const cudaError_t error = cudaSetDevice(index_);
  if (error != cudaSuccess) return Status::error(Code::cuda, name() + ": " + cudaGetErrorString(error));
  return {};
}

Status CudaBackend::create(int index, std::unique_ptr<Backend>* out) {
  const CudaInfo info = cuda_info();
  if (index < 0 || index >= info.devices) {
    return Status::error(Code::cuda, "cuda:" + std::to_string(index) + " is not there; this machine has " +
                                         std::to_string(info.devices) + " CUDA device(s)");
  }
  std::unique_ptr<CudaBackend> backend(new CudaBackend(index));
  if (Status status = backend->enter(); !status.ok()) return status;
  for (cudaStream_t& stream : backend->streams_) {
    Status status =
        backend->check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    if (!status.ok()) return status;
  }
  cudaMemPoolProps props = {};
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = index;
  Status status = backend->check(cudaMemPoolCreate(&backend->pool_, &props), "creating the memory pool");
  if (!status.ok()) return status;
  uint64_t keep = UINT64_MAX;
  status = backend->check(cudaMemPoolSetAttribute(backend->pool_, cudaMemPoolAttrReleaseThreshold, &keep),
                          "configuring the memory pool");
  if (!status.ok()) return status;
  const cudaError_t error = describe(index, &backend->launch_);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    const std::string device = "the device is of compute capability " + std::to_string(major) + "." +
                               std::to_string(minor) + ", this build has code for " + info.archs;
    if (error == cudaErrorNoKernelImageForDevice)
      return Status::error(
          Code::cuda, device + "; build it with HALFBYTE_CUDA_ARCHS=" + std::to_string(10 * major + minor));
    return Status::error(Code::driver, device +
                                           ", which the driver cannot translate: it is older than the "
                                           "compiler of this build; update the driver");
  }
  status = backend->check(error, "reading attributes");
  if (!status.ok()) return status;
  uint32_t*& arrivals = backend->launch_.arrivals;
  const size_t counters = static_cast<size_t>(backend->launch_.multiprocessors) * sizeof(uint32_t);
  status = backend->check(cudaMalloc(&arrivals, counters), "allocating counters");
  if (status.ok()) status = backend->check(cudaMemset(arrivals, 0, counters), "clearing counters");
  if (!status.ok()) return status;
  if (backend->launch_.wgmma) {
    const size_t bytes = skinny4_sm90_parts(backend->launch_);
    status = backend->check(cudaMalloc(&backend->launch_.parts, bytes), "allocating parts of sums");
    if (status.ok())
      status = backend->check(cudaMemset(backend->launch_.parts, 0xff, bytes), "clearing parts of sums");
    if (!status.ok()) return status;
  }
  status = backend->check(cudaMalloc(&backend->marks_, 2 * sizeof(ColumnMarks)), "allocating");
  if (!status.ok()) return status;
  status = backend->check(cudaMemset(backend->marks_, 0, 2 * sizeof(ColumnMarks)), "allocating");
  if (!status.ok()) return status;
  // the streams of the device do not wait for the one that clears
  status = backend->check(cudaStreamSynchronize(nullptr), "clearing counters");
  if (!status.ok()) return status;
  *out = std::move(backend);
  return {};
}

CudaBackend::~CudaBackend() {
  if (cudaSetDevice(index_) != cudaSuccess) return;
  for (cudaStream_t stream : streams_) {
    if (stream) cudaStreamDestroy(stream);
  }
  cudaFree(launch_.arrivals);
  cudaFree(launch_.parts);
  cudaFree(marks_);
  if (pool_) cudaMemPoolDestroy(pool_);
}

ColumnMarks* CudaBackend::marks(Queue queue) const {
  return static_cast<ColumnMarks*>(marks_) + static_cast<int>(queue);
}

std::string CudaBackend::name() const { return "cuda:" + std::to_string(index_); }

Status CudaBackend::allocate(Queue queue, size_t bytes, void** out) {
  if (Status status = make_current(); !status.ok()) return status;
  const size_t size = bytes ? bytes : 1;
  if (capturing_) {
    const auto found = arena_.lower_bound(size);
    if (found != arena_.end() && found->first <= 2 * size) {
      *out = found->second;
      arena_.erase(found);
      count(static_cast<int64_t>(bytes));
      return {};
    }
  }
  const cudaStream_t on = capturing_ ? stream(Queue::copy) : stream(queue);
  // a pool that is asked for more than there is may take all of it before it says no, from other processes
  // too
  if (size >= kLarge && static_cast<int64_t>(size) > memory().free) return no_memory(name(), bytes, memory());
  cudaError_t error = cudaMallocFromPoolAsync(out, size, pool_, on);
  if (error == cudaErrorMemoryAllocation) {
    // what the pool keeps may be in pieces: give it back to the driver and try once more
    cudaGetLastError();
    if (!capturing_) {
      cudaStreamSynchronize(stream(Queue::compute));
      cudaStreamSynchronize(stream(Queue::copy));
      cudaMemPoolTrimTo(pool_, 0);
      error = cudaMallocFromPoolAsync(out, size, pool_, on);
    }
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    if (!capturing_) cudaMemPoolTrimTo(pool_, 0);
    return no_memory(name(), bytes, memory());
  }
  if (error != cudaSuccess) return check(error, "allocating");
  if (capturing_) {
    if (Status status = check(cudaStreamSynchronize(on), "allocating"); !status.ok()) return status;
  }
  count(static_cast<int64_t>(bytes));
  return {};
}

void CudaBackend::count(int64_t bytes) {
  const int64_t now = allocated_.fetch_add(bytes) + bytes;
  int64_t peak = peak_.load();
  while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
  }
}

void CudaBackend::release(Queue queue, void* data, size_t bytes) {
  if (!data) return;
  allocated_.fetch_sub(static_cast<int64_t>(bytes));
  if (capturing_ && queue == Queue::compute) {
    arena_.emplace(bytes ? bytes : 1, data);
    return;
  }
  if (lost_ || cudaSetDevice(index_) != cudaSuccess) return;
  cudaFreeAsync(data, stream(queue));
}

MemoryInfo CudaBackend::memory() const {
  MemoryInfo info;
  size_t free = 0, total = 0;
  if (!lost_ && cudaSetDevice(index_) == cudaSuccess && cudaMemGetInfo(&free, &total) == cudaSuccess) {
    uint64_t reserved = 0, used = 0;
    cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved);
    cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrUsedMemCurrent, &used);
    info.total = static_cast<int64_t>(total);
    info.free = static_cast<int64_t>(free + (reserved - used));
    info.reserved = static_cast<int64_t>(reserved);
  }
  info.allocated = allocated_.load();
  info.peak = peak_.load();
  return info;
}

void CudaBackend::reset_peak() { peak_.store(allocated_.load()); }

Status CudaBackend::allocate_host(size_t bytes, void** out) {
  if (Status status = make_current(); !status.ok()) return status;
  const cudaError_t error = cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocPortable);
  if (error != cudaErrorMemoryAllocation) return check(error, "allocating pinned memory");
  cudaGetLastError();
  return Status::error(Code::out_of_memory,
                       name() + ": " + std::to_string(bytes) + " bytes of pinned host memory asked");
}
void CudaBackend::release_host(void* data, size_t) {
  if (data && !lost_ && cudaSetDevice(index_) == cudaSuccess) cudaFreeHost(data);
}

Status CudaBackend::upload(Queue queue, void* device, const void* host, size_t bytes) {
  if (Status status = enter(); !status.ok()) return status;
  if (bytes == 0) return {};
  return check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream(queue)), "uploading");
}
Status CudaBackend::download(Queue queue, void* host, const void* device, size_t bytes) {
  if (Status status = enter(); !status.ok()) return status;
  if (bytes == 0) return {};
  return check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream(queue)), "downloading");
}

Status CudaBackend::record(Queue queue, Event* out) {
  if (Status status = enter(); !status.ok()) return status;
  auto state = std::make_shared<EventState>();
  Status status = check(cudaEventCreateWithFlags(&state->event, cudaEventDisableTiming), "creating an event");
  if (!status.ok()) return status;
  status = check(cudaEventRecord(state->event, stream(queue)), "recording an event");
  if (status.ok()) *out = std::move(state);
  return status;
}
Status CudaBackend::wait(Queue queue, const Event& event) {
  if (!event) return {};
  if (Status status = enter(); !status.ok()) return status;
  return check(cudaStreamWaitEvent(stream(queue), event->event, 0), "waiting for an event");
}
Status CudaBackend::synchronize(const Event& event) {
  if (!event) return {};
  if (Status status = make_current(); !status.ok()) return status;
  return check(cudaEventSynchronize(event->event), "synchronising");
}

Status CudaBackend::begin_capture() {
  if (Status status = enter(); !status.ok()) return status;
  Status status =
      check(cudaStreamBeginCapture(stream(Queue::compute), cudaStreamCaptureModeRelaxed), "capturing");
  capturing_ = status.ok();
  return status;
}
Status CudaBackend::end_capture(Graph* out) {
  capturing_ = false;
  early_ = false;  // what was recorded is not what the stream last ran
  cudaGraph_t graph = nullptr;
  Status status = check(cudaStreamEndCapture(stream(Queue::compute), &graph), "ending a capture");
  if (!status.ok()) {
    for (const auto& [size, block] : arena_) cudaFreeAsync(block, stream(Queue::compute));
    arena_.clear();
    return status;
  }
  auto state = std::make_shared<GraphState>();
  state->device = index_;
  state->stream = stream(Queue::compute);
  for (const auto& [size, block] : arena_) state->arena.push_back(block);
  arena_.clear();
  status = check(cudaGraphInstantiate(&state->exec, graph, 0), "instantiating a graph");
  cudaGraphDestroy(graph);
  if (status.ok()) *out = std::move(state);
  return status;
}
Status CudaBackend::launch(const Graph& graph) {
  if (Status status = enter(); !status.ok()) return status;
  return check(cudaGraphLaunch(graph->exec, stream(Queue::compute)), "launching a graph");
}

}  // namespace cuda

CudaInfo cuda_info() {
  CudaInfo info;
  info.compiled = true;
#ifdef HALFBYTE_CUDA_ARCHS
  info.archs = HALFBYTE_CUDA_ARCHS;
#endif
  cudaRuntimeGetVersion(&info.runtime);
  if (cudaDriverGetVersion(&info.driver) != cudaSuccess || info.driver == 0) {
    info.driver = 0;
    return info;
  }
  const cudaError_t error = cudaGetDeviceCount(&info.devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    info.devices = 0;
    if (error != cudaErrorNoDevice) info.failure = cudaGetErrorString(error);
  }
  return info;
}

DenseLibrary cuda_dense_library() {
  DenseLibrary library;
  library.found = cuda::has_cublaslt(&library.where);
  return library;
}

Status make_cuda_backend(int index, std::unique_ptr<Backend>* out) {
  return cuda::CudaBackend::create(index, out);
}

}  // namespace halfbyte
