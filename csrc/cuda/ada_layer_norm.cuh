// Adaptive LayerNorm: normalizes rows of C elements to n, then y = n (1 + scale) + shift, with scale and
// shift per sample (kernels/ada_layer_norm documents the maths and the gradients).
//
// A block processes one row at a time. It reads the row once from memory and twice more from the caches,
// as layer_norm does for wide rows, with 512 threads and 16-byte loads if rows are aligned. Bytes:
// 2 N T C itemsize forward, 3 backward. Partial sums of dscale and dshift, to which a block adds its rows
// in order, stay in the caches.

#pragma once

#include "layer_norm.cuh"

namespace fastdiff {

template <typename T>
struct AdaLayerNormRows {
  const T* x;
  T* y;
  Parameter scale, shift;  // (N, D)
  int64_t length, d, x_stride;
  float eps;
};

/// Grid: N * T rows.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) ada_layer_norm_rows(AdaLayerNormRows<T> p) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  const int64_t row = blockIdx.x, own = row / p.length * p.d;
  const T* from = p.x + row * p.x_stride;
  const auto load = [&](int64_t pack, float(&x)[V]) {
    unpack(load_input<T, V>(from + pack * V), x);
  };
  const RowStatistics s = read_statistics<V>(load, load, to_float(from[0]), p.d, p.eps, scratch);
  for (int64_t pack = threadIdx.x; pack < p.d / V; pack += blockDim.x) {
    float x[V], scale[V], shift[V];
    load(pack, x);
    load_parameter(p.scale, own + pack * V, scale);
    load_parameter(p.shift, own + pack * V, shift);
#pragma unroll
    for (int v = 0; v < V; ++v)
      x[v] = s.centered(x[v]) * s.rstd * (1.0f + scale[v]) + shift[v];
    store_pack<T, V>(p.y + row * p.d + pack * V, pack_of<T, V>(x));
  }
}

template <typename T>
struct AdaLayerNormGradients {
  const T *dy, *x;
  T* dx;
  Parameter scale;
  float* shares;  // (N, chunks, 2, D), zeros
  int64_t length, d, chunks, dy_stride, x_stride;
  float eps;
};

/// Grid: N * chunks; a block processes every chunks-th row of a sample. A thread has the same columns in
/// every row, so no other thread writes to its partial sums.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads, 1)
    ada_layer_norm_rows_backward(AdaLayerNormGradients<T> p) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  const RowTeam team(false);
  const int64_t sample = blockIdx.x / p.chunks, packs = p.d / V;
  float* share = p.shares + static_cast<int64_t>(blockIdx.x) * 2 * p.d;
  for (int64_t t = blockIdx.x % p.chunks; t < p.length; t += p.chunks) {
    const int64_t row = sample * p.length + t;
    const T *from = p.x + row * p.x_stride, *gradient = p.dy + row * p.dy_stride;
    const auto load = [&](int64_t pack, float(&x)[V]) {
      unpack(load_input<T, V>(from + pack * V), x);
    };
    const RowStatistics s = read_statistics<V>(load, load, to_float(from[0]), p.d, p.eps, scratch);
    const auto load_both = [&](int64_t pack, float(&x)[V], float(&g)[V]) {
      float scale[V];
      load(pack, x);
      unpack(load_input<T, V>(gradient + pack * V), g);
      load_parameter(p.scale, sample * p.d + pack * V, scale);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[v] = s.centered(x[v]) * s.rstd;
        g[v] *= 1.0f + scale[v];
      }
    };
    float means[2] = {};  // of g and g n
#pragma unroll 1  // spills on sm_100 if unrolled
    for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      float x[V], g[V], dy[V];
      load_both(pack, x, g);
      unpack(load_input<T, V>(gradient + pack * V), dy);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        means[0] += g[v];
        means[1] += g[v] * x[v];
        share[pack * V + v] += dy[v] * x[v];
        share[p.d + pack * V + v] += dy[v];
      }
    }
    team.sum(means, scratch);
    means[0] /= static_cast<float>(p.d);
    means[1] /= static_cast<float>(p.d);
#pragma unroll 1  // spills on sm_100 if unrolled
    for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      float x[V], g[V];
      load_both(pack, x, g);
#pragma unroll
      for (int v = 0; v < V; ++v) g[v] = s.rstd * (g[v] - means[0] - x[v] * means[1]);
      store_pack<T, V>(p.dx + row * p.d + pack * V, pack_of<T, V>(g));
    }
  }
}

}  // namespace fastdiff
