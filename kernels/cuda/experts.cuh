// Products in which every pair of a token and an expert has a weight of its own, 4-bit and tiled: what the
// kernels get. Which weight it is stands on the device alone, so kernels are given all of them, as
// parameters: their memory is there when a kernel begins, and a graph keeps it.
#pragma once

#include "launch.cuh"
#include "table4.cuh"

namespace halfbyte::cuda {

/// The weight of an expert and its bias.
struct ExpertPlace {
  const uint8_t* codes;
  const void* absmax;   // fp32 [blocks], nested uint8
  const float* nested;  // with double quantisation, else null
  const float* nested_code;
  const float* offset;
  const void* bias;  // or null
};

/// The experts' weights; with gate and up all gates, then all ups. Kernels come in a few sizes of it: 32 KiB
/// is the most that parameters can have (sm_70 and up, with drivers of CUDA 12.1 and newer).
template <int kMost>
struct ExpertTable {
  static constexpr int kPlaces = kMost;
  ExpertPlace at[kMost];
};
constexpr int kMostPlaces = 640;

/// y[p, :] = x[p / each, :] w[ids[p]]^T + bias, or act(gate's) * up's.
template <typename T>
struct ExpertProduct {
  T* y;
  const T* x;
  const int32_t* ids;
  int64_t n, k;
  int pairs, each, experts;
  DType bias_dtype[2];  // gate's or the only one's, and up's
  Book4 book;
  bool nested, gated;
  bool settled;  // ids and weights are there before the op in front of this one has ended
  Activation act;
};

/// Places on the host, before it is known which table they fit.
struct ExpertPlaces {
  ExpertPlace at[kMostPlaces];
  int count = 0;
};

/// Calls body with a table that holds them.
template <typename Body>
cudaError_t with_table(const ExpertPlaces& places, const Body& body) {
  const auto fill = [&](auto* table) {
    for (int i = 0; i < places.count; ++i) table->at[i] = places.at[i];
    return body(*table);
  };
  if (places.count <= 64) {
    ExpertTable<64> table = {};
    return fill(&table);
  }
  if (places.count <= 256) {
    ExpertTable<256> table = {};
    return fill(&table);
  }
  ExpertTable<kMostPlaces> table = {};
  return fill(&table);
}

/// A bias as it is stored.
__device__ __forceinline__ float bias_value(const void* bias, DType dtype, int64_t i) {
  if (!bias) return 0.0f;
  if (dtype == DType::f16) return __half2float(static_cast<const half_t*>(bias)[i]);
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const bf16_t*>(bias)[i]);
  return static_cast<const float*>(bias)[i];
}

/// A few pairs, with K from 256 on: the weights are read once for each pair. experts_gemv4.cu
bool experts_gemv4_takes(const Launch& on, int64_t k);
template <typename T>
cudaError_t experts_gemv4(const Launch& on, const ExpertProduct<T>& product, const ExpertPlaces& places);

/// Many pairs, by mma.sync: those of an expert together, which the workspace lists. experts_gemm4.cu
size_t experts_gemm4_workspace(int64_t pairs, int64_t experts);
template <typename T>
cudaError_t experts_gemm4(const Launch& on, const ExpertProduct<T>& product, const ExpertPlaces& places,
                          void* workspace);

}  // namespace halfbyte::cuda
