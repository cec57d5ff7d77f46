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

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// So many blocks; a number beyond what a grid can have becomes one that the launch refuses.
inline dim3 grid_of(int64_t blocks) {
  return dim3(blocks > 0x7fffffff ? 0xffffffffu : unsigned(blocks));
}

/// True where every row of a tensor begins at a multiple of 16 bytes.
template <typename T>
bool rows_aligned(const void* p, int64_t stride) {
  return aligned16(p) && stride * int64_t(sizeof(T)) % 16 == 0;
}

#ifdef FASTDIFF_EMULATE_CUDA

constexpr int64_t kStaticShared = 4096;

inline int64_t shared_limit(int) { return 227 * 1024; }

inline const char* select_device(const Target&) { return nullptr; }

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, const Target&,
                   A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  try {
    emulation::run(grid, dim3(threads), shared, [&] { kernel(arguments...); });
  } catch (const emulation::Fault& fault) {
    return keep_message(fault.what());
  }
  return nullptr;
}

#else

constexpr int64_t kStaticShared = 4096;  // room left for what kernels declare with a fixed size

inline const char* message_of(cudaError_t status) {
  return status == cudaSuccess ? nullptr : keep_message(cudaGetErrorString(status));
}

/// Bytes of shared memory that one block can have on a device.
inline int64_t shared_limit(int device) {
  int bytes = 48 * 1024;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

/// torch and this library have their own runtimes: both must mean the same device.
inline const char* select_device(const Target& target) {
  return message_of(cudaSetDevice(target.device));
}

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                   const Target& target, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (shared > 48 * 1024) {
    const char* error = message_of(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared)));
    if (error != nullptr) return error;
  }
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
