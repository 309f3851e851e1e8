// The end of a whole item of int8_gemm_sm90.cu: int32 sums in the registers of a warpgroup, 64 rows of the
// weight and kTokens tokens, become 16-bit results in half as many registers. These go to memory by the copy
// engine, part by part, between the first products of the next item.
#pragma once

#include "output_sm90.cuh"

namespace halfbyte::cuda {

#if HALFBYTE_WGMMA

/// What the end needs beside the sums. Fetched while products run.
struct Ending {
  float scb[2];  // of rows r and r + 8 of this thread
  float bias[2];
};

template <typename T>
__device__ __forceinline__ void fetch_ending(Ending* ending, const Output<T>& out, const float* scb,
                                             int64_t first_row) {
  const int64_t row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = min(row + h * 8, out.n - 1);
    ending->scb[h] = scb[at];  // nothing waits for it here
    ending->bias[h] = out.bias ? out.bias_at(at) : 0.0f;
  }
}

/// Results of a warpgroup on their way to memory: parts of 64 rows and kPass tokens. The first two are staged
/// at once, the rest waits in registers.
template <typename T, int kTokens>
struct Results {
  static constexpr int kPass = kTokens < kStaged ? kTokens : kStaged, kParts = kTokens / kPass;
  static constexpr int kAtOnce = kParts < 2 ? kParts : 2, kLater = kParts - kAtOnce;
  static constexpr int kPairs = kPass / 4;          // registers of a part
  uint32_t later[kLater > 0 ? kLater* kPairs : 1];  // pairs of rows, as store_transposed() takes them

  /// Of int32 sums, or fp32 ones that are times `token_scales` (in shared memory) already.
  template <bool kBias, typename V>
  static __device__ __forceinline__ void make(uint32_t* pairs, int part, const V (&sums)[kTokens / 2],
                                              const Ending& ending, const float* token_scales) {
#pragma unroll
    for (int i = 0; i < kPass / 8; ++i) {
      const int eight = part * (kPass / 8) + i;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = static_cast<float>(sums[eight * 4 + e]);
      if constexpr (!std::is_same_v<V, float>) {
        const float2 pair = *reinterpret_cast<const float2*>(token_scales + eight * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] *= e % 2 ? pair.y : pair.x;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = __fmul_rn(v[e], ending.scb[e / 2] * kInt8Scale);
        if (kBias) v[e] = __fadd_rn(v[e], ending.bias[e / 2]);
      }
      pairs[i * 2] = pair_of<T>(v[0], v[1]);
      pairs[i * 2 + 1] = pair_of<T>(v[2], v[3]);
    }
  }
  static __device__ __forceinline__ void stage(const uint32_t* pairs, uint32_t to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int token = lane / 16 * 8 + lane % 8, rows8 = warp * 2 + lane / 8 % 2;
    const uint32_t matrices = to + token * 128 + ((rows8 ^ (token & 7)) * 16);
#pragma unroll
    for (int j = 0; j < kPass / 16; ++j) {
      const uint32_t r[4] = {pairs[j * 4], pairs[j * 4 + 1], pairs[j * 4 + 2], pairs[j * 4 + 3]};
      store_transposed(matrices + j * 16 * 128, r);
    }
  }

  /// Begins to write an item. `y` describes tiles of kPass tokens and 64 rows; `staging` has room for two,
  /// and nothing reads it any more.
  template <bool kBias, typename V>
  __device__ __forceinline__ void begin(const V (&sums)[kTokens / 2], const Ending& ending,
                                        const float* token_scales, const CUtensorMap& y, char* staging,
                                        int group, int row, int first_token) {
    const uint32_t to = shared_address(staging);
#pragma unroll
    for (int part = 0; part < kAtOnce; ++part) {
      uint32_t pairs[kPairs];
      make<kBias>(pairs, part, sums, ending, token_scales);
      stage(pairs, to + part * kStaging);
    }
    publish_shared();
#pragma unroll
    for (int part = 0; part < kLater; ++part)
      make<kBias>(later + part * kPairs, kAtOnce + part, sums, ending, token_scales);
    group_barrier(group);
    if (threadIdx.x % kGroup == 0) {
#pragma unroll
      for (int part = 0; part < kAtOnce; ++part)
        store_tile(y, to + part * kStaging, first_token + part * kPass, row);
    }
  }
  /// The rest, in kLater calls. Thread 0 of the group waits for its stores afterwards.
  __device__ __forceinline__ void go_on(int part, const CUtensorMap& y, char* staging, int group, int row,
                                        int first_token) const {
    const uint32_t to = shared_address(staging) + part * kStaging;
    if (threadIdx.x % kGroup == 0) wait_stores<1>();  // the one before the last read the same staging
    group_barrier(group);
    stage(later + part * kPairs, to);
    publish_shared();
    group_barrier(group);
    if (threadIdx.x % kGroup == 0) store_tile(y, to, first_token + (kAtOnce + part) * kPass, row);
  }
};

#endif  // HALFBYTE_WGMMA

}  // namespace halfbyte::cuda
