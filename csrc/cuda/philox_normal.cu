// Launcher of philox_normal.

#include "philox_normal.cuh"

#include "launch.cuh"

using namespace fastdiff;

/// z: (n, elements) fp32, dense and 16-byte aligned. step: an int64 on the device, or null to use
/// `number`.
FASTDIFF_EXPORT const char* fastdiff_cuda_philox_normal(int device, void* stream,
                                                        const int64_t* seeds, const int64_t* step,
                                                        int64_t number, int64_t noise_stream,
                                                        float* z, int64_t n, int64_t elements) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  const int64_t tiles = ceil_div(elements, 4 * kNormalThreads);
  return launch(philox_normals, grid_of(n * tiles), kNormalThreads, 0, target, seeds, step,
                uint32_t(number), uint32_t(noise_stream), z, elements, tiles);
}
