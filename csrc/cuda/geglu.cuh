// GEGLU (kernels/geglu documents the maths): y = a gelu(g), x = [a | g], and its gradient.
//
// Elementwise: a thread computes two packs of the result, in whichever rows they are. Bytes:
// 3 rows D itemsize forward, 5 backward, each element once. Blocks have 256 threads of at most 128
// registers, so that an SM holds 512 threads with 32 KB of loads in flight.

#pragma once

#include "common.cuh"

namespace fastdiff {

constexpr int kGegluThreads = 256;
constexpr int kGegluPacks = 2;
constexpr int kGegluSpan = kGegluThreads * kGegluPacks;  // packs per block

/// Rows of x have 2 d elements, rows of the result d.
struct GegluShape {
  int64_t rows, d;

  template <int V>
  __device__ __forceinline__ int64_t packs() const {
    return rows * (d / V);
  }
};

/// P(N(0, 1) < g), so that gelu(g) = g cdf(g).
__device__ __forceinline__ float normal_cdf(float g) {
  return 0.5f * (1.0f + erff(g * 0.70710678118654752f));
}

/// x: (rows, 2 d), rows x_stride apart; y: (rows, d), dense. Grid: ceil(packs / kGegluSpan).
template <typename T, int V>
__global__ void __launch_bounds__(kGegluThreads)
    geglu_forward(const T* x, T* y, GegluShape shape, int64_t x_stride) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGegluSpan + threadIdx.x;
  const int64_t packs = shape.packs<V>(), in_row = shape.d / V;
  Pack<T, V> values[kGegluPacks], gates[kGegluPacks];
#pragma unroll
  for (int k = 0; k < kGegluPacks; ++k) {
    const int64_t pack = first + k * kGegluThreads;
    if (pack >= packs) break;
    const T* from = x + pack / in_row * x_stride + pack % in_row * V;
    values[k] = load_input<T, V>(from);
    gates[k] = load_input<T, V>(from + shape.d);
  }
#pragma unroll
  for (int k = 0; k < kGegluPacks; ++k) {
    const int64_t pack = first + k * kGegluThreads;
    if (pack >= packs) break;
    float value[V], gate[V];
    unpack(values[k], value);
    unpack(gates[k], gate);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] *= gate[v] * normal_cdf(gate[v]);
    store_pack<T, V>(y + pack * V, pack_of<T, V>(value));
  }
}

/// dy: (rows, d), rows dy_stride apart; dx: (rows, 2 d), dense. Grid: ceil(packs / kGegluSpan).
template <typename T, int V>
__global__ void __launch_bounds__(kGegluThreads)
    geglu_backward(const T* dy, const T* x, T* dx, GegluShape shape, int64_t dy_stride,
                   int64_t x_stride) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGegluSpan + threadIdx.x;
  const int64_t packs = shape.packs<V>(), in_row = shape.d / V;
  Pack<T, V> gradients[kGegluPacks], values[kGegluPacks], gates[kGegluPacks];
#pragma unroll
  for (int k = 0; k < kGegluPacks; ++k) {
    const int64_t pack = first + k * kGegluThreads;
    if (pack >= packs) break;
    const int64_t row = pack / in_row, column = pack % in_row * V;
    gradients[k] = load_input<T, V>(dy + row * dy_stride + column);
    values[k] = load_input<T, V>(x + row * x_stride + column);
    gates[k] = load_input<T, V>(x + row * x_stride + column + shape.d);
  }
#pragma unroll
  for (int k = 0; k < kGegluPacks; ++k) {
    const int64_t pack = first + k * kGegluThreads;
    if (pack >= packs) break;
    float gradient[V], value[V], gate[V];
    unpack(gradients[k], gradient);
    unpack(values[k], value);
    unpack(gates[k], gate);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float g = gate[v], cdf = normal_cdf(g);
      const float density = 0.39894228040143268f * expf(-0.5f * g * g);
      gate[v] = gradient[v] * value[v] * (cdf + g * density);
      value[v] = gradient[v] * (g * cdf);
    }
    T* to = dx + pack / in_row * 2 * shape.d + pack % in_row * V;
    store_pack<T, V>(to, pack_of<T, V>(value));
    store_pack<T, V>(to + shape.d, pack_of<T, V>(gate));
  }
}

}  // namespace fastdiff
