// Tensor maps, encoded by the driver.
#include "tma_sm90.cuh"

namespace halfbyte::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

cudaError_t describe_tiles(CUtensorMap* map, DType dtype, const void* x, int64_t rows, int64_t cols,
                           int tile_rows) {
  static const Encode encode = find_encoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint32_t bytes = static_cast<cuuint32_t>(size_of(dtype));
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(cols) * bytes};
  const cuuint32_t tile[2] = {128 / bytes, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type = dtype == DType::i8    ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(map, type, 2, const_cast<void*>(x), sizes, row_bytes, tile, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t describe_words(CUtensorMap* map, const void* data, int64_t rows, int64_t words, int tile_rows,
                           int tile_words) {
  static const Encode encode = find_encoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(words), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(words) * 4};
  const cuuint32_t tile[2] = {static_cast<cuuint32_t>(tile_words), static_cast<cuuint32_t>(tile_rows)},
                   steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 2, const_cast<void*>(data), sizes, row_bytes, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace halfbyte::cuda
