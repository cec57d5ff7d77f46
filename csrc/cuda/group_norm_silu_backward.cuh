// Gradients of group_norm_silu. With n = (x - mean) / std * weight + bias, f = n (1 + scale) +
// shift and y = silu(f), per channel of a sample
//     A = sum df,  B = sum df xhat,          df = dy silu'(f),  xhat = (x - mean) / std
// give the gradients of all parameters, and
//     dx = (a df - p - xhat q) / std,        a = weight (1 + scale)
// where p and q are the means over a group of a df and a df xhat.
//
// In parts there are three kernels: A and B of chunks of places; one block per group that merges them;
// an elementwise pass. dy and x are read twice: 5 N C S itemsize. On chip (NHWC; see
// group_norm_silu_on_chip.cuh) dy and x stay in the shared memory of a block or cluster and are read
// once: 3 N C S itemsize. Another kernel sums the gradients of the parameters over N.

#pragma once

#include "group_norm_silu_on_chip.cuh"

namespace fastdiff {

template <typename T>
struct NormBackward {
  const T* dy;
  const T* x;
  const T* skip;    // null: none
  const T* dtotal;  // gradient of the other output, added to dx; null: none
  T* dx;
  T* dskip;         // null if skip is
  Parameter weight, bias, scale_shift;
  const float* stats;  // (N, G, 3), from the forward pass
  const float* means;  // (N, G, 2): p and q, in the last pass
  bool silu;
};

/// Numbers of one channel of one sample: xhat = (x - mean) * rstd - rest, f = xhat * a + b.
struct ChannelNumbers {
  float mean, rstd, rest, a, b;
};

template <typename T>
__device__ __forceinline__ ChannelNumbers channel_numbers(const NormBackward<T>& p,
                                                          const NormShape& shape, int64_t n,
                                                          int c) {
  const float* stats = p.stats + (n * shape.groups + c / shape.size) * 3;
  const Affine k = affine(p.weight, p.bias, p.scale_shift, shape, n, c);
  return {stats[0], stats[2], stats[1] * stats[2], static_cast<float>(k.a),
          static_cast<float>(k.b)};
}

/// dy * silu'(f), f / df = sigmoid(f) (1 + f (1 - sigmoid(f))).
template <typename T>
__device__ __forceinline__ float activate_gradient(float dy, float f, bool silu) {
  if (!silu) return dy;
  const float s = sigmoid<T>(f);
  return dy * s * (1.0f + f * (1.0f - s));
}

/// What one element contributes to its channel's sums and to dx.
struct Slope {
  float xhat, df;
};

template <typename T>
__device__ __forceinline__ Slope slope(float x, float dy, const ChannelNumbers& k, bool silu) {
  const float xhat = (x - k.mean) * k.rstd - k.rest;
  return {xhat, activate_gradient<T>(dy, xhat * k.a + k.b, silu)};
}

__device__ __forceinline__ float input_gradient(const Slope& at, const ChannelNumbers& k,
                                                float mean_p, float mean_q) {
  return k.rstd * (at.df * k.a - mean_p - at.xhat * mean_q);
}

constexpr int kChannelNumbers = 5;

/// `channel_numbers` of a block's columns, each number `width` apart; then, if there are means, p and q.
template <typename T>
__device__ __forceinline__ void column_numbers(const NormBackward<T>& p, const NormShape& shape,
                                               int64_t n, int first, int width, float* out) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const ChannelNumbers k = channel_numbers(p, shape, n, first + i);
    out[i] = k.mean;
    out[width + i] = k.rstd;
    out[2 * width + i] = k.rest;
    out[3 * width + i] = k.a;
    out[4 * width + i] = k.b;
    if (p.means != nullptr) {
      const float* means = p.means + (n * shape.groups + (first + i) / shape.size) * 2;
      out[5 * width + i] = means[0];
      out[6 * width + i] = means[1];
    }
  }
  __syncthreads();
}

/// A thread's V columns of the numbers written by `column_numbers`.
template <int V, int N>
struct ColumnNumbers {
  float at[N][V];

  __device__ __forceinline__ ColumnNumbers(const float* numbers, const ColumnPlace<V>& place) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) at[i][v] = numbers[i * place.packs * V + place.column + v];
  }

  __device__ __forceinline__ ChannelNumbers channel(int v) const {
    return {at[0][v], at[1][v], at[2][v], at[3][v], at[4][v]};
  }
};

/// A and B of a thread's V columns.
template <int V>
struct ColumnSums {
  float a[V] = {}, b[V] = {};

  template <typename T>
  __device__ __forceinline__ void add(const Pack<T, V>& x, const Pack<T, V>& dy,
                                      const ColumnNumbers<V, kChannelNumbers>& k, bool silu) {
    float x_of[V], dy_of[V];
    unpack(x, x_of);
    unpack(dy, dy_of);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Slope at = slope<T>(x_of[v], dy_of[v], k.channel(v), silu);
      a[v] += at.df;
      b[v] += at.df * at.xhat;
    }
  }
};

/// Adds up the sums of all threads with the same columns, in a tree of fixed shape; row 0 has the
/// result. scratch: 2 numbers per thread row and column.
template <int V>
__device__ __forceinline__ void sum_rows(ColumnSums<V>& mine, const ColumnPlace<V>& at,
                                         float* scratch) {
  const int width = at.packs * V;
  const auto keep = [&] {
    float* to = scratch + at.row * 2 * width + at.column;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to[v] = mine.a[v];
      to[width + v] = mine.b[v];
    }
  };
  if (at.active) keep();
  __syncthreads();
  int half = 1;
  while (2 * half < at.rows) half *= 2;
  for (; half > 0; half /= 2) {
    const int other = at.row + half;
    if (at.row < half && other < at.rows) {
      const float* from = scratch + other * 2 * width + at.column;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        mine.a[v] += from[v];
        mine.b[v] += from[width + v];
      }
      keep();
    }
    __syncthreads();
  }
}

/// One channel of a sample, or V neighboring ones, in x and its gradients, or in skip and dskip.
template <typename T>
struct InputChannel {
  const T* x;
  const T* dtotal;  // null: none
  T* dx;
  int64_t step;     // between places

  __device__ __forceinline__ InputChannel(const NormBackward<T>& p, const ChannelPlace& at)
      : x(at.of(p.x, p.skip)), dtotal(at.of_x(p.dtotal)), dx(at.of(p.dx, p.dskip)),
        step(at.step) {}
};

/// Writes dx of a pack, `offset` from the channel's first place.
template <typename T, int V>
__device__ __forceinline__ void store_input_gradient(
    const InputChannel<T>& to, int64_t offset, const Pack<T, V>& x, const Pack<T, V>& dy,
    const ColumnNumbers<V, kChannelNumbers + 2>& k, bool silu) {
  float x_of[V], dy_of[V], extra[V] = {};
  unpack(x, x_of);
  unpack(dy, dy_of);
  if (to.dtotal != nullptr) unpack(load_input<T, V>(to.dtotal + offset), extra);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const ChannelNumbers c = k.channel(v);
    const Slope at = slope<T>(x_of[v], dy_of[v], c, silu);
    extra[v] += input_gradient(at, c, k.at[5][v], k.at[6][v]);
  }
  store_pack<T, V>(to.dx + offset, pack_of<T, V>(extra));
}

/// NHWC: A and B of a chunk of places. Grid: N * chunks, column blocks. Shared memory: 5 numbers per
/// column, then 2 per thread row and column. partial: (N, chunks, C, 2).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_sums_columns(NormBackward<T> p, NormShape shape, Chunks chunks, int columns,
                      float* partial) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int64_t n = chunks.sample(), chunk = chunks.chunk();
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* numbers = reinterpret_cast<float*>(memory);
  float* scratch = numbers + kChannelNumbers * width;
  column_numbers(p, shape, n, first, width, numbers);

  ColumnSums<V> sums;
  if (at.active) {
    const ColumnNumbers<V, kChannelNumbers> k(numbers, at);
    const InputChannel<T> in(p, ChannelPlace(shape, true, n, first + at.column));
    const int64_t end = chunks.end(chunk, shape.s);
#pragma unroll 2
    for (int64_t row = chunks.begin(chunk) + at.row; row < end; row += at.rows) {
      const int64_t place = (n * shape.s + row) * shape.c + first + at.column;
      sums.add(load_input<T, V>(in.x + row * in.step), load_input<T, V>(p.dy + place), k, p.silu);
    }
  }
  sum_rows(sums, at, scratch);
  if (!at.active || at.row != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float* out =
        partial + (static_cast<int64_t>(blockIdx.x) * shape.c + first + at.column + v) * 2;
    out[0] = sums.a[v];
    out[1] = sums.b[v];
  }
}

/// NCHW: A and B of a chunk of one channel, one warp each. Grid: ceil(N * C * chunks / warps).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_sums_rows(NormBackward<T> p, NormShape shape, Chunks chunks, float* partial) {
  const int64_t task =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;  // a whole warp
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c);
  const ChannelNumbers k = channel_numbers(p, shape, n, c);
  const InputChannel<T> in(p, ChannelPlace(shape, false, n, c));
  float a = 0, b = 0;
  const int64_t end = chunks.end(chunk, shape.s);
#pragma unroll 2
  for (int64_t i = chunks.begin(chunk) + threadIdx.x % kWarpSize * V; i < end;
       i += kWarpSize * V) {
    float x[V], dy[V];
    unpack(load_input<T, V>(in.x + i), x);
    unpack(load_input<T, V>(p.dy + row * shape.s + i), dy);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Slope at = slope<T>(x[v], dy[v], k, p.silu);
      a += at.df;
      b += at.df * at.xhat;
    }
  }
  a = warp_sum(a);
  b = warp_sum(b);
  if (threadIdx.x % kWarpSize != 0) return;
  float* out = partial + ((n * chunks.count + chunk) * shape.c + c) * 2;
  out[0] = a;
  out[1] = b;
}

/// Where the sums of a group are stored.
struct NormSums {
  float* sums;    // (N, C, 2): A and B
  float* means;   // (N, G, 2): p and q
  float* dscale;  // (N, 2C): gradient of scale_shift, or null
};

template <typename T>
__device__ __forceinline__ void store_sums(const NormBackward<T>& p, const NormShape& shape,
                                           int64_t n, int c, float a, float b,
                                           const NormSums& out) {
  out.sums[(n * shape.c + c) * 2] = a;
  out.sums[(n * shape.c + c) * 2 + 1] = b;
  if (out.dscale == nullptr) return;
  out.dscale[n * 2 * shape.c + c] = p.weight.at(c, 1.0f) * b + p.bias.at(c, 0.0f) * a;
  out.dscale[n * 2 * shape.c + shape.c + c] = a;
}

/// Merges the chunks of a group, one warp per channel. Grid: N * G.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_finalize_sums(NormBackward<T> p, NormShape shape, Chunks chunks, const float* partial,
                       NormSums out) {
  FASTDIFF_SHARED(float, scratch, 2 * kNormThreads / kWarpSize);
  const int64_t n = blockIdx.x / shape.groups;
  const int g = static_cast<int>(blockIdx.x % shape.groups);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  float p_sum = 0, q_sum = 0;
#pragma unroll 1
  for (int i = warp; i < shape.size; i += warps) {
    const int c = g * shape.size + i;
    float a = 0, b = 0;
    for (int64_t chunk = lane; chunk < chunks.count; chunk += kWarpSize) {
      const float* in = partial + ((n * chunks.count + chunk) * shape.c + c) * 2;
      a += in[0];
      b += in[1];
    }
    a = warp_sum(a);
    b = warp_sum(b);
    const float weight = p.weight.at(c, 1.0f);
    const float factor = weight * (1.0f + p.scale_shift.at(n * 2 * shape.c + c, 0.0f));
    p_sum += factor * a;
    q_sum += factor * b;
    if (lane == 0) store_sums(p, shape, n, c, a, b, out);
  }
  if (lane == 0) {
    scratch[2 * warp] = p_sum;
    scratch[2 * warp + 1] = q_sum;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[2 * w + threadIdx.x];
  out.means[static_cast<int64_t>(blockIdx.x) * 2 + threadIdx.x] =
      sum / (static_cast<float>(shape.size) * static_cast<float>(shape.s));
}

/// Gradients of weight and bias: sums over all samples, one thread per channel.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_parameter_gradients(NormBackward<T> p, NormShape shape, const float* sums,
                             float* dweight, float* dbias) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= shape.c) return;
  float a = 0, b = 0;
  for (int64_t n = 0; n < shape.n; ++n) {
    const float scale = 1.0f + p.scale_shift.at(n * 2 * shape.c + c, 0.0f);
    a += scale * sums[(n * shape.c + c) * 2];
    b += scale * sums[(n * shape.c + c) * 2 + 1];
  }
  if (dweight != nullptr) dweight[c] = b;
  if (dbias != nullptr) dbias[c] = a;
}

/// NHWC: dx. Grid: N * chunks, column blocks. Shared memory: 7 numbers per column.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_dx_columns(NormBackward<T> p, NormShape shape, Chunks chunks, int columns) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int64_t n = chunks.sample(), chunk = chunks.chunk();
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* numbers = reinterpret_cast<float*>(memory);
  column_numbers(p, shape, n, first, width, numbers);
  if (!at.active) return;
  const ColumnNumbers<V, kChannelNumbers + 2> k(numbers, at);
  const InputChannel<T> in(p, ChannelPlace(shape, true, n, first + at.column));
  const int64_t end = chunks.end(chunk, shape.s);
  for (int64_t row = chunks.begin(chunk) + at.row; row < end; row += at.rows) {
    const int64_t place = (n * shape.s + row) * shape.c + first + at.column;
    const int64_t offset = row * in.step;
    store_input_gradient(in, offset, load_input<T, V>(in.x + offset),
                         load_input<T, V>(p.dy + place), k, p.silu);
  }
}

/// NCHW: dx, one warp per chunk of one channel. Grid: ceil(N * C * chunks / warps).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_dx_rows(NormBackward<T> p, NormShape shape, Chunks chunks) {
  const int64_t task =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c);
  const ChannelNumbers k = channel_numbers(p, shape, n, c);
  const float* means = p.means + (n * shape.groups + c / shape.size) * 2;
  const float mean_p = means[0], mean_q = means[1];
  const InputChannel<T> in(p, ChannelPlace(shape, false, n, c));
  const int64_t end = chunks.end(chunk, shape.s);
#pragma unroll 2
  for (int64_t i = chunks.begin(chunk) + threadIdx.x % kWarpSize * V; i < end;
       i += kWarpSize * V) {
    float x[V], dy[V], extra[V] = {};
    unpack(load_input<T, V>(in.x + i), x);
    unpack(load_input<T, V>(p.dy + row * shape.s + i), dy);
    if (in.dtotal != nullptr) unpack(load_input<T, V>(in.dtotal + i), extra);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Slope at = slope<T>(x[v], dy[v], k, p.silu);
      x[v] = input_gradient(at, k, mean_p, mean_q) + extra[v];
    }
    store_pack<T, V>(in.dx + i, pack_of<T, V>(x));
  }
}

/// NHWC on chip: everything except the sums over N in one launch. A block has the same stretch of a slab
/// as in norm_on_chip_columns, with the same grid. Shared memory: the stretch of x, that of dy, 7 numbers
/// per column, 2 per group, 2 per column, in a cluster 2 per column and rank, then those of sum_rows.
template <typename T, int V, bool kCluster>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_backward_on_chip(NormBackward<T> p, NormShape shape, int slab, int64_t length,
                          NormSums out) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const Stretch mine = my_stretch<kCluster>(shape.s, length);
  const Slab here(shape, slab, mine.ranks);
  const int64_t n = here.n;
  const int width = here.width, first = here.first;
  const ColumnPlace<V> at(width);

  const int64_t most = kCluster ? length : shape.s, rows = mine.end - mine.begin;
  T* xs = reinterpret_cast<T*>(memory);
  T* dys = xs + most * width;
  float* numbers = reinterpret_cast<float*>(memory + (2 * most * width * sizeof(T) + 15) / 16 * 16);
  float* means = numbers + (kChannelNumbers + 2) * width;
  float* parts = means + 2 * here.groups;
  float* gathered = kCluster ? parts + 2 * width : parts;
  float* scratch = gathered + 2 * width * mine.ranks;

  column_numbers(p, shape, n, first, width, numbers);
  const InputChannel<T> in(p, ChannelPlace(shape, true, n, first + at.column));
  const T* dy_of = p.dy + (n * shape.s + mine.begin) * shape.c + first + at.column;
  ColumnSums<V> sums;
  if (at.active) {
    const ColumnNumbers<V, kChannelNumbers> k(numbers, at);
#pragma unroll 2
    for (int64_t row = at.row; row < rows; row += at.rows) {
      const auto x = load_input<T, V>(in.x + (mine.begin + row) * in.step);
      const auto dy = load_input<T, V>(dy_of + row * shape.c);
      store_pack<T, V>(xs + row * width + at.column, x);
      store_pack<T, V>(dys + row * width + at.column, dy);
      sums.add(x, dy, k, p.silu);
    }
  }
  sum_rows(sums, at, scratch);
  if (at.active && at.row == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      parts[2 * (at.column + v)] = sums.a[v];
      parts[2 * (at.column + v) + 1] = sums.b[v];
    }
  }
  gather_parts<kCluster>(parts, 2 * width, mine.ranks, gathered);

  // one warp per group: the sums of its channels, over all ranks in order, and their means
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll 1
  for (int g = static_cast<int>(threadIdx.x) / kWarpSize; g < here.groups; g += warps) {
    float p_sum = 0, q_sum = 0;
#pragma unroll 1
    for (int i = lane; i < shape.size; i += kWarpSize) {
      const int column = g * shape.size + i;
      float a = 0, b = 0;
      for (int r = 0; r < mine.ranks; ++r) {
        a += gathered[2 * (r * width + column)];
        b += gathered[2 * (r * width + column) + 1];
      }
      const float factor = numbers[3 * width + column];
      p_sum += factor * a;
      q_sum += factor * b;
      if (mine.rank == 0) store_sums(p, shape, n, first + column, a, b, out);
    }
    p_sum = warp_sum(p_sum);
    q_sum = warp_sum(q_sum);
    if (lane == 0) {
      const float count = static_cast<float>(shape.size) * static_cast<float>(shape.s);
      means[2 * g] = p_sum / count;
      means[2 * g + 1] = q_sum / count;
    }
  }
  __syncthreads();
  float* mean_p = numbers + kChannelNumbers * width;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    mean_p[i] = means[2 * (i / shape.size)];
    mean_p[width + i] = means[2 * (i / shape.size) + 1];
  }
  __syncthreads();
  if (at.active) {
    const ColumnNumbers<V, kChannelNumbers + 2> k(numbers, at);
    for (int64_t row = at.row; row < rows; row += at.rows)
      store_input_gradient(in, (mine.begin + row) * in.step,
                           load_pack<T, V>(xs + row * width + at.column),
                           load_pack<T, V>(dys + row * width + at.column), k, p.silu);
  }
  leave_cluster<kCluster>();
}

}  // namespace fastdiff
