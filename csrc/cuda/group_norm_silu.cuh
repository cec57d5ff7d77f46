// GroupNorm, scale and shift, SiLU, optionally after an addition (kernels/group_norm_silu and
// kernels/add_group_norm_silu document the maths).
//
// Two layouts: "columns" is NHWC, with a row of C channels per place (spatial position); "rows" is
// NCHW, with a row of S places per channel. Two strategies:
//   on chip   whole groups of one sample are held in the shared memory of one block, or (sm_90) of
//             the blocks of a cluster, each with a stretch of the places: x is read once
//   in parts  moments of chunks -> one block per group merges them -> an elementwise pass; x is read
//             twice, in full rows of channels (a group of ten bf16 channels is 20 bytes, so single
//             groups would be poorly aligned)
// Bytes: 2 N C S itemsize on chip, 3 in parts (1 or 2 more with an addition, which writes the sum).
// norm_plan.h chooses. The on-chip kernels are in group_norm_silu_on_chip.cuh. None of the kernels
// has run on a GPU yet.
//
// Precision: moments are taken of x - pivot, where pivot is the group's first element, in batches that
// are merged with Chan's formula. The mean is stored as a rounded `mean` and its `rest`, so that
// (x - mean) * a + b, with -rest * a in b, keeps its precision when the mean is large. All merges have
// a fixed order that depends only on the shape of one sample.

#pragma once

#include "common.cuh"

namespace fastdiff {

struct NormShape {
  int64_t n, s;         // samples, places
  int c, groups, size;  // channels, groups, channels per group
};

/// Arguments of the forward kernels.
template <typename T>
struct Norm {
  const T* x;
  const T* residual;       // null: none (like the next three, only for the op that adds)
  Parameter channel_add;   // (C,) or (N, C)
  int64_t channel_add_stride;
  T* total;                // the sum, or null if nothing is added
  T* y;
  Parameter weight, bias;  // (C,)
  Parameter scale_shift;   // (N, 2C)
  float* stats;            // (N, G, 3): mean, rest of the mean, 1 / std
  float eps;
  bool silu;
};

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;  // per multiprocessor; without this bound ptxas spills to fit more
constexpr int kNormBatch = 4;  // packs that a thread loads before it merges them

template <typename T>
__device__ __forceinline__ float channel_addend(const Norm<T>& p, int64_t n, int c) {
  return p.channel_add.at(n * p.channel_add_stride + c, 0.0f);
}

/// x + channel_add + residual, rounded to T; just x if nothing is added.
template <typename T>
__device__ __forceinline__ float source_at(const Norm<T>& p, int64_t n, int c, int64_t place) {
  float x = to_float(p.x[place]);
  if (p.total != nullptr) {
    x += channel_addend(p, n, c);
    if (p.residual != nullptr) x += to_float(p.residual[place]);
    x = to_float(from_float<T>(x));
  }
  return x;
}

/// Loads a pack and, if there are addends, adds them and writes the total. Returns the input of the
/// norm. add: one number per column, `add_step` apart (0: one for all).
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_source(const Norm<T>& p, int64_t place,
                                                  const float* add, int add_step) {
  Pack<T, V> pack = load_input<T, V>(p.x + place);
  if (p.total != nullptr) {
    float x[V];
    unpack(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += add[v * add_step];
    if (p.residual != nullptr) {
      float r[V];
      unpack(load_input<T, V>(p.residual + place), r);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] += r[v];
    }
    pack = pack_of<T, V>(x);
    store_pack<T, V>(p.total + place, pack);
  }
  return pack;
}

/// A channel's factor and addend, f = xhat * a + b with a = weight (1 + scale), in fp64: there are
/// few of them, and a is then rounded only once, after it is multiplied by 1 / std.
struct Affine {
  double a, b;
};

__device__ __forceinline__ Affine affine(const Parameter& weight, const Parameter& bias,
                                         const Parameter& scale_shift, const NormShape& shape,
                                         int64_t n, int c) {
  const int64_t film = n * 2 * shape.c + c;
  const double scale = 1.0 + scale_shift.at(film, 0.0f);
  return {weight.at(c, 1.0f) * scale,
          bias.at(c, 0.0f) * scale + scale_shift.at(film + shape.c, 0.0f)};
}

/// Coefficients that turn x into the input of the activation: (x - mean) * a + b.
struct Coefficients {
  float mean, a, b;
};

template <typename T>
__device__ __forceinline__ Coefficients coefficients(const Norm<T>& p, const NormShape& shape,
                                                     int64_t n, int c, const float* stats) {
  const Affine k = affine(p.weight, p.bias, p.scale_shift, shape, n, c);
  const double a = k.a * stats[2];
  return {stats[0], static_cast<float>(a), static_cast<float>(k.b - stats[1] * a)};
}

/// Writes mean, rest and 1 / std of a group whose moments are relative to the pivot.
__device__ __forceinline__ void store_stats(float* stats, float pivot, float mean, float m2,
                                            float count, float eps) {
  const float rounded = pivot + mean;
  stats[0] = rounded;
  stats[1] = (pivot - rounded) + mean;
  stats[2] = static_cast<float>(1.0 / sqrt(static_cast<double>(m2) / count + eps));
}

template <typename T>
__device__ __forceinline__ float activate(float f, bool silu) {
  return silu ? f * sigmoid<T>(f) : f;
}

/// Count, mean and squared deviations of V columns at once.
template <int V>
struct ColumnMoments {
  float count = 0, mean[V] = {}, m2[V] = {};

  __device__ __forceinline__ void merge_column(int v, float other_count, float other_mean,
                                               float other_m2) {
    const float share = other_count / (count + other_count), delta = other_mean - mean[v];
    mean[v] += delta * share;
    m2[v] += other_m2 + delta * delta * count * share;
  }

  /// Adds `rows` (1 to kNormBatch) elements of every column.
  __device__ __forceinline__ void add(const float (&d)[kNormBatch][V], int rows) {
    const float inverse = 1.0f / static_cast<float>(rows);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kNormBatch; ++i) sum += i < rows ? d[i][v] : 0.0f;
      const float mean_of_rows = sum * inverse;
#pragma unroll
      for (int i = 0; i < kNormBatch; ++i) {
        const float deviation = d[i][v] - mean_of_rows;
        squares += i < rows ? deviation * deviation : 0.0f;
      }
      merge_column(v, static_cast<float>(rows), mean_of_rows, squares);
    }
    count += static_cast<float>(rows);
  }
};

/// How a block covers rows of `width` channels: a thread always has the same V columns and processes
/// every `rows`-th row.
template <int V>
struct ColumnPlace {
  int packs, rows, column, row;  // packs per row, rows at a time, this thread's position
  bool active;

  __device__ __forceinline__ explicit ColumnPlace(int width)
      : packs(width / V),
        rows(static_cast<int>(blockDim.x) / packs),
        column(static_cast<int>(threadIdx.x) % packs * V),
        row(static_cast<int>(threadIdx.x) / packs),
        active(row < rows) {}
};

/// Per column of the block: its group's pivot and, `width` further on, its channel_add.
template <typename T>
__device__ __forceinline__ void column_heads(const Norm<T>& p, const NormShape& shape, int64_t n,
                                             int first, int width, float* heads) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int leader = (first + i) / shape.size * shape.size;
    heads[i] = source_at(p, n, leader, n * shape.s * shape.c + leader);
    heads[width + i] = channel_addend(p, n, first + i);
  }
  __syncthreads();
}

/// Per column of the block: mean, a and b, each `width` apart. stats: starts at the first group.
template <typename T>
__device__ __forceinline__ void column_coefficients(const Norm<T>& p, const NormShape& shape,
                                                    int64_t n, int first, int width,
                                                    const float* stats, float* out) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int group = (first + i) / shape.size - first / shape.size;
    const Coefficients k = coefficients(p, shape, n, first + i, stats + 3 * group);
    out[i] = k.mean;
    out[width + i] = k.a;
    out[2 * width + i] = k.b;
  }
  __syncthreads();
}

/// A thread's columns of the coefficients written by `column_coefficients`.
template <int V>
struct ColumnCoefficients {
  float mean[V], a[V], b[V];

  __device__ __forceinline__ ColumnCoefficients(const float* numbers, const ColumnPlace<V>& at) {
    const int width = at.packs * V;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = numbers[at.column + v];
      a[v] = numbers[width + at.column + v];
      b[v] = numbers[2 * width + at.column + v];
    }
  }
};

/// Moments of this thread's columns over rows [begin, end); stores the elements to `tile` if not null.
template <typename T, int V>
__device__ __forceinline__ ColumnMoments<V> column_moments(const Norm<T>& p,
                                                           const NormShape& shape, int64_t n,
                                                           int first, int64_t begin, int64_t end,
                                                           const ColumnPlace<V>& at,
                                                           const float* heads, T* tile) {
  ColumnMoments<V> moments;
  if (!at.active) return moments;
  const int width = at.packs * V;
  const int64_t origin = n * shape.s * shape.c + first + at.column;
  float pivot[V];
#pragma unroll
  for (int v = 0; v < V; ++v) pivot[v] = heads[at.column + v];
  const float* add = heads + width + at.column;
  for (int64_t row = begin + at.row; row < end; row += at.rows * kNormBatch) {
    float d[kNormBatch][V];
    int rows = 0;
#pragma unroll
    for (int i = 0; i < kNormBatch; ++i) {
      const int64_t r = row + i * at.rows;
      if (r < end) {
        const auto pack = load_source<T, V>(p, origin + r * shape.c, add, 1);
        if (tile != nullptr) store_pack<T, V>(tile + (r - begin) * width + at.column, pack);
        unpack(pack, d[i]);
        ++rows;
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) d[i][v] = pivot[v];
      }
    }
#pragma unroll
    for (int i = 0; i < kNormBatch; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) d[i][v] -= pivot[v];
    moments.add(d, rows);
  }
  return moments;
}

/// Merges the moments of all threads with the same columns. Afterwards `scratch` begins with the mean
/// of every column, followed (rows * width further on) by its m2, and the threads of row 0 hold both.
template <int V>
__device__ __forceinline__ void merge_rows(ColumnMoments<V>& mine, const ColumnPlace<V>& at,
                                           float* scratch) {
  const int width = at.packs * V;
  float* means = scratch;
  float* m2s = scratch + at.rows * width;
  float* counts = m2s + at.rows * width;
  if (at.active) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      means[at.row * width + at.column + v] = mine.mean[v];
      m2s[at.row * width + at.column + v] = mine.m2[v];
    }
    if (at.column == 0) counts[at.row] = mine.count;
  }
  __syncthreads();
  int half = 1;
  while (2 * half < at.rows) half *= 2;
  for (; half > 0; half /= 2) {
    const int other = at.row + half;
    if (at.row < half && other < at.rows && counts[other] > 0) {
      const float count = counts[other];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int from = other * width + at.column + v, to = at.row * width + at.column + v;
        mine.merge_column(v, count, means[from], m2s[from]);
        means[to] = mine.mean[v];
        m2s[to] = mine.m2[v];
      }
      mine.count += count;
      if (at.column == 0) counts[at.row] = mine.count;  // rows below half are only read later
    }
    __syncthreads();
  }
}

/// Adds `packs` packs of d to the moments of one group.
template <int V>
__device__ __forceinline__ void add_packs(Moments& moments, const float (&d)[kNormBatch][V],
                                          int packs) {
  Moments batch;
  batch.count = static_cast<float>(packs * V);
#pragma unroll
  for (int i = 0; i < kNormBatch; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) batch.mean += i < packs ? d[i][v] : 0.0f;
  batch.mean /= batch.count;
#pragma unroll
  for (int i = 0; i < kNormBatch; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float deviation = d[i][v] - batch.mean;
      batch.m2 += i < packs ? deviation * deviation : 0.0f;
    }
  moments.merge(batch);
}

// ---------------------------------------------------------------------------------------------
// In parts. partial: (N, chunks, C, 2), the mean and m2 of a channel over a chunk of places.

struct Chunks {
  int64_t count, length;

  /// Sample and chunk of a block, for a grid of N * count. Both fit in 32 bits: a 64-bit division is a
  /// function call, around which registers spill.
  __device__ __forceinline__ int64_t sample() const {
    return blockIdx.x / static_cast<unsigned>(count);
  }
  __device__ __forceinline__ int64_t chunk() const {
    return blockIdx.x % static_cast<unsigned>(count);
  }
  __device__ __forceinline__ int64_t begin(int64_t i) const { return i * length; }
  __device__ __forceinline__ int64_t end(int64_t i, int64_t s) const {
    return (i + 1) * length < s ? (i + 1) * length : s;
  }
};

/// Number of columns of this block, if grid.y blocks share the channels, `columns` each.
__device__ __forceinline__ int columns_here(const NormShape& shape, int columns) {
  return min(columns, shape.c - static_cast<int>(blockIdx.y) * columns);
}

/// NHWC. Grid: N * chunks, column blocks. Shared memory: 2 numbers per column, then those of
/// merge_rows.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_moments_columns(Norm<T> p, NormShape shape, Chunks chunks, int columns, float* partial) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int64_t n = chunks.sample(), chunk = chunks.chunk();
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* heads = reinterpret_cast<float*>(memory);
  column_heads(p, shape, n, first, width, heads);
  T* no_tile = nullptr;
  auto moments = column_moments<T, V>(p, shape, n, first, chunks.begin(chunk),
                                      chunks.end(chunk, shape.s), at, heads, no_tile);
  merge_rows(moments, at, heads + 2 * width);
  if (!at.active || at.row != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float* out = partial + (static_cast<int64_t>(blockIdx.x) * shape.c + first + at.column + v) * 2;
    out[0] = moments.mean[v];
    out[1] = moments.m2[v];
  }
}

/// NCHW. A warp processes one chunk of one channel. Grid: ceil(N * C * chunks / warps).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_moments_rows(Norm<T> p, NormShape shape, Chunks chunks, float* partial) {
  const int64_t task =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;  // a whole warp
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c), leader = c / shape.size * shape.size;
  const float pivot = source_at(p, n, leader, (n * shape.c + leader) * shape.s);
  const float add = channel_addend(p, n, c);
  Moments moments;
  const int64_t end = chunks.end(chunk, shape.s);
  constexpr int64_t kStep = kWarpSize * V;
  for (int64_t i = chunks.begin(chunk) + threadIdx.x % kWarpSize * V; i < end;
       i += kStep * kNormBatch) {
    float d[kNormBatch][V];
    int taken = 0;
#pragma unroll
    for (int j = 0; j < kNormBatch; ++j) {
#pragma unroll
      for (int v = 0; v < V; ++v) d[j][v] = pivot;
      if (i + j * kStep >= end) continue;
      unpack(load_source<T, V>(p, row * shape.s + i + j * kStep, &add, 0), d[j]);
      ++taken;
    }
#pragma unroll
    for (int j = 0; j < kNormBatch; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) d[j][v] -= pivot;
    add_packs(moments, d, taken);
  }
  moments = warp_merge(moments);
  if (threadIdx.x % kWarpSize != 0) return;
  float* out = partial + ((n * chunks.count + chunk) * shape.c + c) * 2;
  out[0] = moments.mean;
  out[1] = moments.m2;
}

/// Merges the parts of a group, in either layout: `source` is x, or the total if there is one, and
/// `step` the distance between the first elements of two channels. Grid: N * G.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_finalize(Norm<T> p, NormShape shape, Chunks chunks, const float* partial,
                  const T* source, int64_t step) {
  FASTDIFF_SHARED(float, scratch, 3 * kNormThreads / kWarpSize);
  const int64_t n = blockIdx.x / shape.groups;
  const int g = static_cast<int>(blockIdx.x % shape.groups);
  Moments moments;
  const unsigned parts = static_cast<unsigned>(chunks.count) * shape.size;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < parts; i += blockDim.x) {
    const unsigned chunk = i / shape.size, c = g * shape.size + i % shape.size;
    const float* in = partial + ((n * chunks.count + chunk) * shape.c + c) * 2;
    Moments part;
    part.count = static_cast<float>(chunks.end(chunk, shape.s) - chunks.begin(chunk));
    part.mean = in[0];
    part.m2 = in[1];
    moments.merge(part);
  }
  moments = block_merge(moments, scratch);
  if (threadIdx.x != 0) return;
  const float pivot = to_float(source[n * shape.c * shape.s + g * shape.size * step]);
  store_stats(p.stats + static_cast<int64_t>(blockIdx.x) * 3, pivot, moments.mean, moments.m2,
              moments.count, p.eps);
}

/// NHWC. Grid: N * chunks, column blocks. Shared memory: 3 numbers per column.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_apply_columns(Norm<T> p, NormShape shape, Chunks chunks, int columns, const T* source) {
  const int64_t n = chunks.sample(), chunk = chunks.chunk();
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* numbers = reinterpret_cast<float*>(memory);
  column_coefficients(p, shape, n, first, width,
                      p.stats + (n * shape.groups + first / shape.size) * 3, numbers);
  if (!at.active) return;
  const ColumnCoefficients<V> k(numbers, at);
  const int channel = first + at.column;
  const int64_t end = chunks.end(chunk, shape.s);
#pragma unroll 4
  for (int64_t row = chunks.begin(chunk) + at.row; row < end; row += at.rows) {
    const int64_t place = (n * shape.s + row) * shape.c + channel;
    float x[V];
    unpack(load_input<T, V>(source + place), x);
#pragma unroll
    for (int v = 0; v < V; ++v)
      x[v] = activate<T>((x[v] - k.mean[v]) * k.a[v] + k.b[v], p.silu);
    store_pack<T, V>(p.y + place, pack_of<T, V>(x));
  }
}

/// NCHW. A warp processes one chunk of one channel. Grid: ceil(N * C * chunks / warps).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_apply_rows(Norm<T> p, NormShape shape, Chunks chunks, const T* source) {
  const int64_t task =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c);
  const Coefficients k = coefficients(
      p, shape, n, c, p.stats + (n * shape.groups + c / shape.size) * 3);
  const int64_t end = chunks.end(chunk, shape.s);
#pragma unroll 4
  for (int64_t i = chunks.begin(chunk) + threadIdx.x % kWarpSize * V; i < end;
       i += kWarpSize * V) {
    const int64_t place = row * shape.s + i;
    float x[V];
    unpack(load_input<T, V>(source + place), x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = activate<T>((x[v] - k.mean) * k.a + k.b, p.silu);
    store_pack<T, V>(p.y + place, pack_of<T, V>(x));
  }
}

}  // namespace fastdiff
