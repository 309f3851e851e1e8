// Tiles of a row-major matrix into shared memory by the copy engine of sm_90, and the barriers that tell when
// they are there. One thread asks for a tile, any thread waits for it.
#pragma once

#include <cuda.h>

#include "mma.cuh"

namespace halfbyte::cuda {

/// Describes x [rows, cols] of 16-bit or int8 elements, rows of a multiple of 16 bytes, 16-byte aligned, for
/// tiles of `tile_rows` x 128 bytes with the 128-byte swizzle. What a tile has outside of x is zero. libcuda
/// is not linked: the driver is asked through the runtime.
cudaError_t describe_tiles(CUtensorMap* map, DType dtype, const void* x, int64_t rows, int64_t cols,
                           int tile_rows);

/// The same for rows of 4-byte words, a multiple of 4 of them, which arrive as they are: a tile's rows
/// follow each other. Columns are words.
cudaError_t describe_words(CUtensorMap* map, const void* data, int64_t rows, int64_t words, int tile_rows,
                           int tile_words);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// `barrier` is the shared address of 8 bytes; `arrivals` complete a phase, together with the bytes expected.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// After the barriers were set up, by the thread that did it; a block barrier follows.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Until the phase of this parity is complete: phases count from 0.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// Has the description at hand when the first tile is asked for.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}
/// The tile at (row, column) of the matrix; counts on the barrier.
__device__ __forceinline__ void fetch_tile(uint32_t shared, const CUtensorMap& map, int row, int column,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
/// The same for what will not be read again: it is the first to leave L2.
__device__ __forceinline__ void fetch_tile_once(uint32_t shared, const CUtensorMap& map, int row, int column,
                                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(once_policy())
      : "memory");
}
/// fetch_tile() into every block of the cluster that has its bit in `blocks`, at the same place, counting on
/// its own barrier at the same place.
__device__ __forceinline__ void fetch_tile_for(uint32_t shared, const CUtensorMap& map, int row, int column,
                                               uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
/// The tile in shared memory to (row, column) of the matrix, of which what is outside is not written. The
/// tile may be written again after wait_stores() by the same thread.
__device__ __forceinline__ void store_tile(const CUtensorMap& map, uint32_t shared, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;\n" ::"l"(&map),
      "r"(shared), "r"(column), "r"(row)
      : "memory");
}
/// Until all but the `pending` last stores of this thread have read their tiles.
template <int pending>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(pending) : "memory");
}
/// After a thread has written shared memory that the copy engine or wgmma read; a barrier follows.
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
/// What this block has at `own` in shared memory, in block `rank` of the cluster.
__device__ __forceinline__ uint32_t place_in(uint32_t own, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  return there;
}
/// 16 bytes to another block of the cluster; they count on a barrier there. Both as place_in() says.
__device__ __forceinline__ void store_counted(uint32_t there, uint4 v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::
          "r"(there),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}
/// At the barrier at this place in block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
#endif

}  // namespace halfbyte::cuda
