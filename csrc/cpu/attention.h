// What the CPU kernels of `attention` take.
#pragma once

#include "kernels.h"

namespace fastdiff {

// Numbers of type dtype: heads of dense rows. Strides from sample to sample, row to row, head to head.
struct Heads {
  const void* data;
  int64_t sample, row, head;
};

// Added to the scores: float, or bytes of which 0 hides a key. Null: nothing is.
struct AttentionMask {
  const void* data;
  bool bytes;
  int64_t sample, head, query, key;  // strides
};

// out = softmax(scale q k^T + mask) v per sample and head, over the keys and then the extra keys.
struct Attention {
  Dtype dtype;
  Heads q, k, v, extra_k, extra_v;
  AttentionMask mask;
  void* out;    // (n, length, heads, d)
  float* sums;  // (2, n, heads, length) or null: the largest score of a query, the sum of exp
  int64_t n, length, heads, keys, extra_keys, d;
  int64_t threads;  // that the work is to be cut for; no bit depends on it
  double scale;
};

// The gradients, from dout, the result and its sums.
struct AttentionBackward {
  Attention forward;
  Heads dout;
  void *dq, *dk, *dv, *dextra_k, *dextra_v;  // dense, as (n, length, heads, d)
  float* dscores;  // (n, heads, length, keys + extra_keys), or null where no one asks
};

}  // namespace fastdiff
