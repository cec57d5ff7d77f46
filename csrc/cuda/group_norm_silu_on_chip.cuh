// GroupNorm and SiLU on chip (see group_norm_silu.cuh): whole groups of one sample in shared memory.
//
// The blocks of a cluster (kCluster; else a block works alone) share a slab of groups of one sample:
// rank r has the r-th stretch of its places. Between reading and writing they exchange their moments,
// 12 bytes per group, and nothing else. Bytes: x in and y out, once. Asynchronous copies fill the whole
// tile (cp.async), so that all of it is on its way at a time; a thread copies the packs that it will
// use, so no barrier is needed, and sums the first pieces while the others are still on their way. Only where an addition comes first, or a pack is narrower than 16
// bytes, x passes through registers, kNormBatch packs at a time. Occupancy target: two blocks of a
// cluster per SM, with 256 threads of up to 128 registers and 113 KiB each.

#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "group_norm_silu.cuh"

namespace fastdiff {

template <bool kCluster>
constexpr int kOnChipThreads = kCluster ? kNormThreads : 2 * kNormThreads;

/// Pieces of a thread's copies: the sums of the first three are hidden behind what is on its way.
constexpr int kFillPieces = 4;

/// Where piece `i` of `count` packs begins.
__device__ __forceinline__ int piece_begin(int count, int i) { return count * i / kFillPieces; }

/// Calls start(i) for the packs 0 .. count - 1 in turn, which starts copies; closes a group per piece.
template <typename Start>
__device__ __forceinline__ void start_pieces(int count, Start start) {
#pragma unroll 1
  for (int piece = 0; piece < kFillPieces; ++piece) {
    const int end = piece_begin(count, piece + 1);
#pragma unroll 4
    for (int i = piece_begin(count, piece); i < end; ++i) start(i);
    commit_copies();
  }
}

/// Calls use(begin, end) for each piece of the packs when it has arrived; `Left` pieces follow it.
template <int Left = kFillPieces - 1, typename Use>
__device__ __forceinline__ void as_they_arrive(int count, Use use) {
  wait_for_copies<Left>();
  constexpr int kPiece = kFillPieces - 1 - Left;
  use(piece_begin(count, kPiece), piece_begin(count, kPiece + 1));
  if constexpr (Left > 0) as_they_arrive<Left - 1>(count, use);
}

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

/// What `publish` left in shared memory: means of `rows` x `width` columns, then their m2.
struct GroupParts {
  const float* means;
  int rows, width, size;

  /// Calls use(count, mean, m2) for this lane's share of the columns of group g, `all` places of each.
  template <int V, typename Use>
  __device__ __forceinline__ void each(const ColumnPlace<V>& at, int all, int g, Use use) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int full = all / at.rows, longer = all % at.rows;
    const int down = kWarpSize / size, right = kWarpSize % size;
    const float* group = means + g * size;
    int row = lane / size, column = lane % size;
#pragma unroll 1
    while (row < rows) {
      const float* from = group + row * width + column;
      use(static_cast<float>(full + (row < longer)), from[0], from[rows * width]);
      row += down;
      column += right;
      if (column >= size) {
        column -= size;
        ++row;
      }
    }
  }
};

/// Count, mean and m2 of each group of the block to parts; a warp merges a group, in two passes
/// without a division per part.
template <int V>
__device__ __forceinline__ void merge_groups(const GroupParts& from, const ColumnPlace<V>& at,
                                             int all, int groups, float* parts) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const float numbers = static_cast<float>(all) * static_cast<float>(from.size);
  const float inverse = all ? 1.0f / numbers : 0.0f;
#pragma unroll 1
  for (int g = static_cast<int>(threadIdx.x) / kWarpSize; g < groups; g += warps) {
    float mean = 0, m2 = 0;
    from.each(at, all, g, [&](float count, float mean_of, float) { mean += count * mean_of; });
    mean = warp_sum(mean) * inverse;
    from.each(at, all, g, [&](float count, float mean_of, float m2_of) {
      const float delta = mean_of - mean;
      m2 += m2_of + count * delta * delta;
    });
    m2 = warp_sum(m2);
    if (threadIdx.x % kWarpSize == 0) {
      parts[3 * g] = numbers;
      parts[3 * g + 1] = mean;
      parts[3 * g + 2] = m2;
    }
  }
}

/// NHWC. A block has `slab` groups of one sample, in a cluster a stretch of `length` places of
/// them. Shared memory: their elements, 3 numbers per column, those of `publish`, 6 per group, then 3
/// per group and rank. Grid: N * ceil(G / slab) * blocks per cluster.
template <typename T, int V, bool kCluster, bool kAdd>
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
  float* scratch = heads + 3 * width;  // at a multiple of 16 bytes, like heads
  float* group_stats = scratch + 2 * at.rows * width;
  float* parts = group_stats + 3 * groups;
  float* gathered = kCluster ? parts + 3 * groups : parts;

  const int all = static_cast<int>(mine.end - mine.begin);
  const int count = at.active ? at.count(all, at.row) : 0;
  const int tile_step = at.rows * width;
  T* const own = tile + at.row * width + at.column;
  const int64_t place = (n * shape.s + mine.begin + at.row) * shape.c + first + at.column;
  const int64_t step = static_cast<int64_t>(at.rows) * shape.c;
  ShiftedSums<V> sums;
  if constexpr (!kAdd && sizeof(Pack<T, V>) == 16) {
    const ChannelPlace in(shape, true, n, first + at.column);
    const T* from = in.of(p.x, p.skip) + (mine.begin + at.row) * in.step;
    const int64_t from_step = at.rows * in.step;
    T* to = own;
    start_pieces(count, [&](int) {
      copy_16(to, from, true);
      from += from_step;
      to += tile_step;
    });
    column_heads(p, shape, n, first, width, heads);
    as_they_arrive(count, [&](int begin, int end) {
      if (begin == 0 && end > 0) sums.start(load_pack<T, V>(own));
      const T* pack = own + begin * tile_step;
#pragma unroll 4
      for (int i = begin; i < end; ++i, pack += tile_step) sums.add(load_pack<T, V>(pack));
    });
  } else {
    column_heads(p, shape, n, first, width, heads);
    sums = column_sums<kAdd, T, V>(p, shape, n, first, mine.begin, mine.end, at, heads, tile);
  }
  publish(sums, at, all, heads, scratch);
  merge_groups(GroupParts{scratch, at.rows, width, shape.size}, at, all, groups, parts);
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
    if (p.silu)
      write_result<false, true, T, V>(own, tile_step, p.y + place, step, count, k);
    else
      write_result<false, false, T, V>(own, tile_step, p.y + place, step, count, k);
  }
  leave_cluster<kCluster>();
}

/// NCHW: the input of one group, whose channels may lie in x and in skip.
template <typename T>
struct InputRows {
  const Norm<T>& p;
  int64_t border;           // from this element of the group on, it is in skip
  int64_t in_x, in_skip;    // its elements begin there, as if all were in that tensor

  __device__ __forceinline__ InputRows(const Norm<T>& p, const NormShape& shape, int64_t n,
                                       int first)
      : p(p), border((shape.split - first) * shape.s),
        in_x((n * shape.split + first) * shape.s),
        in_skip((n * (shape.c - shape.split) + first - shape.split) * shape.s) {}

  __device__ __forceinline__ const T* x(int64_t i) const {
    return i < border ? p.x + (in_x + i) : p.skip + (in_skip + i);
  }
  __device__ __forceinline__ Summands<T> summands(int64_t i) const {
    const bool sum = i < border && p.total != nullptr;
    return {x(i), sum && p.residual != nullptr ? p.residual + (in_x + i) : nullptr,
            sum ? p.total + (in_x + i) : nullptr, 1};
  }
};

/// NCHW. A block has one group of one sample, in a cluster a stretch of `length` packs of it.
/// Shared memory: its elements, then a and b per channel, then 3 numbers per warp, 6, and 3 per rank.
/// Grid: N * G * blocks per cluster.
template <typename T, int V, bool kCluster, bool kAdd>
__global__ void __launch_bounds__(kOnChipThreads<kCluster>, kCluster ? kNormBlocks : 1)
    norm_on_chip_rows(Norm<T> p, NormShape shape, int64_t length) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  const Stretch mine = my_stretch<kCluster>(shape.size * shape.s / V, length);
  const unsigned task = blockIdx.x / mine.ranks;
  const int64_t n = task / shape.groups;
  const int g = static_cast<int>(task % shape.groups);
  const int first = g * shape.size;
  const int64_t base = (n * shape.c + first) * shape.s;
  const InputRows<T> in(p, shape, n, first);
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
    adds[c] = channel_addend(p, shape, n, first + c);
  __syncthreads();
  const float pivot = first_of_group(p, shape, false, n, first);
  const unsigned step = blockDim.x, mine_first = begin + threadIdx.x;
  int count = mine_first < end ? static_cast<int>((end - mine_first + step - 1) / step) : 0;
  const float taken = static_cast<float>(count);
  T* const own = tile + static_cast<int64_t>(threadIdx.x) * V;
  const int64_t offset = static_cast<int64_t>(mine_first) * V, place = base + offset;
  const int64_t span = static_cast<int64_t>(step) * V;
  ShiftedSums<V> sums;
  if constexpr (!kAdd && sizeof(Pack<T, V>) == 16) {
    start_pieces(count, [&](int i) { copy_16(own + i * span, in.x(offset + i * span), true); });
    as_they_arrive(count, [&](int begin, int end) {
      if (begin == 0 && end > 0) sums.start(load_pack<T, V>(own));
#pragma unroll 4
      for (int i = begin; i < end; ++i) sums.add(load_pack<T, V>(own + i * span));
    });
  } else {
    using From = Source<kAdd, T, V>;
    constexpr int kBatch = kSourceBatch<kAdd>;
    const auto total_of = [&](const From& from, int i) {
      const unsigned pack = mine_first + i * step;
      return from.total(in.summands(offset + i * span), adds + (kAdd ? pack * V / places : 0), 0);
    };
    const auto use = [&](const From& from, int i) {
      const Pack<T, V> pack = total_of(from, i);
      if constexpr (kAdd)
        if (T* total = in.summands(offset + i * span).total) store_pack<T, V>(total, pack);
      store_pack<T, V>(own + i * span, pack);
      sums.add(pack);
    };
    if (count > 0) {
      From head;
      head.load(in.summands(offset), 0);
      sums.start(total_of(head, 0));
    }
    int i = 0;
    for (; i + kBatch <= count; i += kBatch) {
      From from[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) from[j].load(in.summands(offset + (i + j) * span), 0);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) use(from[j], i + j);
    }
    for (; i < count; ++i) {
      From from;
      from.load(in.summands(offset + i * span), 0);
      use(from, i);
    }
  }
  Moments moments = sums.merged(taken, pivot);
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
  const auto result = [&](auto silu) {
    constexpr bool kSilu = decltype(silu)::value;
    for (int i = 0; i < count; ++i) {
      const unsigned c = (mine_first + i * step) * V / places;
      const OneChannel k{{stats[0]}, {channels[2 * c]}, {channels[2 * c + 1]}};
      write_result<false, kSilu, T, V>(own + i * span, 0, p.y + place + i * span, 0, 1, k);
    }
  };
  if (p.silu)
    result(std::true_type{});
  else
    result(std::false_type{});
  leave_cluster<kCluster>();
}

}  // namespace fastdiff
