// Gated residual sum: y = gate x + residual, with a gate per sample and column, and its gradients
// (kernels/gate_residual documents the maths).
//
// Elementwise: a block computes one row forward, and some rows of a group of columns backward, a
// pack of 16 bytes per thread at a time. Bytes: 3 N T C itemsize in both directions. The gate is
// read again for every row, from the caches; backward it stays in registers.

#pragma once

#include "layer_norm.cuh"

namespace fastdiff {

constexpr int kGateThreads = 256;  // most per block; narrow rows take fewer

template <typename T>
struct GateResidualRows {
  const T *x, *residual;
  T* y;
  Parameter gate;  // (N, D)
  int64_t length, d, x_stride, residual_stride;
};

/// Grid: N * T rows.
template <typename T, int V>
__global__ void __launch_bounds__(kGateThreads) gate_residual_rows(GateResidualRows<T> p) {
  const int64_t row = blockIdx.x, own = row / p.length * p.d;
  for (int64_t pack = threadIdx.x; pack < p.d / V; pack += blockDim.x) {
    float x[V], residual[V], gate[V];
    unpack(load_input<T, V>(p.x + row * p.x_stride + pack * V), x);
    unpack(load_input<T, V>(p.residual + row * p.residual_stride + pack * V), residual);
    load_parameter(p.gate, own + pack * V, gate);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = gate[v] * x[v] + residual[v];
    store_pack<T, V>(p.y + row * p.d + pack * V, pack_of<T, V>(x));
  }
}

template <typename T>
struct GateResidualGradients {
  const T *dy, *x;
  T* dx;
  Parameter gate;
  float* shares;  // (N, chunks, D)
  int64_t length, d, chunks, dy_stride, x_stride;
};

/// Grid: N * chunks, ceil(packs / threads). A thread computes one pack of columns of every chunks-th
/// row of a sample, so the sums over the rows stay in its registers.
template <typename T, int V>
__global__ void __launch_bounds__(kGateThreads)
    gate_residual_rows_backward(GateResidualGradients<T> p) {
  const int64_t pack = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (pack >= p.d / V) return;
  const int64_t sample = blockIdx.x / p.chunks, column = pack * V;
  float gate[V], dgate[V] = {};
  load_parameter(p.gate, sample * p.d + column, gate);
#pragma unroll 2
  for (int64_t t = blockIdx.x % p.chunks; t < p.length; t += p.chunks) {
    const int64_t row = sample * p.length + t;
    float dy[V], x[V];
    unpack(load_input<T, V>(p.dy + row * p.dy_stride + column), dy);
    unpack(load_input<T, V>(p.x + row * p.x_stride + column), x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dgate[v] += dy[v] * x[v];
      dy[v] *= gate[v];
    }
    store_pack<T, V>(p.dx + row * p.d + column, pack_of<T, V>(dy));
  }
  float* share = p.shares + static_cast<int64_t>(blockIdx.x) * p.d + column;
#pragma unroll
  for (int v = 0; v < V; ++v) share[v] = dgate[v];
}

}  // namespace fastdiff
