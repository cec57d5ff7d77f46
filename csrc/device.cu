// Whether a device can run this library's kernels at all.

#include "launch.cuh"

namespace {
__global__ void __launch_bounds__(fastdiff::kWarpSize) any_kernel() {}
}  // namespace

/// Null where it can; else what CUDA says: the driver is too old, there is no code for the device.
FASTDIFF_EXPORT const char* fastdiff_cuda_usable(int device) {
  FASTDIFF_TRY(fastdiff::select_device({device, nullptr}));
  return fastdiff::kernel_image(reinterpret_cast<const void*>(any_kernel));
}
