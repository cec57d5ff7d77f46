// Arguments of the CPU kernels of `layer_norm`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// total = x + residual, rounded; y = LayerNorm of its rows. Without a total x is normalized.
struct LayerNorm {
  Dtype dtype;
  bool wide_residual;                // the residual is float
  const void *x, *residual;          // (rows, d), rows x_stride and residual_stride apart
  void *total, *y;                   // (rows, d)
  const float *weight, *bias;        // (d,) or null
  int64_t rows, d, x_stride, residual_stride;
  double eps;
};

// The gradients, given dy and the total (or x). dtotal is added to dx; outputs not needed are null.
struct LayerNormBackward {
  Dtype dtype;
  const void *dy, *dtotal, *x;
  void* dx;
  const float* weight;
  float *dweight, *dbias;
  int64_t rows, d, dy_stride, dtotal_stride, x_stride;
  double eps;
};

}  // namespace fastdiff
