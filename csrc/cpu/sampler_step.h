// Arguments of the CPU kernel of `sampler_step`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// Applies a row of a sampler table to each of n images, updating x and history in place. An image is
// `runs` runs of `length` elements, stored one after the other in x, history and denoised. In the
// prediction (of type dtype), elements are `stride` apart, runs run_stride, images image_stride, and the
// learned variance starts variance_offset after the mean.
struct SamplerStep {
  Dtype dtype;
  bool learned;
  float* x;                // (n, runs, length)
  const void* prediction;  // any number of images
  float* history;          // (3, n, runs, length)
  const float* table;      // (rows, columns::COUNT)
  const int64_t* rows;     // (n,): a row of the table; -1: leave the image alone
  const int64_t* seeds;    // (n,)
  const int64_t* cond;     // (n,): index into the prediction; null: the image's own index
  const int64_t* uncond;   // (n,): index, or -1: not guided; null: no image is guided
  float* denoised;         // (n, runs, length) or null
  bool* finite;            // (n,) or null: cleared if the prediction is not finite
  float* log_prob;         // (n,) or null: the log-density of the noise; 0 without noise
  int64_t n, runs, length, image_stride, run_stride, stride, variance_offset;
  uint32_t stream;
};

// The columns of the table, with the names of kernels/sampler_step/table.py.
namespace columns {
enum Column {
  U, V, A, B, C1, C2, C3, S, P, Q, SLOT, W, CLAMP, LOGVAR_MIN, LOGVAR_MAX, NOISE_STEP, RESCALE,
  COUNT = 20
};
}  // namespace columns

}  // namespace fastdiff
