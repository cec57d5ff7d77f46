// Arguments of the CPU kernel of `philox_normal`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// Standard normal numbers, (n, elements).
struct PhiloxNormal {
  const int64_t* seeds;  // (n,)
  float* out;
  int64_t n, elements;
  uint32_t step, stream;
};

}  // namespace fastdiff
