// Arguments of the CPU kernels of `ada_layer_norm`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// y = n^ (1 + scale) + shift, where n^ is x normalized over rows of d; scale and shift per sample.
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
