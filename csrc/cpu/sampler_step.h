// What the CPU kernel of `sampler_step` takes.
#pragma once

#include "kernels.h"

namespace fastdiff {

// A row of a sampler table for each of n images, in place on x and history. An image is `runs` runs of
// `length` numbers, one after the other in x, history and denoised; in the prediction (of type dtype)
// neighbours lie `stride` apart, runs run_stride, images image_stride, the learned variance
// variance_offset behind.
struct SamplerStep {
  Dtype dtype;
  bool learned;
  float* x;                // (n, runs, length)
  const void* prediction;  // images, in any number
  float* history;          // (3, n, runs, length)
  const float* table;      // (rows, columns::COUNT)
  const int64_t* rows;     // (n,): a row of the table; -1: the image is left alone
  const int64_t* seeds;    // (n,)
  const int64_t* cond;     // (n,): images of the prediction; null: the image's own number
  const int64_t* uncond;   // (n,): the same, -1: not guided; null: none is
  float* denoised;         // (n, runs, length) or null
  bool* finite;            // (n,) or null: cleared where the prediction is not finite
  int64_t n, runs, length, image_stride, run_stride, stride, variance_offset;
  uint32_t stream;
};

// The columns of the table, as kernels/sampler_step/table.py names them.
namespace columns {
enum Column {
  U, V, A, B, C1, C2, C3, S, P, Q, SLOT, W, CLAMP, LOGVAR_MIN, LOGVAR_MAX, NOISE_STEP, RESCALE,
  COUNT = 20
};
}  // namespace columns

}  // namespace fastdiff
