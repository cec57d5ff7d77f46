// Thread-block clusters (sm_90 and up): neighboring blocks of a grid that run at the same time and
// can read each other's shared memory. Kernels that use them are also compiled for older GPUs, where
// they trap; launch_cluster does not start them there.
//
// The barrier is split in two. Between `cluster_arrive` and `cluster_wait` a thread may do work that
// other threads do not depend on. Writes before a thread's arrive are visible to all threads after
// their wait. A block must not exit before the last read of its memory: arrive after reading, and
// wait at the end.

#pragma once

#include "common.cuh"

namespace fastdiff {

#ifdef FASTDIFF_EMULATE_CUDA

inline int cluster_rank() { return emulation::view.rank; }
inline int cluster_blocks() { return emulation::view.ranks; }
using emulation::cluster_arrive;
using emulation::cluster_wait;

inline float cluster_load(const float* own, int rank) {
  return *static_cast<const float*>(emulation::map_shared(own, rank));
}

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// The block's rank in its cluster, 0 to cluster_blocks() - 1.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}

/// Every thread of the cluster must call both.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

/// Reads the shared memory of block `rank` at the address that is `own` in this block.
__device__ __forceinline__ float cluster_load(const float* own, int rank) {
  const unsigned mine = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned theirs;
  float x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(theirs) : "memory");
  return x;
}

#else

__device__ __forceinline__ int cluster_rank() {
  __trap();
  return 0;
}
__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ float cluster_load(const float* own, int) { return *own; }

#endif

}  // namespace fastdiff
