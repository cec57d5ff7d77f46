// Arguments of the CPU kernels of `geglu`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// y[r, i] = x[r, i] gelu(x[r, d + i])
struct Geglu {
  Dtype dtype;
  const void* x;  // (rows, 2 d), rows x_stride apart
  void* y;        // (rows, d)
  int64_t rows, d, x_stride;
};

struct GegluBackward {
  Dtype dtype;
  const void *dy, *x;  // (rows, d), (rows, 2 d)
  void* dx;            // (rows, 2 d)
  int64_t rows, d, dy_stride, x_stride;
};

}  // namespace fastdiff
