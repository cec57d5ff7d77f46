// Gradients of layer_norm. With g = dy weight and xhat = (x - mean) / std, which is recomputed,
//     dx = (g - mean(g) - xhat mean(g xhat)) / std + dtotal
//     dweight = sum over rows of dy xhat,    dbias = sum over rows of dy
//
// Bytes: 3 rows D itemsize (x and dy in, dx out), 4 with dtotal. dweight and dbias take two steps,
// without atomics: each of P blocks adds up every P-th tile of rows and writes its partial sum, then a
// second kernel adds the P partial sums in order: 16 P D bytes that stay in the L2. x, dy and both sums
// are in registers, 16 elements each (128 registers per thread). Rows beyond 8192 are read again: x four
// times and dy twice, and both once more for the partial sums.

#pragma once

#include "layer_norm.cuh"

namespace fastdiff {

/// Arguments of the backward kernels; dx is dense.
template <typename T>
struct LayerNormGradients {
  const T* dy;
  const T* dtotal;  // gradient of the other output, added to dx; null: none
  const T* x;       // the tensor that was normalized
  Parameter weight;
  T* dx;
  float* dweights;    // partial sums: (P, D), or null
  float* dbiases;
  float* statistics;  // wide rows: (rows, 3)
  int64_t rows, d, dy_stride, dtotal_stride, x_stride;
  float eps;

  /// Loads dy; `weigh` then multiplies it by the weight.
  template <int V>
  __device__ __forceinline__ void load_dy(int64_t row, int64_t column, float (&out)[V]) const {
    unpack(load_input<T, V>(dy + row * dy_stride + column), out);
  }
  template <int V>
  __device__ __forceinline__ void weigh(int64_t column, float (&g)[V]) const {
    if (weight.data == nullptr) return;
    float factor[V];
    load_parameter(weight, column, factor);
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] *= factor[v];
  }

  template <int V>
  __device__ __forceinline__ void store_dx(int64_t row, int64_t column, float (&out)[V]) const {
    if (dtotal != nullptr) {
      float more[V];
      unpack(load_input<T, V>(dtotal + row * dtotal_stride + column), more);
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] += more[v];
    }
    store_pack<T, V>(dx + row * d + column, pack_of<T, V>(out));
  }
};

/// Adds up the teams' sums in order and writes the block's partial sum. buffer: d numbers per team, if
/// there are several.
template <int K, int V>
__device__ __forceinline__ void write_share(const float (&sums)[K][V], const RowTeam& team,
                                            int64_t d, float* buffer, float* out) {
  const int packs = static_cast<int>(d / V);
  float* to = team.count == 1 ? out : buffer + team.index * d;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = team.thread + k * team.threads;
    if (pack < packs)
#pragma unroll
      for (int v = 0; v < V; ++v) to[pack * V + v] = sums[k][v];
  }
  if (team.count == 1) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < d; i += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int t = 0; t < team.count; ++t) sum += buffer[t * d + i];
    out[i] = sum;
  }
  __syncthreads();
}

/// Rows in registers: every gridDim.x-th tile. Shared memory: d numbers per team, if there are several.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    layer_norm_rows_backward(LayerNormGradients<T> p, bool warps, int64_t tiles) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  FASTDIFF_DYNAMIC_SHARED(memory);
  constexpr int K = kRowNumbers<V> / V;
  const RowTeam team(warps);
  const int packs = static_cast<int>(p.d / V);
  float dweight[K][V] = {}, dbias[K][V] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * team.count + team.index;
    if (row >= p.rows) break;  // only if a warp has its own row, and then the whole warp
    float x[K][V] = {}, g[K][V] = {};
    const float first = to_float(p.x[row * p.x_stride]);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int pack = team.thread + k * team.threads;
      if (pack >= packs) continue;
      unpack(load_input<T, V>(p.x + row * p.x_stride + int64_t{pack} * V), x[k]);
      p.load_dy(row, int64_t{pack} * V, g[k]);
    }
    const RowStatistics s = center_row(x, first, team, p.d, p.eps, scratch);
    float means[2] = {};  // of g and g xhat
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int pack = team.thread + k * team.threads;
      if (pack >= packs) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[k][v] *= s.rstd;
        dweight[k][v] += g[k][v] * x[k][v];
        dbias[k][v] += g[k][v];
      }
      p.weigh(int64_t{pack} * V, g[k]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        means[0] += g[k][v];
        means[1] += g[k][v] * x[k][v];
      }
    }
    team.sum(means, scratch);
    means[0] /= static_cast<float>(p.d);
    means[1] /= static_cast<float>(p.d);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int pack = team.thread + k * team.threads;
      if (pack >= packs) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) g[k][v] = s.rstd * (g[k][v] - means[0] - x[k][v] * means[1]);
      p.store_dx(row, int64_t{pack} * V, g[k]);
    }
  }
  float* buffer = reinterpret_cast<float*>(memory);
  const int64_t share = static_cast<int64_t>(blockIdx.x) * p.d;
  if (p.dweights != nullptr) write_share(dweight, team, p.d, buffer, p.dweights + share);
  if (p.dbiases != nullptr) write_share(dbias, team, p.d, buffer, p.dbiases + share);
}

/// Computes dx of a row too wide for registers, and stores its statistics. Grid: rows.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    layer_norm_wide_backward(LayerNormGradients<T> p) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  const RowTeam team(false);
  const int64_t row = blockIdx.x, packs = p.d / V;
  const T* from = p.x + row * p.x_stride;
  const auto load = [&](int64_t pack, float(&x)[V]) {
    unpack(load_input<T, V>(from + pack * V), x);
  };
  const RowStatistics s = read_statistics<V>(load, load, to_float(from[0]), p.d, p.eps, scratch);
  float means[2] = {};
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    float x[V], g[V];
    load(pack, x);
    p.load_dy(row, pack * V, g);
    p.weigh(pack * V, g);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      means[0] += g[v];
      means[1] += g[v] * (s.centered(x[v]) * s.rstd);
    }
  }
  team.sum(means, scratch);
  means[0] /= static_cast<float>(p.d);
  means[1] /= static_cast<float>(p.d);
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    float x[V], g[V];
    load(pack, x);
    p.load_dy(row, pack * V, g);
    p.weigh(pack * V, g);
#pragma unroll
    for (int v = 0; v < V; ++v)
      g[v] = s.rstd * (g[v] - means[0] - s.centered(x[v]) * s.rstd * means[1]);
    p.store_dx(row, pack * V, g);
  }
  if (threadIdx.x != 0) return;
  p.statistics[3 * row] = s.mean;
  p.statistics[3 * row + 1] = s.rest;
  p.statistics[3 * row + 2] = s.rstd;
}

/// Wide rows: partial sums of dweight and dbias, V columns per thread over every gridDim.y-th row.
template <typename T, int V>
__global__ void __launch_bounds__(kRowBlock)
    layer_norm_wide_shares(LayerNormGradients<T> p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= p.d) return;
  float dweight[V] = {}, dbias[V] = {};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float* s = p.statistics + 3 * row;
    const float mean = s[0], rest = s[1], rstd = s[2];
    float x[V], g[V];
    unpack(load_input<T, V>(p.x + row * p.x_stride + column), x);
    p.load_dy(row, column, g);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dweight[v] += g[v] * (((x[v] - mean) - rest) * rstd);
      dbias[v] += g[v];
    }
  }
  const int64_t share = static_cast<int64_t>(blockIdx.y) * p.d + column;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (p.dweights != nullptr) p.dweights[share + v] = dweight[v];
    if (p.dbiases != nullptr) p.dbiases[share + v] = dbias[v];
  }
}

constexpr int kShareColumns = 32, kShareRows = 8;

/// A gradient of a parameter, in the parameter's dtype; null if it is not needed.
struct ParameterGradient {
  const float* shares;
  void* out;
  int dtype;

  __device__ __forceinline__ void store(int64_t i, float x) const {
    switch (dtype) {
      case kFloat16:
        static_cast<half*>(out)[i] = from_float<half>(x);
        return;
      case kBFloat16:
        static_cast<bfloat16*>(out)[i] = from_float<bfloat16>(x);
        return;
      case kFloat64:
        static_cast<double*>(out)[i] = x;
        return;
      default:
        static_cast<float*>(out)[i] = x;
    }
  }
};

/// Adds up the partial sums in order. Grid: ceil(D / kShareColumns), 2 (for weight and bias).
__global__ void __launch_bounds__(kShareColumns* kShareRows)
    layer_norm_sum_shares(ParameterGradient dweight, ParameterGradient dbias, int64_t shares,
                          int64_t d) {
  FASTDIFF_SHARED(float, sums, kShareColumns * kShareRows);
  const ParameterGradient gradient = blockIdx.y == 0 ? dweight : dbias;
  if (gradient.shares == nullptr) return;  // the whole block
  const int64_t column =
      static_cast<int64_t>(blockIdx.x) * kShareColumns + threadIdx.x % kShareColumns;
  float sum = 0;
  if (column < d)
    for (int64_t i = threadIdx.x / kShareColumns; i < shares; i += kShareRows)
      sum += gradient.shares[i * d + column];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kShareColumns || column >= d) return;
  sum = 0;
  for (int i = 0; i < kShareRows; ++i) sum += sums[i * kShareColumns + threadIdx.x];
  gradient.store(column, sum);
}

}  // namespace fastdiff
