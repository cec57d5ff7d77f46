// What the CPU kernels of `group_norm_silu` take.
#pragma once

#include "kernels.h"

namespace fastdiff {

// total = x + channel_add + residual, rounded; y = activation(n^ factor + offset) with n^ the total
// normalised over the groups, factor = weight (1 + scale), offset = bias (1 + scale) + shift.
// x, residual, total, y: (n, c, space), or (n, space, c) if channels_last. Without a total there is
// nothing to add and x is normed. What may be left out is null.
struct GroupNorm {
  Dtype dtype;
  bool channels_last, silu, wide_residual;  // wide_residual: it is float
  const void *x, *residual;
  const float* channel_add;    // (n, c), or (c,) with a stride of 0
  int64_t channel_add_stride;  // from sample to sample
  void *total, *y;
  const float *weight, *bias, *scale_shift;  // (c,), (c,), (n, 2 c)
  float* stats;                // (n, groups, 3): mean, its digits below fp32, 1 / deviation
  int64_t n, c, groups, space;
  double eps;
};

// The gradients, from dy, the total (or x) and its stats. dtotal is added to dx; dchannel is the sum of
// dx over space.
struct GroupNormBackward {
  Dtype dtype;
  bool channels_last, silu;
  const void *dy, *dtotal, *x;
  void* dx;
  const float *weight, *bias, *scale_shift, *stats;
  float *dweight, *dbias, *dscale_shift, *dchannel;  // (c,), (c,), (n, 2 c), (n, c)
  int64_t n, c, groups, space;
};

}  // namespace fastdiff
