// LayerNorm of rows, alone or after an addition (kernels/layer_norm documents the maths).
//
// A thread keeps 16 elements of a row in registers, so x is read once: a row of up to 512 elements is
// handled by a warp, with eight warps per block; a wider row, up to 8192, has a block of its own. Rows
// beyond that are read three times, from the caches except for the first time. Without 16-byte loads
// all these limits are half as large. Bytes: 2 rows D itemsize, 4 with an addition. The forward pass
// needs at most 64 registers per thread: an SM holds 1,024 threads with 32 KB of loads in flight.
//
// Precision: there are two passes over a row. The first element is subtracted before summing, and the
// mean is stored in two parts (Knuth's two-sum), so that a large mean costs no precision and a constant
// row gives exactly 0. Sums have a fixed order that depends only on D.

#pragma once

#include "common.cuh"

namespace fastdiff {

/// Elements of a row in a thread's registers, loaded V at a time.
template <int V>
constexpr int kRowNumbers = V == 1 ? 8 : 16;
constexpr int kRowBlock = 256;     // threads of a block with one row per warp
constexpr int kRowThreads = 512;   // most threads of a block on one row
constexpr int kRowWarps = kRowThreads / kWarpSize;

/// Loads V neighboring elements of a tensor as fp32, starting at a multiple of V.
template <typename S, int V>
__device__ __forceinline__ void load_as(const void* data, int64_t i, float (&out)[V]) {
  constexpr int W = V < kWide<S> ? V : kWide<S>;
#pragma unroll
  for (int v = 0; v < V; v += W) {
    float part[W];
    unpack(load_input<S, W>(static_cast<const S*>(data) + i + v), part);
#pragma unroll
    for (int w = 0; w < W; ++w) out[v + w] = part[w];
  }
}

template <int V>
__device__ __forceinline__ void load_parameter(const Parameter& p, int64_t i, float (&out)[V]) {
  switch (p.dtype) {
    case kFloat16:
      return load_as<half, V>(p.data, i, out);
    case kBFloat16:
      return load_as<bfloat16, V>(p.data, i, out);
    case kFloat64:
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = p.at(i + v, 0.0f);
      return;
    default:
      return load_as<float, V>(p.data, i, out);
  }
}

/// The threads that share a row: a warp, or the whole block.
struct RowTeam {
  int thread, threads, index, count;  // this thread in its team, and its team in the block

  __device__ __forceinline__ explicit RowTeam(bool warps)
      : thread(static_cast<int>(warps ? threadIdx.x % kWarpSize : threadIdx.x)),
        threads(static_cast<int>(warps ? kWarpSize : blockDim.x)),
        index(warps ? static_cast<int>(threadIdx.x) / kWarpSize : 0),
        count(warps ? static_cast<int>(blockDim.x) / kWarpSize : 1) {}

  /// Sums over the team, identical in all its threads. scratch: N numbers per warp, free afterwards.
  template <int N>
  __device__ __forceinline__ void sum(float (&x)[N], float* scratch) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    if (threads == kWarpSize) return;
    const int warp = thread / kWarpSize, warps = threads / kWarpSize;
    if (thread % kWarpSize == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) scratch[N * warp + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0;
    for (int w = 0; w < warps; ++w)
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += scratch[N * w + i];
    __syncthreads();
  }
};

/// A row's mean in two parts, and 1 / sqrt(variance + eps).
struct RowStatistics {
  float mean, rest, rstd;

  /// The mean is first + above.
  __device__ __forceinline__ RowStatistics(float first, float above) {
    mean = first + above;
    const float part = mean - first;
    rest = (first - (mean - part)) + (above - part);
  }

  /// One Newton step on the exact variance + eps, in two parts: an error of rstd affects every element
  /// of the row, and four roundings would be noticeable. (fp64 is 32 times slower on most GPUs.)
  __device__ __forceinline__ void finish(float squares, int64_t d, float eps) {
    const float size = static_cast<float>(d), variance = squares / size;
    const float high = variance + eps, part = high - variance;
    const float low = (variance - (high - part)) + (eps - part) +
                      fmaf(-variance, size, squares) / size;
    const float root = 1.0f / sqrtf(high);
    const float square = high * root, rest = fmaf(high, root, -square);
    const float error = fmaf(-square, root, 1.0f) - (rest + low * root) * root;
    rstd = fmaf(0.5f * root, error, root);
  }

  __device__ __forceinline__ float centered(float x) const { return (x - mean) - rest; }
};

constexpr int kRowScratch = 2 * kRowWarps;

/// Computes the statistics of a row in registers and centers it. Elements beyond the row stay 0.
template <int K, int V>
__device__ __forceinline__ RowStatistics center_row(float (&x)[K][V], float first,
                                                    const RowTeam& team, int64_t d, float eps,
                                                    float* scratch) {
  const int packs = static_cast<int>(d / V);
  float above[1] = {};
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (team.thread + k * team.threads < packs)
#pragma unroll
      for (int v = 0; v < V; ++v) above[0] += x[k][v] - first;
  team.sum(above, scratch);
  RowStatistics s(first, above[0] / static_cast<float>(d));
  float squares[1] = {};
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      x[k][v] = team.thread + k * team.threads < packs ? s.centered(x[k][v]) : 0.0f;
      squares[0] += x[k][v] * x[k][v];
    }
  team.sum(squares, scratch);
  s.finish(squares[0], d, eps);
  return s;
}

/// Statistics of a row that a block reads twice, with `load(pack, out)` and `load_again(pack, out)`,
/// which load V elements each.
template <int V, typename Load, typename Again>
__device__ __forceinline__ RowStatistics read_statistics(const Load& load, const Again& load_again,
                                                         float first, int64_t d, float eps,
                                                         float* scratch) {
  const RowTeam team(false);
  float above[1] = {}, squares[1] = {};
  for (int64_t pack = threadIdx.x; pack < d / V; pack += blockDim.x) {
    float x[V];
    load(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v) above[0] += x[v] - first;
  }
  team.sum(above, scratch);
  RowStatistics s(first, above[0] / static_cast<float>(d));
  for (int64_t pack = threadIdx.x; pack < d / V; pack += blockDim.x) {
    float x[V];
    load_again(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v) squares[0] += s.centered(x[v]) * s.centered(x[v]);
  }
  team.sum(squares, scratch);
  s.finish(squares[0], d, eps);
  return s;
}

/// Arguments of the forward kernels; y and total are dense.
template <typename T>
struct LayerNormRows {
  const T* x;
  Parameter residual;  // (rows, D) like x, of any dtype; null: nothing is added
  T* total;            // with a residual: the rounded sum
  T* y;
  Parameter weight, bias;  // (D,)
  int64_t rows, d, x_stride, residual_stride;
  float eps;

  /// Loads V elements of the input of the norm; with a residual, also writes the total.
  template <int V>
  __device__ __forceinline__ void load(int64_t row, int64_t column, float (&out)[V]) const {
    Pack<T, V> pack = load_input<T, V>(x + row * x_stride + column);
    unpack(pack, out);
    if (residual.data == nullptr) return;
    float addend[V];
    load_parameter(residual, row * residual_stride + column, addend);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] += addend[v];
    pack = pack_of<T, V>(out);
    store_pack<T, V>(total + row * d + column, pack);
    unpack(pack, out);
  }

  __device__ __forceinline__ float first(int64_t row) const {
    const float x0 = to_float(x[row * x_stride]);
    if (residual.data == nullptr) return x0;
    return to_float(from_float<T>(x0 + residual.at(row * residual_stride, 0.0f)));
  }

  /// Writes V elements of y, given centered x.
  template <int V>
  __device__ __forceinline__ void store(int64_t row, int64_t column, float rstd,
                                        float (&x)[V]) const {
    float factor[V], addend[V] = {};
    if (weight.data != nullptr) load_parameter(weight, column, factor);
    if (bias.data != nullptr) load_parameter(bias, column, addend);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      x[v] *= rstd;
      if (weight.data != nullptr) x[v] *= factor[v];
      x[v] += addend[v];
    }
    store_pack<T, V>(y + row * d + column, pack_of<T, V>(x));
  }
};

/// A row in registers. Grid: ceil(rows / teams per block).
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    layer_norm_rows(LayerNormRows<T> p, bool warps) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  constexpr int K = kRowNumbers<V> / V;
  const RowTeam team(warps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * team.count + team.index;
  if (row >= p.rows) return;  // only if a warp has its own row, and then the whole warp
  const int packs = static_cast<int>(p.d / V);
  float x[K][V] = {};
  const float first = p.first(row);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = team.thread + k * team.threads;
    if (pack < packs) p.load(row, int64_t{pack} * V, x[k]);
  }
  const RowStatistics s = center_row(x, first, team, p.d, p.eps, scratch);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = team.thread + k * team.threads;
    if (pack < packs) p.store(row, int64_t{pack} * V, s.rstd, x[k]);
  }
}

/// A row too wide for registers. Grid: rows. A thread reads back what it wrote to the total.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) layer_norm_wide(LayerNormRows<T> p) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  const int64_t row = blockIdx.x;
  const T* source = p.residual.data == nullptr ? p.x + row * p.x_stride : p.total + row * p.d;
  const auto load = [&](int64_t pack, float(&x)[V]) { p.load(row, pack * V, x); };
  const auto load_again = [&](int64_t pack, float(&x)[V]) {
    unpack(load_pack<T, V>(source + pack * V), x);
  };
  const RowStatistics s =
      read_statistics<V>(load, load_again, p.first(row), p.d, p.eps, scratch);
  for (int64_t pack = threadIdx.x; pack < p.d / V; pack += blockDim.x) {
    float x[V];
    load_again(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = s.centered(x[v]);
    p.store(row, pack * V, s.rstd, x);
  }
}

}  // namespace fastdiff
