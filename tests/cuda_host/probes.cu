// Kernels that test the emulation: right ones, and the same with a fault it must show.

#include <cstring>

#include "launch.cuh"

using namespace fastdiff;

namespace {

constexpr int kThreads = 64;

/// data[i] = data[63 - i] through shared memory, with or without the barrier between.
__global__ void reversed(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  kept[i] = data[i];
  if (barrier) __syncthreads();
  const float mirrored = kept[kThreads - 1 - i];
  __syncthreads();
  data[i] = mirrored;
}

/// The same inside each warp, with or without __syncwarp.
__global__ void reversed_in_warps(float* data, bool barrier) {
  FASTDIFF_SHARED(float, kept, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  kept[i] = data[i];
  if (barrier) __syncwarp();
  data[i] = kept[i ^ (kWarpSize - 1)];
}

/// A second round of writes before all have read the first.
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
  kept[threadIdx.x] = data[threadIdx.x];  // the launch gives 63 floats
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

/// Blocks must not depend on each other: the last one to run wins.
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
  return "no such probe";
}
