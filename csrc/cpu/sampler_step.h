// What the CPU kernels of `sampler_step` take.
#pragma once

#include "kernels.h"

namespace fastdiff {

// One row of a sampler table, in place on x and history. An image is `runs` runs of `length` numbers,
// one after the other in x and history; in the prediction (of type dtype) neighbours lie `stride`
// apart, runs run_stride, images image_stride, the learned variance variance_offset behind.
struct SamplerStep {
  Dtype dtype;
  bool guided, learned;
  float* x;                // (n, runs, length)
  const void* prediction;  // (n or 2 n images)
  float* history;          // (3, n, runs, length)
  const float* row;        // (16,)
  const int64_t* seeds;    // (n,)
  int64_t n, runs, length, image_stride, run_stride, stride, variance_offset, step;
  uint32_t stream;
  double rescale;
};

}  // namespace fastdiff
