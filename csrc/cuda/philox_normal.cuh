// Normal noise for a batch of images. Bytes: N elements * 4 out.

#pragma once

#include "normal.cuh"

namespace fastdiff {

constexpr int kNormalThreads = 256;

/// z: (N, elements). The step is *step, or `number` if `step` is null. A thread computes four numbers
/// and stores them at once. Grid: N * ceil(elements / (4 * kNormalThreads)).
__global__ void __launch_bounds__(kNormalThreads)
    philox_normals(const int64_t* seeds, const int64_t* step, uint32_t number, uint32_t stream,
                   float* z, int64_t elements, int64_t tiles) {
  const int64_t image = blockIdx.x / tiles;
  const int64_t block = blockIdx.x % tiles * kNormalThreads + threadIdx.x;
  const int64_t first = 4 * block;
  if (first >= elements) return;
  const NormalKey key{static_cast<uint64_t>(seeds[image]),
                      step == nullptr ? number : static_cast<uint32_t>(*step), stream};
  float out[4];
  normals_of_block(key, static_cast<uint64_t>(block), out);
  float* to = z + image * elements + first;
  if (elements % 4 == 0) {
    store_pack<float, 4>(to, pack_of<float, 4>(out));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < elements) to[i] = out[i];
  }
}

}  // namespace fastdiff
