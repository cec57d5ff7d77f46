// GroupNorm, scale and shift, SiLU, optionally after an addition and a concatenation
// (kernels/group_norm_silu, add_group_norm_silu and cat_group_norm_silu document the maths).
//
// Two layouts: "columns" is NHWC, with a row of C channels per place (spatial position); "rows" is
// NCHW, with a row of S places per channel. Two strategies:
//   on chip   whole groups of one sample are held in the shared memory of one block, or (sm_90) of
//             the blocks of a cluster, each with a stretch of the places: x is read once
//   in parts  moments of chunks -> one block per group merges them -> an elementwise pass; x is read
//             twice, in full rows of channels (a group of ten bf16 channels is 20 bytes, so single
//             groups would be poorly aligned)
// Bytes: 2 N C S itemsize on chip, 3 in parts (1 or 2 more with an addition, which writes the sum).
// Of two inputs, x and skip, each channel is read where it lies: a thread's columns are channels of one
// of the two, since packs do not cross the border, so the concatenation costs no instruction per number.
// norm_plan.h chooses. The on-chip kernels are in group_norm_silu_on_chip.cuh. None of the kernels
// has run on a GPU yet.
//
// Precision: a thread sums x - pivot and its square, where pivot is its own first element of a column
// (ShiftedSums says why that is enough). The moments of threads, relative to the group's first element,
// are merged once, at the end. The mean is stored as a rounded `mean` and its `rest`, so that
// (x - mean) * a + b, with -rest * a in b, keeps its precision when the mean is large. All merges have
// a fixed order that depends only on the shape of one sample.

#pragma once

#include "mma.cuh"

namespace fastdiff {

struct NormShape {
  int64_t n, s;         // samples, places
  int c, groups, size;  // channels, groups, channels per group
  int split;            // channels of x; those from `split` on are the channels of skip
};

/// Where a channel of a sample is stored: in x (or residual, total, dx), or in skip (or dskip).
struct ChannelPlace {
  bool in_skip;
  int64_t first, step;  // of its places

  __device__ __forceinline__ ChannelPlace(const NormShape& shape, bool channels_last, int64_t n,
                                          int c)
      : in_skip(c >= shape.split) {
    const int width = in_skip ? shape.c - shape.split : shape.split;
    const int own = in_skip ? c - shape.split : c;
    first = channels_last ? n * shape.s * width + own : (n * width + own) * shape.s;
    step = channels_last ? width : 1;
  }

  /// The tensor's first place of this channel.
  template <typename T>
  __device__ __forceinline__ T* of(T* x, T* skip) const {
    return (in_skip ? skip : x) + first;
  }
  /// The same for a tensor that may be absent and has the channels of x only.
  template <typename T>
  __device__ __forceinline__ T* of_x(T* x) const {
    return in_skip || x == nullptr ? nullptr : x + first;
  }
};

/// Arguments of the forward kernels. x, residual and total have the first `split` channels.
template <typename T>
struct Norm {
  const T* x;
  const T* skip;           // null: none
  const T* residual;       // null: none (like the next three, only for the ops that add)
  Parameter channel_add;   // (split,) or (N, split)
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
constexpr int kNormBatch = 4;  // packs that a thread loads before it uses the first
/// Packs of x; the op that adds loads as many of the residual.
template <bool kAdd>
constexpr int kSourceBatch = kAdd ? kNormBatch / 2 : kNormBatch;

template <typename T>
__device__ __forceinline__ float channel_addend(const Norm<T>& p, const NormShape& shape,
                                                int64_t n, int c) {
  return c < shape.split ? p.channel_add.at(n * p.channel_add_stride + c, 0.0f) : 0.0f;
}

/// What is summed in one channel of a sample, or in V neighboring ones, and where the sum is stored.
template <typename T>
struct Summands {
  const T* x;
  const T* residual;  // null: none
  T* total;           // null: nothing is added
  int64_t step;       // between places
};

template <typename T>
__device__ __forceinline__ Summands<T> summands(const Norm<T>& p, const ChannelPlace& at) {
  return {at.of(p.x, p.skip), at.of_x(p.residual), at.of_x(p.total), at.step};
}

/// A group's first element, the pivot of its moments: x + channel_add + residual, rounded to T.
template <typename T>
__device__ __forceinline__ float first_of_group(const Norm<T>& p, const NormShape& shape,
                                                bool channels_last, int64_t n, int c) {
  const Summands<T> of = summands(p, ChannelPlace(shape, channels_last, n, c));
  float x = to_float(*of.x);
  if (of.total != nullptr) {
    x += channel_addend(p, shape, n, c);
    if (of.residual != nullptr) x += to_float(*of.residual);
    x = to_float(from_float<T>(x));
  }
  return x;
}

/// A pack of x and, for the ops that add (kAdd), of the residual.
template <bool kAdd, typename T, int V>
struct Source {
  Pack<T, V> x, residual;

  __device__ __forceinline__ void load(const Summands<T>& of, int64_t offset) {
    x = load_input<T, V>(of.x + offset);
    if constexpr (kAdd)
      if (of.residual != nullptr) residual = load_input<T, V>(of.residual + offset);
  }

  /// The input of the norm, rounded to T. add: one number per column, `add_step` apart (0: one for
  /// all).
  __device__ __forceinline__ Pack<T, V> total(const Summands<T>& of, const float* add,
                                              int add_step) const {
    if constexpr (!kAdd) return x;
    float sum[V];
    unpack(x, sum);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += add[v * add_step];
    if (of.residual != nullptr) {
      float r[V];
      unpack(residual, r);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += r[v];
    }
    return pack_of<T, V>(sum);
  }
};

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

/// A number that has the same value in every column.
struct Same {
  float value;
  __device__ __forceinline__ float operator[](int) const { return value; }
};

/// Coefficients of a pack that lies in one channel.
struct OneChannel {
  Same mean, a, b;
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

template <bool kSilu, typename T>
__device__ __forceinline__ float activate(float f) {
  return kSilu ? f * sigmoid<T>(f) : f;
}

/// Sums of x - pivot and of its square in V columns, for one thread. With the thread's own first
/// element as the pivot, sum (x_i - x_1)^2 <= n sum (x_i - mean)^2 for its n elements, however far the
/// first is from the others: m2 is a difference that loses at most log2(n) bits, and one bit if the
/// first is as good as any.
template <int V>
struct ShiftedSums {
  float pivot[V], sum[V] = {}, squares[V] = {};

  template <typename T>
  __device__ __forceinline__ void start(const Pack<T, V>& first) {
    unpack(first, pivot);
  }

  template <typename T>
  __device__ __forceinline__ void add(const Pack<T, V>& pack) {
    float x[V];
    unpack(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float d = x[v] - pivot[v];
      sum[v] += d;
      squares[v] += d * d;
    }
  }

  /// Mean of a column's elements relative to `head`; inverse: 1 / their count.
  __device__ __forceinline__ float mean(int v, float head, float inverse) const {
    return (pivot[v] - head) + sum[v] * inverse;
  }
  __device__ __forceinline__ float m2(int v, float inverse) const {
    const float rest = squares[v] - sum[v] * sum[v] * inverse;
    return rest < 0 ? 0.0f : rest;  // keeps NaN
  }

  /// The moments of all columns together, `count` elements of each; head: see `mean`.
  __device__ __forceinline__ Moments merged(float count, float head) const {
    Moments all;
    if (count == 0) return all;
    const float inverse = 1.0f / count;
    float means[V];
#pragma unroll
    for (int v = 0; v < V; ++v) all.mean += means[v] = mean(v, head, inverse);
    all.mean *= 1.0f / V;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float delta = means[v] - all.mean;
      all.m2 += m2(v, inverse) + count * delta * delta;
    }
    all.count = count * V;
    return all;
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

  /// How many of `all` rows the threads of a row process.
  __device__ __forceinline__ int count(int all, int of_row) const {
    return all / rows + (of_row < all % rows);
  }
};

/// Per column of the block: its group's pivot and, `width` further on, its channel_add.
template <typename T>
__device__ __forceinline__ void column_heads(const Norm<T>& p, const NormShape& shape, int64_t n,
                                             int first, int width, float* heads) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int leader = (first + i) / shape.size * shape.size;
    heads[i] = first_of_group(p, shape, true, n, leader);
    heads[width + i] = channel_addend(p, shape, n, first + i);
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

/// V numbers of shared memory, in words of up to 16 bytes: neighboring lanes lie V numbers apart, so in
/// words of 4 bytes the lanes of a warp would meet in 4 of the 32 banks, 8 at a time.
template <int V>
__device__ __forceinline__ void load_numbers(const float* from, float (&to)[V]) {
  constexpr int kWord = V < 4 ? V : 4;
#pragma unroll
  for (int v = 0; v < V; v += kWord) {
    const auto word = load_pack<float, kWord>(from + v);
#pragma unroll
    for (int i = 0; i < kWord; ++i) to[v + i] = word.data[i];
  }
}

template <int V>
__device__ __forceinline__ void store_numbers(float* to, const float (&from)[V]) {
  constexpr int kWord = V < 4 ? V : 4;
#pragma unroll
  for (int v = 0; v < V; v += kWord) {
    Pack<float, kWord> word;
#pragma unroll
    for (int i = 0; i < kWord; ++i) word.data[i] = from[v + i];
    store_pack<float, kWord>(to + v, word);
  }
}

/// A thread's columns of the coefficients written by `column_coefficients`, at a multiple of 16 bytes.
template <int V>
struct ColumnCoefficients {
  float mean[V], a[V], b[V];

  __device__ __forceinline__ ColumnCoefficients(const float* numbers, const ColumnPlace<V>& at) {
    const int width = at.packs * V;
    load_numbers<V>(numbers + at.column, mean);
    load_numbers<V>(numbers + width + at.column, a);
    load_numbers<V>(numbers + 2 * width + at.column, b);
  }
};

/// Sums of this thread's columns over rows [begin, end), which are read from global memory. For the op
/// that adds, writes the total; stores the elements to `tile` if it is not null.
template <bool kAdd, typename T, int V>
__device__ __forceinline__ ShiftedSums<V> column_sums(const Norm<T>& p, const NormShape& shape,
                                                     int64_t n, int first, int64_t begin,
                                                     int64_t end, const ColumnPlace<V>& at,
                                                     const float* heads, T* tile) {
  ShiftedSums<V> sums;
  int64_t row = begin + at.row;
  if (!at.active || row >= end) return sums;
  const int width = at.packs * V;
  const float* add = heads + width + at.column;
  const Summands<T> of = summands(p, ChannelPlace(shape, true, n, first + at.column));
  const int64_t step = at.rows * of.step;
  int64_t place = row * of.step;
  T* to = tile == nullptr ? nullptr : tile + at.row * width + at.column;
  using From = Source<kAdd, T, V>;
  constexpr int kBatch = kSourceBatch<kAdd>;
  const auto use = [&](const From& from, int64_t i) {
    const Pack<T, V> pack = from.total(of, add, 1);
    if constexpr (kAdd)
      if (of.total != nullptr) store_pack<T, V>(of.total + place + i * step, pack);
    if (tile != nullptr) store_pack<T, V>(to + i * at.rows * width, pack);
    sums.add(pack);
  };
  From head;
  head.load(of, place);  // and again below, so that it is on its way along with the others
  sums.start(head.total(of, add, 1));
  for (; row + (kBatch - 1) * at.rows < end; row += kBatch * at.rows) {
    From from[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) from[i].load(of, place + i * step);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) use(from[i], i);
    place += kBatch * step;
    if (tile != nullptr) to += kBatch * at.rows * width;
  }
  for (; row < end; row += at.rows) {
    From from;
    from.load(of, place);
    use(from, 0);
    place += step;
    if (tile != nullptr) to += at.rows * width;
  }
  return sums;
}

/// Writes mean (relative to the group's head) and m2 of this thread's columns over its part of `all`
/// rows to scratch: means first, m2 `rows` * width further on. Heads and scratch begin at multiples of
/// 16 bytes. Ends with a barrier.
template <int V>
__device__ __forceinline__ void publish(const ShiftedSums<V>& sums, const ColumnPlace<V>& at,
                                        int all, const float* heads, float* scratch) {
  const int width = at.packs * V;
  if (at.active) {
    const int count = at.count(all, at.row);
    const float inverse = 1.0f / static_cast<float>(count);
    float* means = scratch + at.row * width + at.column;
    float head[V], mean[V], m2[V];
    load_numbers<V>(heads + at.column, head);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = count ? sums.mean(v, head[v], inverse) : 0.0f;
      m2[v] = count ? sums.m2(v, inverse) : 0.0f;
    }
    store_numbers<V>(means, mean);
    store_numbers<V>(means + at.rows * width, m2);
  }
  __syncthreads();
}

/// y for `count` packs: from `from` (shared memory, or with kGlobal global memory) to `to`.
template <bool kGlobal, bool kSilu, typename T, int V, typename K>
__device__ __forceinline__ void write_result(const T* from, int64_t from_step, T* to,
                                             int64_t to_step, int count, const K& k) {
  const auto load = [](const T* at) {
    return kGlobal ? load_last<T, V>(at) : load_pack<T, V>(at);
  };
  const auto store = [&](T* at, const Pack<T, V>& pack) {
    float x[V];
    unpack(pack, x);
#pragma unroll
    for (int v = 0; v < V; ++v)
      x[v] = activate<kSilu, T>((x[v] - k.mean[v]) * k.a[v] + k.b[v]);
    store_pack<T, V>(at, pack_of<T, V>(x));
  };
  for (; count >= kNormBatch; count -= kNormBatch) {
    Pack<T, V> packs[kNormBatch];
#pragma unroll
    for (int i = 0; i < kNormBatch; ++i) packs[i] = load(from + i * from_step);
#pragma unroll
    for (int i = 0; i < kNormBatch; ++i) store(to + i * to_step, packs[i]);
    from += kNormBatch * from_step;
    to += kNormBatch * to_step;
  }
  for (; count > 0; --count) {
    store(to, load(from));
    from += from_step;
    to += to_step;
  }
}

// ---------------------------------------------------------------------------------------------
// In parts. partial: (N, chunks, C, 2), the mean and m2 of a channel over a chunk of places.

/// The blocks of a second pass over x begin with what the first pass read last: as much of it as the L2
/// holds is still there. From the first place on, each read would miss what the one before has evicted.
__device__ __forceinline__ unsigned from_the_end() { return gridDim.x - 1 - blockIdx.x; }

struct Chunks {
  int64_t count, length;

  /// Sample and chunk of a block, for a grid of N * count. Both fit in 32 bits: a 64-bit division is a
  /// function call, around which registers spill.
  __device__ __forceinline__ int64_t sample(unsigned block) const {
    return block / static_cast<unsigned>(count);
  }
  __device__ __forceinline__ int64_t chunk(unsigned block) const {
    return block % static_cast<unsigned>(count);
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
/// `publish`.
template <typename T, int V, bool kAdd>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_moments_columns(Norm<T> p, NormShape shape, Chunks chunks, int columns, float* partial) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int64_t n = chunks.sample(blockIdx.x), chunk = chunks.chunk(blockIdx.x);
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* heads = reinterpret_cast<float*>(memory);
  column_heads(p, shape, n, first, width, heads);
  T* no_tile = nullptr;
  const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk, shape.s);
  const auto sums = column_sums<kAdd, T, V>(p, shape, n, first, begin, end, at, heads, no_tile);
  const int all = static_cast<int>(end - begin);
  float* means = heads + 2 * width;
  const float* m2s = means + at.rows * width;
  publish(sums, at, all, heads, means);
  const float inverse = 1.0f / static_cast<float>(all);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    float mean = 0, m2 = 0;
#pragma unroll 1
    for (int r = 0; r < at.rows; ++r)
      mean += static_cast<float>(at.count(all, r)) * means[r * width + i];
    mean *= inverse;
#pragma unroll 1
    for (int r = 0; r < at.rows; ++r) {
      const float delta = means[r * width + i] - mean;
      m2 += m2s[r * width + i] + static_cast<float>(at.count(all, r)) * delta * delta;
    }
    float* out = partial + (static_cast<int64_t>(blockIdx.x) * shape.c + first + i) * 2;
    out[0] = mean;
    out[1] = m2;
  }
}

/// NCHW. A warp processes one chunk of one channel. Grid: ceil(N * C * chunks / warps).
template <typename T, int V, bool kAdd>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_moments_rows(Norm<T> p, NormShape shape, Chunks chunks, float* partial) {
  const int64_t task =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;  // a whole warp
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c), leader = c / shape.size * shape.size;
  const float pivot = first_of_group(p, shape, false, n, leader);
  const float add = channel_addend(p, shape, n, c);
  const Summands<T> of = summands(p, ChannelPlace(shape, false, n, c));
  constexpr int64_t kStep = kWarpSize * V;
  int64_t place = chunks.begin(chunk) + threadIdx.x % kWarpSize * V;
  const int64_t end = chunks.end(chunk, shape.s);
  int count = place < end ? static_cast<int>((end - place + kStep - 1) / kStep) : 0;
  const float taken = static_cast<float>(count);
  ShiftedSums<V> sums;
  using From = Source<kAdd, T, V>;
  constexpr int kBatch = kSourceBatch<kAdd>;
  const auto use = [&](const From& from, int64_t at) {
    const Pack<T, V> pack = from.total(of, &add, 0);
    if constexpr (kAdd)
      if (of.total != nullptr) store_pack<T, V>(of.total + at, pack);
    sums.add(pack);
  };
  if (count > 0) {
    From head;
    head.load(of, place);
    sums.start(head.total(of, &add, 0));
  }
  for (; count >= kBatch; count -= kBatch) {
    From from[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) from[j].load(of, place + j * kStep);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) use(from[j], place + j * kStep);
    place += kBatch * kStep;
  }
  for (; count > 0; --count, place += kStep) {
    From from;
    from.load(of, place);
    use(from, place);
  }
  const Moments moments = warp_merge(sums.merged(taken, pivot));
  if (threadIdx.x % kWarpSize != 0) return;
  float* out = partial + ((n * chunks.count + chunk) * shape.c + c) * 2;
  out[0] = moments.mean;
  out[1] = moments.m2;
}

/// Merges the parts of a group, in either layout. p.x: the total if there is one. Grid: N * G.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_finalize(Norm<T> p, NormShape shape, Chunks chunks, const float* partial,
                  bool channels_last) {
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
  const float pivot = first_of_group(p, shape, channels_last, n, g * shape.size);
  store_stats(p.stats + static_cast<int64_t>(blockIdx.x) * 3, pivot, moments.mean, moments.m2,
              moments.count, p.eps);
}

/// NHWC. p.x: the total if there is one. Grid: N * chunks, column blocks. Shared memory: 3 numbers per
/// column.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_apply_columns(Norm<T> p, NormShape shape, Chunks chunks, int columns) {
  const int64_t n = chunks.sample(from_the_end()), chunk = chunks.chunk(from_the_end());
  FASTDIFF_DYNAMIC_SHARED(memory);
  const int first = static_cast<int>(blockIdx.y) * columns;
  const int width = columns_here(shape, columns);
  const ColumnPlace<V> at(width);
  float* numbers = reinterpret_cast<float*>(memory);
  column_coefficients(p, shape, n, first, width,
                      p.stats + (n * shape.groups + first / shape.size) * 3, numbers);
  if (!at.active) return;
  const ColumnCoefficients<V> k(numbers, at);
  const int64_t begin = chunks.begin(chunk);
  const int count = at.count(static_cast<int>(chunks.end(chunk, shape.s) - begin), at.row);
  const ChannelPlace in(shape, true, n, first + at.column);
  const T* from = in.of(p.x, p.skip) + (begin + at.row) * in.step;
  const int64_t from_step = at.rows * in.step, step = static_cast<int64_t>(at.rows) * shape.c;
  T* to = p.y + (n * shape.s + begin + at.row) * shape.c + first + at.column;
  if (p.silu)
    write_result<true, true, T, V>(from, from_step, to, step, count, k);
  else
    write_result<true, false, T, V>(from, from_step, to, step, count, k);
}

/// NCHW, as above. A warp processes one chunk of one channel. Grid: ceil(N * C * chunks / warps).
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_apply_rows(Norm<T> p, NormShape shape, Chunks chunks) {
  const int64_t task =
      (static_cast<int64_t>(from_the_end()) * blockDim.x + threadIdx.x) / kWarpSize;
  if (task >= shape.n * shape.c * chunks.count) return;
  const int64_t row = task / chunks.count, chunk = task % chunks.count;
  const int64_t n = row / shape.c;
  const int c = static_cast<int>(row % shape.c);
  const Coefficients k = coefficients(
      p, shape, n, c, p.stats + (n * shape.groups + c / shape.size) * 3);
  constexpr int64_t kStep = kWarpSize * V;
  const int64_t begin = chunks.begin(chunk) + threadIdx.x % kWarpSize * V;
  const int64_t end = chunks.end(chunk, shape.s);
  const int count = begin < end ? static_cast<int>((end - begin + kStep - 1) / kStep) : 0;
  const T* from = ChannelPlace(shape, false, n, c).of(p.x, p.skip) + begin;
  T* to = p.y + row * shape.s + begin;
  const OneChannel of{{k.mean}, {k.a}, {k.b}};
  if (p.silu)
    write_result<true, true, T, V>(from, kStep, to, kStep, count, of);
  else
    write_result<true, false, T, V>(from, kStep, to, kStep, count, of);
}

}  // namespace fastdiff
