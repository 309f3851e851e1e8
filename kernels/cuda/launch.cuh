// Programmatic dependent launch: a kernel may start while the one in front of it on the stream still runs,
// and then waits, before it touches what that one makes. Nothing of it exists before sm_90, where the calls
// do nothing.
//
// A kernel that is launched so reads only what no recent kernel has written before wait_for_results()
// (weights: enter_early() is told where they lie), writes only after it, and every block of it waits.
#pragma once

#include "tiled4.cuh"

namespace halfbyte::cuda {

/// Lets the next kernel start as soon as there is room.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
/// Until everything that was launched before has ended and is visible.
__device__ __forceinline__ void wait_for_results() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/// By one thread of each of `blocks` blocks that meet at a counter, zero before and after, when all threads
/// of its block have passed a barrier: whether it is the last, which then sees what all the others have
/// written.
__device__ __forceinline__ bool count_arrival(uint32_t* counter, uint32_t blocks) {
  __threadfence();
  const bool last = atomicAdd(counter, 1u) == blocks - 1;
  if (!last) return false;
  *counter = 0;
  __threadfence();
  return true;
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;   // blocks along x
  bool together = false;  // all blocks run at once, whatever else the device does, or the launch fails
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const Launch& on, const LaunchShape& shape, void (*kernel)(Parameters...),
                          Arguments&&... arguments) {
  if (shape.shared > (32 << 10)) {  // the limit of 48 KiB is for what the kernel declares itself too
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = on.stream;
  config.attrs = attributes;
  if (on.early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.together) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace halfbyte::cuda
