// Gathered rows of samples and embeddings (kernels/gather_rows documents what they are).
//
// Bytes: each row of x, extra and embeddings in, once, and both results out. A thread copies one
// position of all channels, so reads are coalesced over positions and its writes are neighbors: the
// tensors are small (4 to 9 channels of latents), and the launch takes longer than the copy.

#pragma once

#include "common.cuh"

namespace fastdiff {

constexpr int kGatherThreads = 256;

template <typename T>
struct GatherRows {
  const float *x, *extra;           // (S, channels, space), (S, more, space)
  const int64_t *samples, *places;  // (rows,)
  const T* embeddings;              // (length, width)
  T *inputs, *emb;
  int64_t count, length, channels, more, space, width, tiles;
  bool channels_last;
};

/// Grid: rows, tiles of positions and then of the embedding. An index out of range gives NaN.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads) gather_rows_tile(GatherRows<T> p) {
  const int64_t row = blockIdx.x;
  const float nothing = nanf("");
  if (blockIdx.y < p.tiles) {
    const int64_t place = int64_t(blockIdx.y) * kGatherThreads + threadIdx.x;
    if (place >= p.space) return;
    const int64_t sample = p.samples[row], channels = p.channels + p.more;
    const bool valid = sample >= 0 && sample < p.count;
    T* to = p.inputs + row * channels * p.space;
    for (int64_t c = 0; c < channels; ++c) {
      float value = nothing;
      if (valid)
        value = c < p.channels
                    ? p.x[(sample * p.channels + c) * p.space + place]
                    : p.extra[(sample * p.more + c - p.channels) * p.space + place];
      to[p.channels_last ? place * channels + c : c * p.space + place] = from_float<T>(value);
    }
  } else {
    const int64_t column = (int64_t(blockIdx.y) - p.tiles) * kGatherThreads + threadIdx.x;
    if (column >= p.width) return;
    const int64_t place = p.places[row];
    const bool valid = place >= 0 && place < p.length;
    p.emb[row * p.width + column] =
        valid ? p.embeddings[place * p.width + column] : from_float<T>(nothing);
  }
}

}  // namespace fastdiff
