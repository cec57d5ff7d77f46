// Kernels that run the device functions of csrc/cuda/normal.cuh on chosen arguments.

#include "normal.cuh"

#include "launch.cuh"

using namespace fastdiff;

namespace {

constexpr int kThreads = 256;

/// in: (n, 6), the counter and the key; out: (n, 4).
__global__ void words_of(const uint32_t* in, uint32_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  in += 6 * i;
  const Words words = philox4x32({{in[0], in[1], in[2], in[3]}}, in[4], in[5]);
  for (int k = 0; k < 4; ++k) out[4 * i + k] = words.w[k];
}

/// out: (6, n), the high and low parts of radius, cos and sin for every k < n.
__global__ void parts_of(float* out, int64_t n) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < n;
       k += threads) {
    const TwoPart r = normal_radius(static_cast<int>(k));
    TwoPart across, up;
    normal_circle(static_cast<int>(k), across, up);
    const float parts[6] = {r.high, r.low, across.high, across.low, up.high, up.low};
    for (int i = 0; i < 6; ++i) out[i * n + k] = parts[i];
  }
}

}  // namespace

FASTDIFF_EXPORT const char* emulation_philox_words(const uint32_t* in, uint32_t* out, int64_t n) {
  return launch(words_of, grid_of(ceil_div(n, kThreads)), kThreads, 0, Target{}, in, out, n);
}

FASTDIFF_EXPORT const char* emulation_normal_parts(float* out, int64_t n) {
  return launch(parts_of, dim3(64), kThreads, 0, Target{}, out, n);
}
