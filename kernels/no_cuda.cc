// What a build without CUDA answers; left out of the build when kernels/cuda is in it.
#include "backend.h"

namespace halfbyte {

CudaInfo cuda_info() { return {}; }

DenseLibrary cuda_dense_library() { return {false, "this build has no CUDA backend"}; }

Status make_cuda_backend(int, std::unique_ptr<Backend>*) {
  return Status::error(Code::unsupported, "this build has no CUDA backend");
}

}  // namespace halfbyte
