// Arguments of the CPU kernels of `group_norm_silu`, `add_group_norm_silu` and `cat_group_norm_silu`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// total = x + channel_add + residual, rounded; y = activation(n^ factor + offset), where n^ is the total
// normalized over the groups, factor = weight (1 + scale), offset = bias (1 + scale) + shift.
// x, residual, total, y: (n, c, space), or (n, space, c) if channels_last. Without a total nothing is
// added and x is normalized. Optional tensors may be null. With a skip, x, residual, channel_add and total
// have `split` channels only, and skip has the other c - split.
struct GroupNorm {
  Dtype dtype;
  bool channels_last, silu, wide_residual;  // wide_residual: the residual is float
  const void *x, *skip, *residual;
  const float* channel_add;    // (n, split), or (split,) with a stride of 0
  int64_t channel_add_stride;  // between samples
  void *total, *y;
  const float *weight, *bias, *scale_shift;  // (c,), (c,), (n, 2 c)
  float* stats;                // (n, groups, 3): mean, its rounding error in fp32, 1 / deviation
  int64_t n, c, split, groups, space;
  double eps;
};

// The gradients, given dy, the total (or x), skip and the stats. dtotal is added to dx; dchannel is the
// sum of dx and dskip over space.
struct GroupNormBackward {
  Dtype dtype;
  bool channels_last, silu;
  const void *dy, *dtotal, *x, *skip;
  void *dx, *dskip;
  const float *weight, *bias, *scale_shift, *stats;
  float *dweight, *dbias, *dscale_shift, *dchannel;  // (c,), (c,), (n, 2 c), (n, c)
  int64_t n, c, split, groups, space;
};

}  // namespace fastdiff
