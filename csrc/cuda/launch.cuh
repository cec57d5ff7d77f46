// Host side of the CUDA kernels: launches, device limits, errors as text.

#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "common.cuh"
#ifdef FASTDIFF_EMULATE_CUDA
#include "cuda_api.h"
#endif

namespace fastdiff {

/// Where to run; every launcher takes one. All launchers return null or an error message.
struct Target {
  int device;
  void* stream;
};

inline const char* keep_message(const char* text) {
  static thread_local char message[512];
  std::snprintf(message, sizeof message, "%s", text);
  return message;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A grid. A block count beyond 32 bits is clamped, so that the launch is still refused.
inline dim3 grid_of(int64_t x, int64_t y = 1) {
  const auto clamped = [](int64_t blocks) {
    return blocks < 0xffffffff ? static_cast<unsigned>(blocks) : 0xffffffffu;
  };
  return dim3(clamped(x), clamped(y));
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Whether every row of a tensor is aligned to 16 bytes.
template <typename T>
bool rows_aligned(const void* p, int64_t stride) {
  return aligned16(p) && stride * int64_t(sizeof(T)) % 16 == 0;
}

/// Null or the error's text. Clears the error, so that the next call does not report it again.
inline const char* message_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return keep_message(cudaGetErrorString(status));
}

/// torch and this library have separate CUDA runtimes, which must agree on the device. kernels/cuda
/// lets torch select it around every call and restore the previous one afterwards, for both.
inline const char* select_device(const Target& target) {
  return message_of(cudaSetDevice(target.device));
}

/// Most bytes of shared memory per block on a device.
inline const char* shared_limit(int device, int64_t* bytes) {
  int value = 0;
  const auto status =
      cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = value;
  return message_of(status);
}

/// Most blocks per cluster on a device; 1 if it has no clusters. More than 8 are not portable: call
/// `active_clusters` to find out whether a kernel can have them.
inline const char* cluster_limit(int device, int* blocks) {
  int clusters = 0;
  const auto status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  *blocks = clusters ? 16 : 1;
  return message_of(status);
}

/// Null if the current device can run a kernel: the driver is new enough for this runtime, and the
/// library has code for the device.
inline const char* kernel_image(const void* kernel) {
  cudaFuncAttributes attributes;
  return message_of(cudaFuncGetAttributes(&attributes, kernel));
}

/// How to launch a kernel, and the attributes it needs for that. Attributes belong to the current
/// device, so they are set for every launch. None of this is a stream operation: while a graph is
/// captured, only the launch itself becomes part of it.
struct LaunchConfig {
  cudaLaunchAttribute cluster_size{};
  cudaLaunchConfig_t config{};

  LaunchConfig(dim3 grid, int cluster, int threads, size_t shared, const Target& target) {
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(target.stream);
    cluster_size.id = cudaLaunchAttributeClusterDimension;
    cluster_size.val.clusterDim.x = static_cast<unsigned>(cluster);
    cluster_size.val.clusterDim.y = cluster_size.val.clusterDim.z = 1;
    config.attrs = &cluster_size;
    config.numAttrs = cluster > 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into it

  const char* allow(const void* kernel) const {
    const auto set = [kernel](cudaFuncAttribute what, size_t value) {
      return message_of(cudaFuncSetAttribute(kernel, what, static_cast<int>(value)));
    };
    if (config.dynamicSmemBytes > 48 * 1024)
      if (const char* error =
              set(cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes))
        return error;
    if (config.numAttrs == 0 || cluster_size.val.clusterDim.x <= 8) return nullptr;
    return set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

/// How many clusters of a kernel can be resident on the device at a time; 0: it cannot run one.
inline const char* active_clusters(const Target& target, const void* kernel, int cluster,
                                   int threads, size_t shared, int* count) {
  *count = 0;
  const LaunchConfig launch(dim3(cluster), cluster, threads, shared, target);
  if (const char* error = launch.allow(kernel)) return error;
  const auto status = cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
  if (status == cudaErrorInvalidClusterSize) {  // some GPUs support at most 8
    cudaGetLastError();
    *count = 0;
    return nullptr;
  }
  return message_of(status);
}

/// A launch and the resources it uses, as reported by the CUDA runtime. The fields are those of `Launch`
/// in fastdiff/bench/watch.py, in the same order.
struct Seen {
  std::string kernel;  // mangled
  int64_t blocks, threads, cluster;
  int64_t registers, stack, fixed_shared, shared;  // stack: per thread, including spilled registers
  int64_t binary;                                  // architecture, 90 for sm_90
  int64_t resident, clusters;                      // blocks per SM, clusters on the device
  int64_t multiprocessors, most_threads;           // of the device; per SM
};

/// Records the launches of this thread while it is on.
struct Watch {
  bool on = false, starts = true;
  std::vector<Seen> seen;

  const char* note(const void* kernel, const LaunchConfig& launch, const Target& target) {
    if (!on) return nullptr;
    const cudaLaunchConfig_t& config = launch.config;
    const int threads = static_cast<int>(config.blockDim.x);
    const int cluster = config.numAttrs ? int(launch.cluster_size.val.clusterDim.x) : 1;
    cudaFuncAttributes attributes{};
    int resident = 0, clusters = 0, multiprocessors = 0, most = 0;
    const char* name = "unknown";
    for (const cudaError_t status : {
             cudaFuncGetAttributes(&attributes, kernel),
             cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                           config.dynamicSmemBytes),
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12030
             cudaFuncGetName(&name, kernel),
#endif
             cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                    target.device),
             cudaDeviceGetAttribute(&most, cudaDevAttrMaxThreadsPerMultiProcessor, target.device),
         })
      if (const char* error = message_of(status)) return error;
    if (cluster > 1)
      if (const char* error = active_clusters(target, kernel, cluster, threads,
                                              config.dynamicSmemBytes, &clusters))
        return error;
    const dim3& grid = config.gridDim;
    seen.push_back({name, int64_t(grid.x) * grid.y * grid.z, threads, cluster, attributes.numRegs,
                    int64_t(attributes.localSizeBytes), int64_t(attributes.sharedSizeBytes),
                    int64_t(config.dynamicSmemBytes), attributes.binaryVersion, resident, clusters,
                    multiprocessors, most});
    return nullptr;
  }
};

inline Watch& watch() {
  static thread_local Watch of_this_thread;
  return of_this_thread;
}

template <typename... P, typename... A>
const char* launch_cluster(void (*kernel)(P...), dim3 grid, int cluster, int threads,
                           size_t shared, const Target& target, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  const LaunchConfig launch(grid, cluster, threads, shared, target);
  const auto entry = reinterpret_cast<const void*>(kernel);
  if (const char* error = launch.allow(entry)) return error;
  if (const char* error = watch().note(entry, launch, target)) return error;
  if (!watch().starts) return nullptr;
  return message_of(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

/// Launches a kernel; returns null or an error message.
template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                   const Target& target, A... arguments) {
  return launch_cluster(kernel, grid, 1, threads, shared, target, arguments...);
}

/// Calls `work(T{})` with the element type of a code; returns an error for an unsupported code.
template <typename Work>
const char* with_dtype(int dtype, Work work) {
  switch (dtype) {
    case kFloat32:
      return work(float{});
    case kFloat16:
      return work(half{});
    case kBFloat16:
      return work(bfloat16{});
    default:
      return keep_message("dtype must be fp32, fp16 or bf16");
  }
}

}  // namespace fastdiff

/// Returns from the function with the error of `call`, if there is one.
#define FASTDIFF_TRY(call)                        \
  do {                                            \
    if (const char* fastdiff_error = (call)) return fastdiff_error; \
  } while (0)
