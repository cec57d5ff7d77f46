// softmax(scale * Q K^T) V, forward, for sm_90a: the kernel for long sequences without a mask.
//
// A block holds 128 queries of a head. Its first warpgroup is the producer: one thread starts the
// copies of Q and of the tiles of K and V (TMA), two tiles ahead. Two warpgroups of consumers have 64
// queries each. A consumer overlaps two things (Shah et al. 2024, "FlashAttention-3", sections 3.1
// and 3.2): the softmax of a tile of keys runs under the product P V of the tile before, and the two
// consumers take turns to issue their products, so that one of them is in its softmax while the
// matrix unit works for the other.
//
// Rows are padded to W = 40, 64, 80, 128 or 160 columns; TMA fills in zeros. Q K^T sums over W rounded
// up to 16, P V has exactly W columns. In shared memory rows have a multiple of 64 columns.
//
// For W = 40, where exponentials bind (16 a clock and multiprocessor), one tile of 8 keys in eight
// computes them with multiply-adds (`exp2_by_polynomial`).
//
// Bytes, in units of N * H * d * 2: 2 L + 2 S ceil(L / 128), and 4 bytes per query for the log-sum-exp.
// Occupancy: one block of 384 threads per multiprocessor; the producer keeps 24 registers per thread,
// a consumer 240. The kernel has not run on a GPU yet: the emulation shows that it is correct.
//
// Precision and bits are as described in attention.cuh.

#pragma once

#include "attention.cuh"
#include "hopper.cuh"

namespace fastdiff {

constexpr int kConsumers = 2;
constexpr int kHopperThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kHopperQueries = 64 * kConsumers;
constexpr int kHopperStages = 2;

/// What a block keeps in shared memory, in bytes from a multiple of kTileAlignment on.
template <int W>
struct HopperPlan {
  static constexpr int kBoxes = (W + kTileColumns - 1) / kTileColumns;  // tiles side by side
  static constexpr int kKeys = W <= 80 ? 128 : 64;                      // rows of a tile
  static constexpr int kTile = kKeys * kTileRow;
  static constexpr int kStage = 16 * kPitch<W> * 2;  // one warp's rows of the output
  static constexpr int kQueryTile = 64 * kTileRow;
  /// The queries of a consumer, whose place its output takes at the end.
  static constexpr int kOwn =
      ((kQueryTile * kBoxes > 4 * kStage ? kQueryTile * kBoxes : 4 * kStage) + kTileAlignment - 1) /
      kTileAlignment * kTileAlignment;
  static constexpr int kKeysAt = kConsumers * kOwn;
  static constexpr int kValuesAt = kKeysAt + kHopperStages * kBoxes * kTile;
  static constexpr int kEnd = kValuesAt + kHopperStages * kBoxes * kTile;
  static constexpr int kShared = kEnd + kTileAlignment;  // dynamic memory starts anywhere
  static constexpr int kPolynomial = W == 40 ? 8 : 0;
};

#ifdef FASTDIFF_HOPPER

/// Barriers of a block: each tile of K and V is filled by the producer and emptied by the consumers.
struct HopperBarriers {
  uint64_t *queries, *full, *empty;

  __device__ __forceinline__ explicit HopperBarriers(uint64_t* all)
      : queries(all), full(all + 1), empty(all + 1 + 2 * kHopperStages) {}

  /// The stage of a tile, and the parity of the phase in which it is there.
  static __device__ __forceinline__ unsigned stage(int tile) {
    return static_cast<unsigned>(tile) % kHopperStages;
  }
  static __device__ __forceinline__ int parity(int tile) {
    return static_cast<unsigned>(tile) / kHopperStages % 2;
  }

  /// The barrier of a tile of K (0) or V (1), in `full` or `empty`.
  static __device__ __forceinline__ uint64_t* of(uint64_t* barriers, int tile, int which) {
    return barriers + 2 * stage(tile) + which;
  }
};
constexpr int kHopperBarriers = 1 + 4 * kHopperStages;

/// One thread: copies the queries, and then K and V tile by tile as they become free.
template <int W>
__device__ __forceinline__ void produce(const TensorMap& q, const TensorMap& k, const TensorMap& v,
                                        const HopperBarriers& barriers, unsigned char* memory,
                                        int64_t n, int h, int first, int tiles) {
  using Plan = HopperPlan<W>;
  const int sample = static_cast<int>(n);
  barrier_expect(barriers.queries, kConsumers * Plan::kBoxes * Plan::kQueryTile);
#pragma unroll 1
  for (int i = 0; i < kConsumers * Plan::kBoxes; ++i) {
    const int consumer = i / Plan::kBoxes, box = i % Plan::kBoxes;
    load_tile(memory + consumer * Plan::kOwn + box * Plan::kQueryTile, q, box * kTileColumns, h,
              first + 64 * consumer, sample, barriers.queries);
  }
  const auto load = [&](int tile, int which) {
    uint64_t* const full = barriers.of(barriers.full, tile, which);
    barrier_wait(barriers.of(barriers.empty, tile, which),
                 barriers.parity(tile) ^ 1);  // in the first round, at once
    barrier_expect(full, Plan::kBoxes * Plan::kTile);
    unsigned char* const to = memory + (which == 0 ? Plan::kKeysAt : Plan::kValuesAt) +
                              barriers.stage(tile) * Plan::kBoxes * Plan::kTile;
#pragma unroll 1
    for (int box = 0; box < Plan::kBoxes; ++box)
      load_tile(to + box * Plan::kTile, which == 0 ? k : v, box * kTileColumns, h,
                tile * Plan::kKeys, sample, full);
  };
#pragma unroll 1
  for (int tile = 0; tile <= tiles; ++tile) {  // in the order in which the consumers need them
    if (tile < tiles) load(tile, 0);
    if (tile > 0) load(tile - 1, 1);
  }
}

/// Starts s = Q K^T, of tiles with these descriptors.
template <typename T, int W, int TILES>
__device__ __forceinline__ void start_scores(float (&s)[TILES][4], uint64_t queries,
                                             uint64_t keys) {
  using Plan = HopperPlan<W>;
#pragma unroll
  for (int k = 0; k < (W + 15) / 16; ++k) {
    const int box = k / 4, inside = k % 4 * 32;
    multiply_tiles<T>(s, moved(queries, box * Plan::kQueryTile + inside),
                      moved(keys, box * Plan::kTile + inside), k > 0);
  }
  products_commit();
}

/// Starts total += P V, with `add` false total = P V.
template <typename T, int W, int STEPS>
__device__ __forceinline__ void start_values(float (&total)[W / 8][4],
                                             const unsigned (&p)[STEPS][4], uint64_t values,
                                             bool add) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    multiply_registers<T>(total, p[k], moved(values, 16 * k * kTileRow), add || k > 0);
  products_commit();
}

template <typename T, int W>
__device__ __forceinline__ void consume(const Attention<T>& p, const HopperBarriers& barriers,
                                        unsigned char* memory, int64_t n, int h, int first,
                                        int tiles) {
  using Plan = HopperPlan<W>;
  constexpr int KEYS = Plan::kKeys, TILES = KEYS / 8;
  const int consumer = warpgroup_index() - 1;
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarpSize;
  unsigned char* const own = memory + consumer * Plan::kOwn;
  const bool speaks = Lane().index == 0;
  const auto wait_for = [&](int tile, int which) {
    barrier_wait(barriers.of(barriers.full, tile, which), barriers.parity(tile));
  };
  const auto done_with = [&](int tile, int which) {
    if (speaks) barrier_arrive(barriers.of(barriers.empty, tile, which));
  };
  const uint64_t queries = describe_tile(own);
  const uint64_t keys = describe_tile(memory + Plan::kKeysAt);
  const uint64_t values = describe_tile(memory + Plan::kValuesAt, Plan::kTile);
  const auto tile_of = [](uint64_t first, int tile) {
    return moved(first, HopperBarriers::stage(tile) * Plan::kBoxes * Plan::kTile);
  };

  float total[W / 8][4], s[TILES][4], shrink[2];
  unsigned weights[TILES / 2][4];
  Softmax softmax;
  const auto weigh_tile = [&](int tile) {
    if ((tile + 1) * KEYS > p.keys) cut(s, p.keys - tile * KEYS);
    softmax.take<Plan::kPolynomial>(s, p.factor, shrink);
  };
  const auto halve_tile = [&] {
#pragma unroll
    for (int j = 0; j < TILES / 2; ++j) halve<T>(weights[j], s[2 * j], s[2 * j + 1]);
  };

  barrier_wait(barriers.queries, 0);
  wait_for(0, 0);
  products_begin();
  start_scores<T, W>(s, queries, tile_of(keys, 0));
  products_wait<0>();
  done_with(0, 0);
  weigh_tile(0);
  halve_tile();
  // consumer c issues its products when barrier 1 + c says so; the first one begins
  if (consumer == 1 && tiles > 1) named_arrive(1, 2 * kWarpgroup);
#pragma unroll 1
  for (int tile = 1; tile < tiles; ++tile) {
    wait_for(tile, 0);
    named_sync(1 + consumer, 2 * kWarpgroup);
    products_begin();
    start_scores<T, W>(s, queries, tile_of(keys, tile));
    wait_for(tile - 1, 1);
    products_begin();
    start_values<T, W>(total, weights, tile_of(values, tile - 1), tile > 1);
    if (consumer == 0 || tile + 1 < tiles) named_arrive(2 - consumer, 2 * kWarpgroup);
    products_wait<1>();
    done_with(tile, 0);
    weigh_tile(tile);
    products_wait<0>();
    done_with(tile - 1, 1);
    halve_tile();
    // after a few tiles the largest score rarely changes, and a product with 1 can be skipped
    if (__ballot_sync(kAllLanes, shrink[0] != 1 || shrink[1] != 1) == 0) continue;
#pragma unroll
    for (int c = 0; c < W / 8; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) total[c][j] *= shrink[j / 2];
  }
  wait_for(tiles - 1, 1);
  products_begin();
  start_values<T, W>(total, weights, tile_of(values, tiles - 1), tiles > 1);
  products_wait<0>();
  named_sync(3 + consumer, kWarpgroup);  // no warp of this consumer reads its queries any more
  write_rows<false, T, W>(p, n, h, first + 64 * consumer + 16 * warp, total, softmax,
                          reinterpret_cast<T*>(own + warp * Plan::kStage));
}

#endif  // FASTDIFF_HOPPER

/// Grid: N * H * ceil(L / kHopperQueries); the blocks of a head are neighbors and share K and V in the
/// L2. The maps are of the tensors (d, H, L or S, N), the innermost first, in boxes of (64, 1, rows, 1).
template <typename T, int W>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_hopper(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v, Attention<T> p) {
#ifdef FASTDIFF_HOPPER
  FASTDIFF_DYNAMIC_SHARED(dynamic);
  FASTDIFF_SHARED(uint64_t, all, kHopperBarriers);
  unsigned char* const memory =
      dynamic + (kTileAlignment - shared_address(dynamic) % kTileAlignment) % kTileAlignment;
  const HopperBarriers barriers(all);
  const int blocks = (p.length + kHopperQueries - 1) / kHopperQueries;
  const int head = static_cast<int>(blockIdx.x) / blocks, h = head % p.heads;
  const int64_t n = head / p.heads;
  const int first = static_cast<int>(blockIdx.x) % blocks * kHopperQueries;
  const int tiles = (p.keys + HopperPlan<W>::kKeys - 1) / HopperPlan<W>::kKeys;
  if (threadIdx.x == 0) {
    barrier_init(barriers.queries, 1);
    for (int i = 0; i < 2 * kHopperStages; ++i) {
      barrier_init(barriers.full + i, 1);
      barrier_init(barriers.empty + i, kConsumers * kWarpgroup / kWarpSize);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warpgroup_index() == 0) {
    release_registers<24>();
    if (threadIdx.x == 0) produce<W>(q, k, v, barriers, memory, n, h, first, tiles);
  } else {
    acquire_registers<240>();
    consume<T, W>(p, barriers, memory, n, h, first, tiles);
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

}  // namespace fastdiff
