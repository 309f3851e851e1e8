// The end of the products of sm_90a that keep rows of the weight along M of wgmma: fp32 sums + bias +
// residual, rounded once, turned round in shared memory so that y [tokens, N] is written in lines. With the
// pieces of such a kernel that speak to a warpgroup.
#pragma once

#include "cluster.cuh"
#include "output.cuh"
#include "tma_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace halfbyte::cuda {

constexpr int kStaged = 64;                 // tokens whose results are turned round at a time
constexpr int kStaging = kStaged * 64 * 2;  // bytes of a warpgroup for that

#if HALFBYTE_WGMMA

constexpr int kGroup = 128;  // threads of a warpgroup

template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}
/// A barrier of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(kGroup) : "memory");
}

/// Four 8x8 matrices between the fragments of C, transposed, and rows of 16 bytes; lane l gives the address
/// of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ float2 floats_of(uint32_t pair, half_t) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
__device__ __forceinline__ float2 floats_of(uint32_t pair, bf16_t) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
}

/// To the place of `own` in block `rank` of the cluster.
__device__ __forceinline__ void store_at(uint4* own, int rank, uint4 v) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

/// Between blocks of a cluster that have each made a part of the same sums (fp32 or int32): a block gets a
/// share of the tokens, and of their sums what the others have made, added in a fixed order. `received` is
/// shared memory that no block of the cluster uses any more, (kSplits - 1) / kSplits of the size of all sums.
/// `way_to` gives what takes 16 bytes to places in another block, `wait` is until all that comes is there.
template <int kSplits, int kThreads, int kShare, typename V, typename WayTo, typename Wait>
__device__ __forceinline__ void exchange_sums(V (&total)[kShare], const V (&acc)[kShare * kSplits],
                                              char* received, const WayTo& way_to, const Wait& wait) {
  constexpr int kFours = kShare / 4;
  const int rank = cluster_rank();
  uint4* const slots = reinterpret_cast<uint4*>(received) + threadIdx.x;  // [kSplits - 1][kFours][kThreads]
  const auto slot = [&](int from, int to) { return (from < to ? from : from - 1) * kFours * kThreads; };
  V own[kShare];
#pragma unroll
  for (int to = 0; to < kSplits; ++to) {
    if (to == rank) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) own[i] = acc[to * kShare + i];
    } else {
      const auto send = way_to(slots + slot(rank, to), to);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        uint4 four;
        memcpy(&four, acc + to * kShare + i * 4, 16);
        send(i * kThreads, four);
      }
    }
  }
  wait();
#pragma unroll
  for (int i = 0; i < kShare; ++i) total[i] = V{};
#pragma unroll
  for (int from = 0; from < kSplits; ++from) {
    if (from == rank) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) total[i] += own[i];
    } else {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        V four[4];
        memcpy(four, slots + slot(from, rank) + i * kThreads, 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i * 4 + e] += four[e];
      }
    }
  }
}
/// The same where what is sent counts on the barrier `arrived` of each block, which has been told how many
/// bytes come and completes its first phase with them: a block waits for what it gets, not for what it sends.
template <int kSplits, int kThreads, int kShare, typename V>
__device__ __forceinline__ void exchange_sums(V (&total)[kShare], const V (&acc)[kShare * kSplits],
                                              char* received, uint32_t arrived) {
  exchange_sums<kSplits, kThreads>(
      total, acc, received,
      [&](uint4* own, int rank) {
        const uint32_t there = place_in(shared_address(own), rank), barrier = place_in(arrived, rank);
        return [=](int at, uint4 v) { store_counted(there + at * 16, v, barrier); };
      },
      [&] { wait_barrier(arrived, 0); });
}

/// Writes a warpgroup's sums of kTokens tokens from `first_token` and 64 rows of the weight from `first_row`:
/// 16-bit y. `whole_lines`: N is a multiple of 8, y and the residual lie on 16 bytes.
template <int kTokens, typename T>
__device__ __forceinline__ void write_sums(const Output<T>& out, int64_t tokens, bool whole_lines,
                                           const float (&acc)[kTokens / 2], char* staging, int group,
                                           int64_t first_row, int64_t first_token) {
  constexpr int kPass = kTokens < kStaged ? kTokens : kStaged;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, in_group = threadIdx.x % kGroup;
  float bias[2] = {};
  if (out.bias) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      bias[h] = out.bias_at(min(first_row + warp * 16 + lane / 4 + h * 8, out.n - 1));
  }
  // of the matrices this lane addresses: a token, 8 rows
  const int token = lane / 16 * 8 + lane % 8, rows8 = warp * 2 + lane / 8 % 2;
  const uint32_t matrices = shared_address(staging) + token * 128 + ((rows8 ^ (token & 7)) * 16);
  const int64_t row = first_row + in_group % 8 * 8;  // of the 16 bytes this lane reads and writes
  const int there = static_cast<int>(min(int64_t{8}, out.n - row));
#pragma unroll
  for (int part = 0; part < kTokens / kPass; ++part) {
    const int64_t from = first_token + part * kPass;
    const auto each_piece = [&](const auto& body) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < (kPass * 8 + kGroup - 1) / kGroup; ++i) {
        const int at = in_group / 8 + i * (kGroup / 8);
        const int64_t m = from + at;
        if (at < kPass && m < tokens && there > 0)
          body(m * out.n + row, reinterpret_cast<T*>(staging + at * 128 + ((in_group % 8 ^ (at & 7)) * 16)));
      }
    };
    if (out.residual) {
      each_piece([&](int64_t at, T* piece) {
        if (whole_lines) {
          *reinterpret_cast<uint4*>(piece) = *reinterpret_cast<const uint4*>(out.residual + at);
        } else {
          for (int i = 0; i < there; ++i) piece[i] = out.residual[at + i];
        }
      });
      group_barrier(group);
    }
#pragma unroll
    for (int j = 0; j < kPass / 16; ++j) {
      uint32_t r[4] = {};
      if (out.residual) load_transposed(r, matrices + j * 16 * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = part * (kPass / 2) + j * 8 + i * 2;
        float low = acc[e], high = acc[e + 1];
        if (out.bias) low += bias[i % 2], high += bias[i % 2];
        if (out.residual) {
          const float2 add = floats_of(r[i], T{});
          low += add.x, high += add.y;
        }
        r[i] = pair_of<T>(low, high);
      }
      store_transposed(matrices + j * 16 * 128, r);
    }
    group_barrier(group);
    each_piece([&](int64_t at, const T* piece) {
      if (whole_lines) {
        *reinterpret_cast<uint4*>(out.y + at) = *reinterpret_cast<const uint4*>(piece);
      } else {
        for (int i = 0; i < there; ++i) out.y[at + i] = piece[i];
      }
    });
    group_barrier(group);
  }
}

#endif  // HALFBYTE_WGMMA

}  // namespace halfbyte::cuda
