// GroupNorm and SiLU on chip (see group_norm_silu.cuh): whole groups of one sample in shared memory.
//
// The blocks of a cluster (kCluster; else a block works alone) share a slab of groups of one sample:
// rank r has the r-th stretch of its places. Between reading and writing they exchange their moments,
// 12 bytes per group, and nothing else. Bytes: x in and y out, once. Occupancy target: two blocks of
// a cluster per SM, with 256 threads of up to 128 registers and 113 KiB each, so that one reads while
// the other writes; each has 16 KiB of loads in flight. Tiles are 32 KiB, two rounds of loads, if 8
// blocks suffice for that.

#pragma once

#include "cluster.cuh"
#include "group_norm_silu.cuh"

namespace fastdiff {

template <bool kCluster>
constexpr int kOnChipThreads = kCluster ? kNormThreads : 2 * kNormThreads;

/// A block's stretch of the places or packs; the last stretches may be short or empty.
struct Stretch {
  int rank, ranks;
  int64_t begin, end;
};

template <bool kCluster>
__device__ __forceinline__ Stretch my_stretch(int64_t all, int64_t length) {
  if constexpr (!kCluster) return {0, 1, 0, all};
  const int rank = cluster_rank();
  const int64_t begin = rank * length, end = begin + length;
  return {rank, cluster_blocks(), begin < all ? begin : all, end < all ? end : all};
}

/// `parts` holds `numbers` numbers of this block's stretch; afterwards `gathered` holds those of all
/// ranks, rank by rank (the same memory for a block alone). The kernel must end with leave_cluster.
template <bool kCluster>
__device__ __forceinline__ void gather_parts(const float* parts, int numbers, int ranks,
                                             float* gathered) {
  if constexpr (!kCluster) {
    __syncthreads();
    return;
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < numbers * ranks;
       i += static_cast<int>(blockDim.x))
    gathered[i] = cluster_load(parts + i % numbers, i / numbers);
  cluster_arrive();
  __syncthreads();
}

/// Merges a group's moments from all parts in the order of ranks: bit-identical in every block.
__device__ __forceinline__ Moments merge_parts(const float* gathered, int g, int groups,
                                               int ranks) {
  Moments all;
#pragma unroll 1
  for (int r = 0; r < ranks; ++r) {
    const float* from = gathered + 3 * (r * groups + g);
    Moments part;
    part.count = from[0];
    part.mean = from[1];
    part.m2 = from[2];
    all.merge(part);
  }
  return all;
}

/// Must be the last call of every thread: other blocks may still be reading this block's parts.
template <bool kCluster>
__device__ __forceinline__ void leave_cluster() {
  if constexpr (kCluster) cluster_wait();
}

/// NHWC: the slab of groups of a block or cluster.
struct Slab {
  int64_t n;
  int first_group, groups, first, width;  // `width` channels from `first` on

  __device__ __forceinline__ Slab(const NormShape& shape, int slab, int ranks) {
    const unsigned task = blockIdx.x / ranks;
    const int slabs = (shape.groups + slab - 1) / slab;
    n = task / slabs;
    first_group = static_cast<int>(task % slabs) * slab;
    groups = min(slab, shape.groups - first_group);
    first = first_group * shape.size;
    width = groups * shape.size;
  }
};

/// NHWC. A block has `slab` groups of one sample, in a cluster a stretch of `length` places of
/// them. Shared memory: their elements, 3 numbers per column, 6 per group, 3 per group and rank, then
/// those of merge_rows. Grid: N * ceil(G / slab) * blocks per cluster.
template <typename T, int V, bool kCluster>
__global__ void __launch_bounds__(kOnChipThreads<kCluster>, kCluster ? kNormBlocks : 1)
    norm_on_chip_columns(Norm<T> p, NormShape shape, int slab, int64_t length) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const Stretch mine = my_stretch<kCluster>(shape.s, length);
  const Slab here(shape, slab, mine.ranks);
  const int64_t n = here.n;
  const int groups = here.groups, width = here.width, first = here.first;
  const ColumnPlace<V> at(width);

  T* tile = reinterpret_cast<T*>(memory);
  const size_t tile_bytes = ((kCluster ? length : shape.s) * width * sizeof(T) + 15) / 16 * 16;
  float* heads = reinterpret_cast<float*>(memory + tile_bytes);
  float* group_stats = heads + 3 * width;
  float* parts = group_stats + 3 * groups;
  float* gathered = kCluster ? parts + 3 * groups : parts;
  float* scratch = gathered + 3 * groups * mine.ranks;

  column_heads(p, shape, n, first, width, heads);
  auto moments =
      column_moments<T, V>(p, shape, n, first, mine.begin, mine.end, at, heads, tile);
  merge_rows(moments, at, scratch);

  // a warp merges the channels of a group; all have the same count
  const float* means = scratch;
  const float* m2s = scratch + at.rows * width;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const float places = static_cast<float>(mine.end - mine.begin);
  const float size = static_cast<float>(shape.size);
  for (int g = static_cast<int>(threadIdx.x) / kWarpSize; g < groups; g += warps) {
    float mean = 0, m2 = 0;
    for (int i = lane; i < shape.size; i += kWarpSize) mean += means[g * shape.size + i];
    mean = warp_sum(mean) / size;
    for (int i = lane; i < shape.size; i += kWarpSize) {
      const float delta = means[g * shape.size + i] - mean;
      m2 += m2s[g * shape.size + i] + places * delta * delta;
    }
    m2 = warp_sum(m2);
    if (lane == 0) {
      parts[3 * g] = places * size;
      parts[3 * g + 1] = mean;
      parts[3 * g + 2] = m2;
    }
  }
  gather_parts<kCluster>(parts, 3 * groups, mine.ranks, gathered);
#pragma unroll 1
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
    const Moments all = merge_parts(gathered, g, groups, mine.ranks);
    store_stats(group_stats + 3 * g, heads[g * shape.size], all.mean, all.m2, all.count, p.eps);
    if (mine.rank != 0) continue;
    float* out = p.stats + (n * shape.groups + here.first_group + g) * 3;
    for (int i = 0; i < 3; ++i) out[i] = group_stats[3 * g + i];
  }
  __syncthreads();
  column_coefficients(p, shape, n, first, width, group_stats, heads);
  if (at.active) {
    const ColumnCoefficients<V> k(heads, at);
    T* y = p.y + (n * shape.s + mine.begin) * shape.c + first + at.column;
    const int64_t rows = mine.end - mine.begin;
    for (int64_t row = at.row; row < rows; row += at.rows) {
      float x[V];
      unpack(load_pack<T, V>(tile + row * width + at.column), x);
#pragma unroll
      for (int v = 0; v < V; ++v)
        x[v] = activate<T>((x[v] - k.mean[v]) * k.a[v] + k.b[v], p.silu);
      store_pack<T, V>(y + row * shape.c, pack_of<T, V>(x));
    }
  }
  leave_cluster<kCluster>();
}

/// NCHW. A block has one group of one sample, in a cluster a stretch of `length` packs of it.
/// Shared memory: its elements, then a and b per channel, then 3 numbers per warp, 6, and 3 per rank.
/// Grid: N * G * blocks per cluster.
template <typename T, int V, bool kCluster>
__global__ void __launch_bounds__(kOnChipThreads<kCluster>, kCluster ? kNormBlocks : 1)
    norm_on_chip_rows(Norm<T> p, NormShape shape, int64_t length) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const Stretch mine = my_stretch<kCluster>(shape.size * shape.s / V, length);
  const unsigned task = blockIdx.x / mine.ranks;
  const int64_t n = task / shape.groups;
  const int g = static_cast<int>(task % shape.groups);
  const int first = g * shape.size;
  const int64_t base = (n * shape.c + first) * shape.s;
  // below 2^31, because a group fits into a cluster's shared memory
  const unsigned places = static_cast<unsigned>(shape.s);
  const unsigned begin = static_cast<unsigned>(mine.begin), end = static_cast<unsigned>(mine.end);

  T* tile = reinterpret_cast<T*>(memory);
  const size_t tile_bytes =
      ((kCluster ? length * V : shape.size * shape.s) * sizeof(T) + 15) / 16 * 16;
  float* channels = reinterpret_cast<float*>(memory + tile_bytes);  // a, b of every channel
  float* scratch = channels + 2 * shape.size;
  float* stats = scratch + 3 * (blockDim.x / kWarpSize);
  float* parts = stats + 3;
  float* gathered = kCluster ? parts + 3 : parts;

  float* adds = channels;  // until a and b are known
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < shape.size; c += static_cast<int>(blockDim.x))
    adds[c] = channel_addend(p, n, first + c);
  __syncthreads();
  const float pivot = source_at(p, n, first, base);
  Moments moments;
  for (unsigned i = begin + threadIdx.x; i < end; i += blockDim.x * kNormBatch) {
    float d[kNormBatch][V];
    int taken = 0;
#pragma unroll
    for (int j = 0; j < kNormBatch; ++j) {
      const unsigned pack = i + j * blockDim.x;
#pragma unroll
      for (int v = 0; v < V; ++v) d[j][v] = pivot;
      if (pack >= end) continue;
      const float add = p.total == nullptr ? 0.0f : adds[pack * V / places];
      const auto loaded = load_source<T, V>(p, base + static_cast<int64_t>(pack) * V, &add, 0);
      store_pack<T, V>(tile + static_cast<int64_t>(pack - begin) * V, loaded);
      unpack(loaded, d[j]);
      ++taken;
    }
#pragma unroll
    for (int j = 0; j < kNormBatch; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) d[j][v] -= pivot;
    add_packs(moments, d, taken);
  }
  moments = block_merge(moments, scratch);
  if (threadIdx.x == 0) {
    parts[0] = moments.count;
    parts[1] = moments.mean;
    parts[2] = moments.m2;
  }
  gather_parts<kCluster>(parts, 3, mine.ranks, gathered);
  if (threadIdx.x == 0) {  // one thread: half of this is fp64, which is slow on most GPUs
    moments = merge_parts(gathered, 0, 1, mine.ranks);
    store_stats(stats, pivot, moments.mean, moments.m2, moments.count, p.eps);
    float* out = p.stats + (n * shape.groups + g) * 3;
    for (int i = 0; i < 3 && mine.rank == 0; ++i) out[i] = stats[i];
  }
  __syncthreads();
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < shape.size; c += static_cast<int>(blockDim.x)) {
    const Coefficients k = coefficients(p, shape, n, first + c, stats);
    channels[2 * c] = k.a;
    channels[2 * c + 1] = k.b;
  }
  __syncthreads();
  const float mean = stats[0];
  for (unsigned pack = begin + threadIdx.x; pack < end; pack += blockDim.x) {
    const unsigned c = pack * V / places;
    const float a = channels[2 * c], b = channels[2 * c + 1];
    float x[V];
    unpack(load_pack<T, V>(tile + static_cast<int64_t>(pack - begin) * V), x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = activate<T>((x[v] - mean) * a + b, p.silu);
    store_pack<T, V>(p.y + base + static_cast<int64_t>(pack) * V, pack_of<T, V>(x));
  }
  leave_cluster<kCluster>();
}

}  // namespace fastdiff
