// Kernels that test the emulation: correct ones, and variants with a fault that it must detect.

#include <cstring>

#include "cluster.cuh"
#include "launch.cuh"

using namespace fastdiff;

namespace {

constexpr int kThreads = 64;

/// data[i] = data[63 - i] through shared memory, with or without the required barrier.
__global__ void reversed(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  kept[i] = data[i];
  if (barrier) __syncthreads();
  const float mirrored = kept[kThreads - 1 - i];
  __syncthreads();
  data[i] = mirrored;
}

/// As `reversed`, within each warp, with or without __syncwarp.
__global__ void reversed_in_warps(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  kept[i] = data[i];
  if (barrier) __syncwarp();
  data[i] = kept[i ^ (kWarpSize - 1)];
}

/// Without the barrier, a second round of writes begins before all threads have read the first.
__global__ void reused(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 1; round <= 2; ++round) {
    kept[i] = data[i] * static_cast<float>(round);
    __syncthreads();
    sum += kept[kThreads - 1 - i];
    if (barrier) __syncthreads();
  }
  __syncthreads();
  data[i] = sum;
}

__global__ void divergent(float* data) {
  if (threadIdx.x < 40) __syncthreads();
  data[threadIdx.x] = 0;
}

__global__ void two_barriers(float* data) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  data[threadIdx.x] = 0;
}

__global__ void divergent_shuffle(float* data) {
  float x = data[threadIdx.x];
  if (threadIdx.x % 2) x = __shfl_xor_sync(kAllLanes, x, 1);
  data[threadIdx.x] = x;
}

__global__ void beyond_global(float* data, int n) {
  if (threadIdx.x == 0) data[n] = 0;
}

__global__ void beyond_shared(float* data) {
  FASTDIFF_SHARED(float, kept, kThreads);
  kept[threadIdx.x + 1] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = kept[threadIdx.x];
}

__global__ void beyond_dynamic(float* data) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  float* kept = reinterpret_cast<float*>(memory);
  kept[threadIdx.x] = data[threadIdx.x];  // the launch allocates 63 floats
}

__global__ void misaligned(float* data) {
  store_pack<float, 4>(data + 1, Pack<float, 4>{});
}

__global__ void unwritten(float* data) {
  FASTDIFF_SHARED(float, kept, kThreads);
  data[threadIdx.x] = kept[threadIdx.x];
}

__global__ void warp_numbers(float* data) {
  const int i = static_cast<int>(threadIdx.x);
  const float sum = warp_sum(data[i]);
  const unsigned odd = __ballot_sync(kAllLanes, i % 2);
  const float first = __shfl_sync(kAllLanes, data[i], 5);
  data[i] = i % 3 == 0 ? sum : i % 3 == 1 ? static_cast<float>(odd == 0xaaaaaaaau) : first;
}

/// As `reversed`, by two blocks of one warp, each of which reads the other's shared memory (static
/// or dynamic). Without `farewell`, a block may end while the other still reads.
__global__ void reversed_in_clusters(float* data, bool dynamic, bool barrier, bool farewell) {
  FASTDIFF_SHARED(float, fixed, kWarpSize);
  FASTDIFF_DYNAMIC_SHARED(memory);
  float* kept = dynamic ? reinterpret_cast<float*>(memory) : fixed;
  const int i = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * kWarpSize + i;
  kept[i] = data[at];
  if (barrier) {
    cluster_arrive();
    cluster_wait();
  }
  data[at] = cluster_load(kept + kWarpSize - 1 - i, 1 - cluster_rank());
  if (!farewell) return;
  cluster_arrive();
  cluster_wait();
}

/// As `reused`, by two blocks.
__global__ void reused_in_clusters(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kWarpSize);
  const int i = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * kWarpSize + i;
  float sum = 0;
  for (int round = 1; round <= 2; ++round) {
    kept[i] = data[at] * static_cast<float>(round);
    cluster_arrive();
    cluster_wait();
    sum += cluster_load(kept + kWarpSize - 1 - i, 1 - cluster_rank());
    if (!barrier && round == 1) continue;
    cluster_arrive();
    cluster_wait();
  }
  data[at] = sum;
}

__global__ void divergent_cluster(float* data) {
  if (cluster_rank() == 0) {
    cluster_arrive();
    cluster_wait();
  }
  data[threadIdx.x] = 0;
}

__global__ void two_cluster_barriers(float* data) {
  if (cluster_rank() == 0)
    cluster_arrive();
  else
    cluster_arrive();
  cluster_wait();
  data[threadIdx.x] = 0;
}

__global__ void mixed_barriers(float* data) {
  if (cluster_rank() == 0) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
    cluster_wait();
  }
  data[threadIdx.x] = 0;
}

__global__ void halves_of_a_barrier(float* data, int arrivals, int waits) {
  for (int i = 0; i < arrivals; ++i) cluster_arrive();
  for (int i = 0; i < waits; ++i) cluster_wait();
  data[threadIdx.x] = 0;
}

/// Reads the shared memory of a rank, or with `global` an address that is not in shared memory.
__global__ void mapped(float* data, int rank, bool global) {
  FASTDIFF_SHARED(float, kept, kWarpSize);
  kept[threadIdx.x] = 0;
  cluster_arrive();
  cluster_wait();
  data[threadIdx.x] = cluster_load(global ? data : kept + threadIdx.x, rank);
}

/// Uses an address in the other block's memory after that block has ended (in forward order).
__global__ void beyond_the_end(float* data) {
  FASTDIFF_SHARED(float, kept, kWarpSize);
  kept[threadIdx.x] = 1;
  const auto* other = static_cast<const float*>(emulation::map_shared(kept, 0));
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 1) data[threadIdx.x] = other[threadIdx.x];
}

__global__ void cluster_numbers(float* data) {
  data[blockIdx.x] = static_cast<float>(10 * cluster_blocks() + cluster_rank());
}

/// Depends on the order of blocks, which kernels must not: the last one to run wins.
__global__ void block_numbers(float* data) { data[0] = static_cast<float>(blockIdx.x); }

}  // namespace

FASTDIFF_EXPORT const char* emulation_probe(const char* name, float* data, int n) {
  const Target target{0, nullptr};
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const dim3 one(1);
  if (is("reversed")) return launch(reversed, one, kThreads, 0, target, data, true);
  if (is("reversed, no barrier")) return launch(reversed, one, kThreads, 0, target, data, false);
  if (is("in warps")) return launch(reversed_in_warps, one, kThreads, 0, target, data, true);
  if (is("in warps, no barrier"))
    return launch(reversed_in_warps, one, kThreads, 0, target, data, false);
  if (is("reused")) return launch(reused, one, kThreads, 0, target, data, true);
  if (is("reused, no barrier")) return launch(reused, one, kThreads, 0, target, data, false);
  if (is("divergent")) return launch(divergent, one, kThreads, 0, target, data);
  if (is("two barriers")) return launch(two_barriers, one, kThreads, 0, target, data);
  if (is("divergent shuffle")) return launch(divergent_shuffle, one, kThreads, 0, target, data);
  if (is("beyond global")) return launch(beyond_global, one, kThreads, 0, target, data, n);
  if (is("beyond shared")) return launch(beyond_shared, one, kThreads, 0, target, data);
  if (is("beyond dynamic")) return launch(beyond_dynamic, one, kThreads, 63 * 4, target, data);
  if (is("misaligned")) return launch(misaligned, one, kThreads, 0, target, data);
  if (is("unwritten")) return launch(unwritten, one, kThreads, 0, target, data);
  if (is("warp numbers")) return launch(warp_numbers, one, kThreads, 0, target, data);
  if (is("block numbers")) return launch(block_numbers, dim3(5), kThreads, 0, target, data);
  if (is("33 threads")) return launch(divergent, one, 33, 0, target, data);
  if (is("too much shared")) return launch(unwritten, one, kThreads, 300 * 1024, target, data);
  if (is("grid too high")) return launch(divergent, dim3(1, 70000), kThreads, 0, target, data);
  if (is("grid beyond 32 bits"))
    return launch(divergent, grid_of((int64_t{1} << 32) + 1), kThreads, 0, target, data);

  const dim3 two(2);
  const size_t bytes = kWarpSize * sizeof(float);
  const auto clusters = [&](auto kernel, auto... rest) {
    return launch_cluster(kernel, two, 2, kWarpSize, bytes, target, data, rest...);
  };
  if (is("in clusters")) return clusters(reversed_in_clusters, false, true, true);
  if (is("in clusters, no barrier")) return clusters(reversed_in_clusters, false, false, true);
  if (is("in dynamic clusters")) return clusters(reversed_in_clusters, true, true, true);
  if (is("in dynamic clusters, no barrier"))
    return clusters(reversed_in_clusters, true, false, true);
  if (is("in clusters, no farewell")) return clusters(reversed_in_clusters, false, true, false);
  if (is("reused in clusters")) return clusters(reused_in_clusters, true);
  if (is("reused in clusters, no barrier")) return clusters(reused_in_clusters, false);
  if (is("divergent cluster")) return clusters(divergent_cluster);
  if (is("two cluster barriers")) return clusters(two_cluster_barriers);
  if (is("mixed barriers")) return clusters(mixed_barriers);
  if (is("wait without arrive")) return clusters(halves_of_a_barrier, 0, 1);
  if (is("arrive without wait")) return clusters(halves_of_a_barrier, 1, 0);
  if (is("arrive twice")) return clusters(halves_of_a_barrier, 2, 1);
  if (is("no such rank")) return clusters(mapped, 2, false);
  if (is("not shared")) return clusters(mapped, 0, true);
  if (is("beyond the end")) return clusters(beyond_the_end);
  if (is("cluster numbers"))
    return launch_cluster(cluster_numbers, dim3(6), 3, kWarpSize, 0, target, data);
  if (is("ragged clusters"))
    return launch_cluster(cluster_numbers, dim3(7), 3, kWarpSize, 0, target, data);
  if (is("cluster too large"))
    return launch_cluster(cluster_numbers, dim3(32), 32, kWarpSize, 0, target, data);
  return "no such probe";
}
