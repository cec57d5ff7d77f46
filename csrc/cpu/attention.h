// Arguments of the CPU kernels of `attention`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// A tensor of heads with dense rows, of type dtype, and its strides over samples, rows and heads.
struct Heads {
  const void* data;
  int64_t sample, row, head;
};

// Added to the scores: float, or bytes where 0 hides a key. Null: no mask.
struct AttentionMask {
  const void* data;
  bool bytes;
  int64_t sample, head, query, key;  // strides
};

// out = softmax(scale q k^T + mask) v per sample and head, over the keys followed by the extra keys.
struct Attention {
  Dtype dtype;
  Heads q, k, v, extra_k, extra_v;
  AttentionMask mask;
  void* out;    // (n, length, heads, d)
  float* sums;  // (2, n, heads, length) or null: the largest score of a query, the sum of exp
  int64_t n, length, heads, keys, extra_keys, d;
  int64_t threads;  // number of threads to split the work for; does not affect the result
  double scale;
};

// The gradients, given dout, the output and its sums.
struct AttentionBackward {
  Attention forward;
  Heads dout;
  void *dq, *dk, *dv, *dextra_k, *dextra_v;  // dense, as (n, length, heads, d)
  float* dscores;  // (n, heads, length, keys + extra_keys), or null if not needed
};

}  // namespace fastdiff
