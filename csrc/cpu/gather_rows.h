// Arguments of the CPU kernel of `gather_rows`.
#pragma once

#include "kernels.h"

namespace fastdiff {

// inputs[r] = [x[samples[r]] | extra[samples[r]]], emb[r] = embeddings[places[r]]; all tensors dense.
struct GatherRows {
  Dtype dtype;  // of embeddings and both results
  bool channels_last;
  const float *x, *extra;           // (S, channels, space), (S, more, space)
  const int64_t *samples, *places;  // (rows,)
  const void* embeddings;           // (K, width)
  void *inputs, *emb;               // (rows, space, channels + more) if channels_last; (rows, width)
  int64_t rows, channels, more, space, width;
};

}  // namespace fastdiff
