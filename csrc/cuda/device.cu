// Whether a device can run this library's kernels at all, and what resources their launches use.

#include "launch.cuh"

namespace {
__global__ void __launch_bounds__(fastdiff::kWarpSize) any_kernel() {}
}  // namespace

/// Null if it can; else CUDA's error: the driver is too old, or there is no code for the device.
FASTDIFF_EXPORT const char* fastdiff_cuda_usable(int device) {
  FASTDIFF_TRY(fastdiff::select_device({device, nullptr}));
  return fastdiff::kernel_image(reinterpret_cast<const void*>(any_kernel));
}

/// Starts recording this thread's launches, discarding earlier records; with `starts` = 0 the kernels
/// are not started. `on` = 0 stops recording.
FASTDIFF_EXPORT const char* fastdiff_cuda_watch(int on, int starts) {
  auto& watch = fastdiff::watch();
  watch.on = on != 0;
  watch.starts = !watch.on || starts != 0;
  watch.seen.clear();
  return nullptr;
}

/// The recorded launch with a given number: its kernel's mangled name, truncated to `size` bytes
/// including the final 0, and the 12 integers of `Seen`. The name is empty after the last launch.
FASTDIFF_EXPORT const char* fastdiff_cuda_seen(int64_t number, int64_t size, void* name,
                                               int64_t* fields) {
  const auto& all = fastdiff::watch().seen;
  const bool there = number >= 0 && number < int64_t(all.size());
  std::snprintf(static_cast<char*>(name), size_t(size), "%s",
                there ? all[size_t(number)].kernel.c_str() : "");
  if (!there) return nullptr;
  const auto& [kernel, blocks, threads, cluster, registers, stack, fixed, shared, binary, resident,
               clusters, multiprocessors, most] = all[size_t(number)];
  const int64_t values[] = {blocks, threads,  cluster,  registers,       stack, fixed, shared,
                            binary, resident, clusters, multiprocessors, most};
  for (const int64_t value : values) *fields++ = value;
  return nullptr;
}
