// Host side of the CUDA kernels: starting a kernel, limits of the device, errors as text.

#pragma once

#include <cstdio>

#include "common.cuh"

namespace fastdiff {

/// What every launcher takes: where to run. All launchers return null or what went wrong.
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

/// A grid. More blocks than 32 bits count stay too many, so that the launch is refused.
inline dim3 grid_of(int64_t x, int64_t y = 1) {
  const auto clamped = [](int64_t blocks) {
    return blocks < 0xffffffff ? static_cast<unsigned>(blocks) : 0xffffffffu;
  };
  return dim3(clamped(x), clamped(y));
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

#ifdef FASTDIFF_EMULATE_CUDA

inline int64_t shared_limit(int) { return 227 * 1024; }
inline int cluster_limit(int) { return emulation::cluster_limit(); }
inline const char* active_clusters(const Target&, const void*, int cluster, int, size_t,
                                   int* count) {
  *count = cluster <= emulation::cluster_room();
  return nullptr;
}

inline const char* select_device(const Target&) { return nullptr; }

struct CurrentDevice {
  const char* error = nullptr;
  explicit CurrentDevice(const Target&) {}
};

template <typename... P, typename... A>
const char* launch_cluster(void (*kernel)(P...), dim3 grid, int cluster, int threads,
                           size_t shared, const Target&, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  try {
    emulation::run(grid, dim3(threads), shared, [&] { kernel(arguments...); },
                   static_cast<unsigned>(cluster));
  } catch (const emulation::Fault& fault) {
    return keep_message(fault.what());
  }
  return nullptr;
}

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                   const Target& target, A... arguments) {
  return launch_cluster(kernel, grid, 1, threads, shared, target, arguments...);
}

#else

inline const char* message_of(cudaError_t status) {
  return status == cudaSuccess ? nullptr : keep_message(cudaGetErrorString(status));
}

/// Bytes of shared memory that one block can have on a device.
inline int64_t shared_limit(int device) {
  int bytes = 48 * 1024;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

/// Blocks that a cluster may have on a device; 1 where there are no clusters. More than 8 are not
/// portable: whether a kernel can have them, `active_clusters` tells.
inline int cluster_limit(int device) {
  int clusters = 0;
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  return clusters ? 16 : 1;
}

/// torch and this library have their own runtimes: both must mean the same device.
inline const char* select_device(const Target& target) {
  return message_of(cudaSetDevice(target.device));
}

/// Makes a device the current one and, in the end, the one before.
class CurrentDevice {
 public:
  const char* error;

  explicit CurrentDevice(const Target& target) : error(message_of(cudaGetDevice(&before_))) {
    if (error == nullptr) error = select_device(target);
  }
  ~CurrentDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  int before_ = -1;
};

/// Lets a kernel have so much dynamic shared memory. The leave is the current device's.
inline const char* allow_shared(const void* kernel, size_t shared) {
  if (shared <= 48 * 1024) return nullptr;
  return message_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared)));
}

/// The launch of a kernel in clusters of blocks that are neighbours along x.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(dim3 grid, int cluster, int threads, size_t shared, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points into it

  static const char* allow(const void* kernel, int cluster, size_t shared) {
    if (const char* error = allow_shared(kernel, shared)) return error;
    if (cluster <= 8) return nullptr;
    return message_of(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
};

/// How many clusters of a kernel the device has room for at a time; 0: it cannot run one.
inline const char* active_clusters(const Target& target, const void* kernel, int cluster,
                                   int threads, size_t shared, int* count) {
  *count = 0;
  if (const char* error = ClusterLaunch::allow(kernel, cluster, shared)) return error;
  const ClusterLaunch launch(dim3(cluster), cluster, threads, shared, target.stream);
  return message_of(cudaOccupancyMaxActiveClusters(count, kernel, &launch.config));
}

template <typename... P, typename... A>
const char* launch_cluster(void (*kernel)(P...), dim3 grid, int cluster, int threads,
                           size_t shared, const Target& target, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (const char* error = ClusterLaunch::allow(address, cluster, shared)) return error;
  const ClusterLaunch launch(grid, cluster, threads, shared, target.stream);
  return message_of(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                   const Target& target, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (const char* error = allow_shared(reinterpret_cast<const void*>(kernel), shared))
    return error;
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(target.stream)>>>(arguments...);
  return message_of(cudaGetLastError());
}

#endif

/// Calls `work(T{})` with the element type of a code; an error for another code.
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

/// Leaves the function with the error of a launch, if there is one.
#define FASTDIFF_TRY(call)                        \
  do {                                            \
    if (const char* fastdiff_error = (call)) return fastdiff_error; \
  } while (0)
