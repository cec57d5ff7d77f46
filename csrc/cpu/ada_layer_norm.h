// What the CPU kernels of `ada_layer_norm` take.
#pragma once

#include "kernels.h"

namespace fastdiff {

// y = n^ (1 + scale) + shift, n^ the normalised rows of d numbers of x; scale and shift per sample.
struct AdaLayerNorm {
  Dtype dtype;
  const void* x;  // (n, length, d), rows x_stride apart
  void* y;        // dense
  const float *scale, *shift;  // (n, d)
  int64_t n, length, d, x_stride;
  double eps;
};

struct AdaLayerNormBackward {
  Dtype dtype;
  const void *dy, *x;
  void* dx;            // dense
  const float* scale;  // (n, d)
  float *dscale, *dshift;
  int64_t n, length, d, dy_stride, x_stride;
  double eps;
};

}  // namespace fastdiff
