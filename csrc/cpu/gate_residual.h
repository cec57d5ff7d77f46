// Arguments of the CPU kernels of `gate_residual`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// y = gate x + residual, with a gate per sample and column.
struct GateResidual {
  Dtype dtype;
  const void *x, *residual;  // (n, length, d), rows x_stride and residual_stride apart
  void* y;                   // dense
  const float* gate;         // (n, d)
  int64_t n, length, d, x_stride, residual_stride;
};

struct GateResidualBackward {
  Dtype dtype;
  const void *dy, *x;
  void* dx;           // dense
  const float* gate;  // (n, d)
  float* dgate;       // (n, d)
  int64_t n, length, d, dy_stride, x_stride;
};

}  // namespace fastdiff
