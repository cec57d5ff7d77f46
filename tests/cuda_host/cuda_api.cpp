// The CUDA runtime for the emulated device.

#include "cuda_api.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>

namespace {

constexpr int kMultiprocessors = 132, kThreads = 2048, kRegisterFile = 65536;
constexpr size_t kShared = 227 * 1024, kFreely = 48 * 1024, kReserved = 1024;
constexpr unsigned kPortable = 8;

/// The limits that cudaFuncSetAttribute has raised for a kernel.
struct Leave {
  size_t shared = kFreely;
  bool large_clusters = false;
};
std::map<const void*, Leave>& leave() {
  static std::map<const void*, Leave> kernels;
  return kernels;
}

thread_local std::string fault;

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.x;
}

}  // namespace

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorLaunchFailure:
      return fault.c_str();
  }
  return "unrecognized error code";
}

static int times_asked = 0;

/// How often the compute capability of the device has been asked for.
extern "C" __attribute__((visibility("default"))) int emulation_times_asked() {
  return times_asked;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(kShared);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      ++times_asked;
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrClusterLaunch:
      *value = emulation::cluster_limit() > 1;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {0, 0, size_t{emulation::kStack}, 1024, emulation::kRegisters, 90, 90};
  return cudaSuccess;
}

cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  Dl_info info;
  *name = dladdr(kernel, &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "unknown";
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  if (what == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    leave()[kernel].large_clusters = value != 0;
    return cudaSuccess;
  }
  if (value < 0 || size_t(value) > kShared) return cudaErrorInvalidValue;
  leave()[kernel].shared = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared) {
  *blocks = 0;
  if (shared > leave()[kernel].shared) return cudaSuccess;
  const int by_shared = int((kShared + kReserved) / (shared + kReserved));
  const int by_registers = kRegisterFile / (emulation::kRegisters * threads);
  *blocks = std::min({32, kThreads / threads, by_shared, by_registers});
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const int blocks = int(cluster_of(*config));
  *clusters = 0;
  if (blocks > emulation::cluster_limit() ||
      (blocks > int(kPortable) && !leave()[kernel].large_clusters))
    return cudaErrorInvalidClusterSize;
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, int(config->blockDim.x),
                                                config->dynamicSmemBytes);
  if (blocks <= emulation::cluster_room()) *clusters = kMultiprocessors / blocks * resident;
  return cudaSuccess;
}

cudaError_t emulation::start(const cudaLaunchConfig_t& config, const void* kernel,
                             const std::function<void()>& body) {
  const unsigned cluster = cluster_of(config);
  const Leave& given = leave()[kernel];
  if (cluster > kPortable && !given.large_clusters) return cudaErrorInvalidClusterSize;
  if (config.dynamicSmemBytes > given.shared) return cudaErrorInvalidValue;
  try {
    run(config.gridDim, config.blockDim, config.dynamicSmemBytes, body, cluster);
  } catch (const Fault& caught) {
    fault = caught.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
