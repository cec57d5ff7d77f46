// LayerNorm of rows, alone or after an addition (kernels/layer_norm has the maths).
//
// A thread keeps 16 numbers of a row in registers, so x is read once: a warp has a row of up to 512
// numbers, eight warps a block; a wider row, up to 8192, has a block of its own. Rows beyond that
// are read three times, from the caches but for the first time. Rows without 16-byte loads: half as
// many numbers everywhere. Bytes: 2 rows D itemsize, 4 with an addition. At most 64 registers a
// thread forward: an SM holds 1,024 threads with 32 KB of loads in flight.
//
// Numbers: in two passes over a row; sums are taken above the row's first number, and the mean is kept in two parts (Knuth's
// two-sum), so that a large mean costs no digits and a constant row gives exactly 0. Sums have a
// fixed order that depends on D only.

#pragma once

#include "common.cuh"

namespace fastdiff {

/// Of a row in a thread's registers, loaded V at a time.
template <int V>
constexpr int kRowNumbers = V == 1 ? 8 : 16;
constexpr int kRowBlock = 256;     // threads of a block with a row to each warp
constexpr int kRowThreads = 512;   // the most that a block on one row has
constexpr int kRowWarps = kRowThreads / kWarpSize;

/// Numbers of a dtype known at run time, as fp32: V neighbours from a multiple of V on.
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

/// The threads on a row: a warp of a block, or the whole block.
struct RowTeam {
  int thread, threads, index, count;  // of this thread in its team, of its team in the block

  __device__ __forceinline__ explicit RowTeam(bool warps)
      : thread(static_cast<int>(warps ? threadIdx.x % kWarpSize : threadIdx.x)),
        threads(static_cast<int>(warps ? kWarpSize : blockDim.x)),
        index(warps ? static_cast<int>(threadIdx.x) / kWarpSize : 0),
        count(warps ? static_cast<int>(blockDim.x) / kWarpSize : 1) {}

  /// Sums over the team, the same in all its threads. scratch: N numbers a warp, free afterwards.
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

  /// first + above is the mean.
  __device__ __forceinline__ RowStatistics(float first, float above) {
    mean = first + above;
    const float part = mean - first;
    rest = (first - (mean - part)) + (above - part);
  }

  /// One step of Newton's on the exact variance + eps, in two parts: an error of rstd is every
  /// number's, and four roundings would be seen. (fp64 is 32 times slower on most GPUs.)
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

/// Statistics of a row in registers, which becomes centered. Numbers beyond the row stay 0.
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

/// Statistics of a row that a block reads twice, by `load(pack, out)` and `load_again(pack, out)`,
/// which give V numbers each.
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
  Parameter residual;  // (rows, D) as x, of its own dtype; null: nothing is added
  T* total;            // with a residual: the rounded sum
  T* y;
  Parameter weight, bias;  // (D,)
  int64_t rows, d, x_stride, residual_stride;
  float eps;

  /// V numbers of a row as the norm sees them; where something is added, writes the total.
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

  /// Writes V numbers, given centered.
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

/// A row in registers. Grid: ceil(rows / teams of a block).
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    layer_norm_rows(LayerNormRows<T> p, bool warps) {
  FASTDIFF_SHARED(float, scratch, kRowScratch);
  constexpr int K = kRowNumbers<V> / V;
  const RowTeam team(warps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * team.count + team.index;
  if (row >= p.rows) return;  // a whole warp; never one of several on a row
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

/// A row too wide for registers; grid: rows. A thread reads anew what it wrote to the total.
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
