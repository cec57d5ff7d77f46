// softmax(scale * Q K^T + mask) V, forward, on the matrix unit of sm_80 and later
// (kernels/attention documents the maths; its cuda.py calls the launcher).
//
//   streaming  a block holds 64 or 128 queries and iterates over tiles of 32 or 64 keys with an
//              online softmax (Milakov and Gimelshein 2018; Dao 2023) while it copies the next tile
//   context    all keys, 77 or 154 of a text, stay in shared memory; every warp iterates over tiles
//              of 16 queries with a one-pass softmax, without waiting for other warps
//
// Q K^T sums over the head dim in steps of 16 (the last one 8 if necessary), and P V has 8 columns
// per product, so a head dim of 40 costs 40. A head dim uses the instance for the next larger W of
// 40, 64, 80, 128 and 160; the columns from d to W are zeros in shared memory and are not stored.
//
// Bytes, in units of N * H * d * 2: streaming 2 L + 2 S ceil(L / queries), context
// 2 L + 2 S (blocks per head); and 4 bytes per query for the log-sum-exp. Q, K, V and the output
// move 16 bytes at a time. Occupancy target: at least two blocks of the streaming kernel on a
// multiprocessor with 100 KB of shared memory (sm_86, sm_89), three if the registers allow it. The
// kernels have not run on a GPU yet: the emulation (tests/cuda_host) shows that they are correct,
// but their speed is unknown.
//
// Precision: P is rounded to the dtype of V before P V; sums, scores and the softmax are fp32. The
// scale is folded into the exponent, exp2(factor * (s - top)) with factor = scale * log2(e). The
// result for a query depends only on its own row and on the keys: bit-identical in any batch.

#pragma once

#include "mma.cuh"

namespace fastdiff {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
/// Most bytes of shared memory per block on sm_86 and sm_89; other architectures have more.
constexpr int kSharedLimit = 99 * 1024;

/// Tiles of 16 queries per warp in the streaming kernel: with two, every fragment of K and V is used
/// twice; from 128 columns on, and with a mask, there are registers for only one.
template <int W, bool MASKED>
constexpr int kRowTiles = W <= 80 && !MASKED ? 2 : 1;
/// Queries per block and keys per tile, for M such tiles. One buffer of K and V holds the queries.
template <int M>
constexpr int kQueryRows = 16 * M * kAttentionWarps;
template <int M>
constexpr int kKeyRows = 32 * M;
/// Keys whose scores are in registers at a time.
constexpr int kStepKeys = 32;
/// Elements from row to row in shared memory: an odd number of 16-byte pieces, so that the eight
/// rows of an 8 x 8 matrix are in different banks.
template <int W>
constexpr int kPitch = (W / 8 | 1) * 8;

/// The rows of all samples and heads of a tensor, each dense and 16-byte aligned.
template <typename T>
struct Rows {
  const T* data;
  int64_t sample, head;  // strides, in elements
  int token;

  __device__ __forceinline__ const T* of(int64_t n, int h) const {
    return data + n * sample + h * head;
  }
};

/// Address of row `i`, with a single 32 x 32 bit multiplication.
template <typename T>
__device__ __forceinline__ const T* row_at(const T* begin, int i, int stride) {
  return begin + static_cast<int64_t>(i) * stride;
}

/// The mask: null, fp32 numbers to add to the scores, or bytes that are nonzero for visible keys.
struct Mask {
  const void* data;
  bool bytes;
  int64_t sample, head, query, key;  // strides, 0 if broadcast

  /// Applies the mask to a score in units of log2. A finite mask value stays finite, which fp32's
  /// most negative number times log2(e) would not: a query whose keys all have that value attends
  /// to them equally.
  __device__ __forceinline__ float onto(float score, int64_t at) const {
    if (bytes) return static_cast<const uint8_t*>(data)[at] ? score : -INFINITY;
    const float added = static_cast<const float*>(data)[at];
    return score + (added == -INFINITY ? added : fmaxf(added * 1.4426950408889634f, -3e38f));
  }
};

template <typename T>
struct Attention {
  Rows<T> q, k, v, extra_k, extra_v;
  Mask mask;
  T* out;      // (N, L, H, d)
  // (N, H, L). lse: log2 of the sum of exp2, inf for a query that may attend to no key. If `tops` is
  // not null (only with a mask), lse is that of exp2(s - top), and tops holds top: a mask may add
  // -3e38 to all keys.
  float *lse, *tops;
  int length, keys, extra_keys, heads, d;
  float factor;

  __device__ __forceinline__ int all_keys() const { return keys + extra_keys; }
};

/// A lane's position in a fragment; see mma.cuh.
struct Lane {
  int index, g, t;

  __device__ __forceinline__ Lane()
      : index(static_cast<int>(threadIdx.x) % kWarpSize), g(index / 4), t(index % 4) {}
};

// ---------------------------------------------------------------------------------------------
// Global to shared memory

/// How the threads of a block share rows of W elements: each always handles the same 16-byte piece of
/// a row, of every kStep-th row.
template <int W>
struct Pieces {
  static constexpr int kPieces = W / 8, kStep = kAttentionThreads / kPieces;
  int row, column;
  bool active;

  __device__ __forceinline__ Pieces()
      : row(static_cast<int>(threadIdx.x) / kPieces),
        column(static_cast<int>(threadIdx.x) % kPieces * 8),
        active(row < kStep) {}
};

/// Starts copying ROWS keys, or values, from index `first` on into a tile: those of `own`, then those
/// of `extra`, then zeros. Columns from d on are zeros too.
template <typename T, int W, int ROWS>
__device__ __forceinline__ void copy_keys(const Attention<T>& p, const Rows<T>& own,
                                          const Rows<T>& extra, int64_t n, int h, int first,
                                          T* tile) {
  const Pieces<W> piece;
  if (!piece.active) return;
  const bool known = piece.column < p.d;
  if (first + ROWS <= p.keys) {
    const T* const begin = own.of(n, h) + piece.column;
#pragma unroll
    for (int i = 0; i < ROWS; i += piece.kStep)
      if (i + piece.kStep <= ROWS || piece.row < ROWS - i)
        copy_16(tile + (i + piece.row) * kPitch<W> + piece.column,
                known ? row_at(begin, first + i + piece.row, own.token) : p.q.data, known);
    return;
  }
#pragma unroll 1
  for (int row = piece.row; row < ROWS; row += piece.kStep) {
    const int key = first + row;
    const bool real = known && key < p.all_keys();
    const T* from = p.q.data;
    if (real && key < p.keys)
      from = row_at(own.of(n, h), key, own.token) + piece.column;
    else if (real)
      from = row_at(extra.of(n, h), key - p.keys, extra.token) + piece.column;
    copy_16(tile + row * kPitch<W> + piece.column, from, real);
  }
}

/// Starts copying ROWS queries from `first` on into rows of this warp; zeros beyond the last one.
template <typename T, int W, int ROWS>
__device__ __forceinline__ void copy_queries(const Attention<T>& p, int64_t n, int h, int first,
                                             T* tile) {
  constexpr int kPieces = W / 8;
#pragma unroll 1
  for (int i = Lane().index; i < ROWS * kPieces; i += kWarpSize) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool real = first + row < p.length && column < p.d;
    const T* from = row_at(p.q.of(n, h), first + row, p.q.token) + column;
    copy_16(tile + row * kPitch<W> + column, real ? from : p.q.data, real);
  }
}

// ---------------------------------------------------------------------------------------------
// Products

/// 16 queries in registers, as A.
template <int W>
struct Queries {
  unsigned sixteens[W / 16][4];
  unsigned eight[2];  // the last 8 columns, if W is not a multiple of 16

  template <typename T>
  __device__ __forceinline__ void load(const T* tile) {
    const int lane = Lane().index;
    const T* row = tile + lane % 16 * kPitch<W>;
#pragma unroll
    for (int k = 0; k < W / 16; ++k)
      load_matrices<false>(sixteens[k], row + 16 * k + lane / 16 * 8);
    if constexpr (W % 16 != 0) load_matrices<false>(eight, row + W - 8);
  }
};

/// s = Q K^T for TILES * 8 keys; each fragment of K serves all M tiles of queries.
template <typename T, int W, int M, int TILES>
__device__ __forceinline__ void score(float (&s)[M][TILES][4], const Queries<W> (&q)[M],
                                      const T* keys) {
  static_assert(TILES % 2 == 0, "K is loaded in pairs of tiles");
  const int lane = Lane().index;
#pragma unroll
  for (int j = 0; j < TILES; j += 2) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][j][i] = s[m][j + 1][i] = 0.0f;
    const T* pair = keys + 8 * j * kPitch<W>;
    const T* row = pair + (lane / 16 * 8 + lane % 8) * kPitch<W> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < W / 16; ++k) {
      unsigned b[4];
      load_matrices<false>(b, row + 16 * k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(s[m][j], q[m].sixteens[k], b[0], b[1]);
        multiply<T>(s[m][j + 1], q[m].sixteens[k], b[2], b[3]);
      }
    }
    if constexpr (W % 16 != 0) {
      unsigned b[2];
      load_matrices<false>(b, pair + lane % 16 * kPitch<W> + W - 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(s[m][j], q[m].eight, b[0]);
        multiply<T>(s[m][j + 1], q[m].eight, b[1]);
      }
    }
  }
}

/// P of 16 queries and 16 keys as A: converts two tiles of scores, C, to halves in place.
template <typename T>
__device__ __forceinline__ void halve(unsigned (&a)[4], const float (&left)[4],
                                      const float (&right)[4]) {
  a[0] = pair_of<T>(left[0], left[1]);
  a[1] = pair_of<T>(left[2], left[3]);
  a[2] = pair_of<T>(right[0], right[1]);
  a[3] = pair_of<T>(right[2], right[3]);
}

/// total += P V for STEPS * 16 keys.
template <typename T, int W, int M, int STEPS>
__device__ __forceinline__ void accumulate(float (&total)[M][W / 8][4],
                                           const unsigned (&p)[M][STEPS][4], const T* values) {
  const int lane = Lane().index;
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    const T* row = values + (16 * j + lane % 16) * kPitch<W>;
#pragma unroll
    for (int c = 0; c < W / 16; ++c) {
      unsigned b[4];
      load_matrices<true>(b, row + 16 * c + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(total[m][2 * c], p[m][j], b[0], b[1]);
        multiply<T>(total[m][2 * c + 1], p[m][j], b[2], b[3]);
      }
    }
    if constexpr (W % 16 != 0) {
      unsigned b[2];
      load_matrices<true>(b, row + W - 8);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply<T>(total[m][W / 8 - 1], p[m][j], b[0], b[1]);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Softmax

/// Scales the scores of 16 queries to units of log2 and applies the mask.
template <typename T, int TILES>
__device__ __forceinline__ void add_mask(float (&s)[TILES][4], const Attention<T>& p, int64_t n,
                                         int h, int first_query, int first_key) {
  const Lane lane;
  const int64_t head = n * p.mask.sample + h * p.mask.head;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = first_query + lane.g + i / 2 * 8;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const int key = first_key + 8 * j + 2 * lane.t + i % 2;
      s[j][i] *= p.factor;
      if (query < p.length && key < p.all_keys())
        s[j][i] = p.mask.onto(s[j][i], head + query * p.mask.query + key * p.mask.key);
    }
  }
}

/// Sets the scores of keys that do not exist to -inf: those from index `count` on.
template <int TILES>
__device__ __forceinline__ void cut(float (&s)[TILES][4], int count) {
  const int t = Lane().t;
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * j + 2 * t + i % 2 >= count) s[j][i] = -INFINITY;
}

/// 2^x for x <= 0 without the unit for exponentials, in nine instructions: x = n + f, 2^f for f in
/// [-1/2, 1/2] by the polynomial of degree 4 with the least relative error (2.7e-6, less than a
/// hundredth of that of rounding to fp16), and 2^n through the exponent. Results below 2^-126 become
/// 2^-126, where `fast_exp2` returns 0: sums of weights contain a 1, so both round to nothing.
__device__ __forceinline__ float exp2_by_polynomial(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23
  x = fmaxf(x, -126.0f);
  const float shifted = x + kToInteger;  // the integer n is in its low bits
  const float f = x - (shifted - kToInteger);
  float y = 0.009570102207362652f;
  y = fmaf(y, f, 0.05591786280274391f);
  y = fmaf(y, f, 0.240247443318367f);
  y = fmaf(y, f, 0.6931217908859253f);
  y = fmaf(y, f, 0.9999992847442627f);
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
}

/// State of the online softmax of a lane's two rows, g and g + 8.
struct Softmax {
  float top[2] = {-3.3e38f, -3.3e38f};  // finite, so that no difference is inf - inf
  float weight[2] = {0.0f, 0.0f};       // sums over this lane's columns

  /// Turns scores into exp2(unit * (s - top)); earlier sums must be multiplied by `shrink`. If
  /// POLYNOMIAL is not 0, every POLYNOMIAL-th tile uses multiply-adds instead of the unit for
  /// exponentials.
  template <int POLYNOMIAL = 0, int TILES>
  __device__ __forceinline__ void take(float (&s)[TILES][4], float unit, float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float new_top = top[r];
#pragma unroll
      for (int j = 0; j < TILES; ++j)
        new_top = fmaxf(new_top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 2));
      shrink[r] = fast_exp2((top[r] - new_top) * unit);
      top[r] = new_top;
      const float base = new_top * unit;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        const bool polynomial = POLYNOMIAL > 0 && (j + 1) % (POLYNOMIAL > 0 ? POLYNOMIAL : 1) == 0;
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          const float x = fmaf(s[j][i], unit, -base);
          s[j][i] = polynomial ? exp2_by_polynomial(x) : fast_exp2(x);
        }
        sum += s[j][2 * r] + s[j][2 * r + 1];
      }
      weight[r] = weight[r] * shrink[r] + sum;
    }
  }

  /// Adds up the weights over whole rows.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] += __shfl_xor_sync(kAllLanes, weight[r], 1);
      weight[r] += __shfl_xor_sync(kAllLanes, weight[r], 2);
    }
  }
};

/// One step of the softmax for 16 queries and TILES * 8 keys from `first_key` on: turns scores into
/// weights, in half precision.
template <bool MASKED, typename T, int TILES>
__device__ __forceinline__ void weigh(float (&s)[TILES][4], unsigned (&weights)[TILES / 2][4],
                                      Softmax& softmax, const Attention<T>& p, int64_t n, int h,
                                      int first_query, int first_key, float (&shrink)[2]) {
  if constexpr (MASKED) add_mask(s, p, n, h, first_query, first_key);
  if (first_key + 8 * TILES > p.all_keys()) cut(s, p.all_keys() - first_key);
  softmax.take(s, MASKED ? 1.0f : p.factor, shrink);
#pragma unroll
  for (int j = 0; j < TILES / 2; ++j) halve<T>(weights[j], s[2 * j], s[2 * j + 1]);
}

/// Writes 16 rows of the output and their log-sum-exp, staged through `stage`: 16 rows of shared
/// memory that only this warp uses.
template <bool MASKED, typename T, int W>
__device__ __forceinline__ void write_rows(const Attention<T>& p, int64_t n, int h, int first,
                                           const float (&total)[W / 8][4], Softmax& softmax,
                                           T* stage) {
  const Lane lane;
  softmax.add_up();
  const float unit = MASKED ? 1.0f : p.factor;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float weight = softmax.weight[r], share = weight > 0 ? 1.0f / weight : 0.0f;
#pragma unroll
    for (int c = 0; c < W / 8; ++c) {
      const float pair[2] = {total[c][2 * r] * share, total[c][2 * r + 1] * share};
      store_pack<T, 2>(stage + (lane.g + 8 * r) * kPitch<W> + 8 * c + 2 * lane.t,
                       pack_of<T, 2>(pair));
    }
    const int query = first + lane.g + 8 * r;
    if (lane.t == 0 && query < p.length) {
      const int64_t at = (n * p.heads + h) * p.length + query;
      const float log = weight > 0 ? log2f(weight) : INFINITY, top = softmax.top[r] * unit;
      if (MASKED && p.tops != nullptr) {
        p.lse[at] = log;
        p.tops[at] = weight > 0 ? top : 0.0f;
      } else {
        p.lse[at] = top + log;
      }
    }
  }
  __syncwarp();
  constexpr int kPieces = W / 8;
#pragma unroll
  for (int i = lane.index; i < 16 * kPieces; i += kWarpSize) {
    const int query = first + i / kPieces, column = i % kPieces * 8;
    if (query < p.length && column < p.d)
      store_pack<T, 8>(p.out + ((n * p.length + query) * p.heads + h) * p.d + column,
                       load_pack<T, 8>(stage + i / kPieces * kPitch<W> + column));
  }
}

// ---------------------------------------------------------------------------------------------
// Kernels

/// Bytes of shared memory: K and V, two buffers each.
template <int W, int M>
constexpr int kStreamingShared = 4 * kKeyRows<M> * kPitch<W> * 2;

/// Grid: N * H * ceil(L / kQueryRows<M>); the blocks of a head are neighbours and share K and V in
/// the L2.
template <typename T, int W, int M, bool MASKED>
__global__ void __launch_bounds__(kAttentionThreads, M * W <= 80 ? 3 : 2)
    attention_streaming(Attention<T> p) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  constexpr int KEYS = kKeyRows<M>;
  constexpr int kTile = KEYS * kPitch<W>;
  static_assert(kQueryRows<M> <= 2 * KEYS, "the queries are loaded through the second buffer");
  static_assert(kStreamingShared<W, M> <= kSharedLimit, "more shared memory than sm_86 has");
  T* const buffers = reinterpret_cast<T*>(memory);  // K and V of even tiles, then of odd ones
  const int blocks = (p.length + kQueryRows<M> - 1) / kQueryRows<M>;
  const int head = static_cast<int>(blockIdx.x) / blocks, h = head % p.heads;
  const int64_t n = head / p.heads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int own = warp * 16 * M;  // this warp's first row of the block
  const int first = static_cast<int>(blockIdx.x) % blocks * kQueryRows<M> + own;

  const auto copy_tile = [&](int tile) {
    T* const to = buffers + tile % 2 * 2 * kTile;
    copy_keys<T, W, KEYS>(p, p.k, p.extra_k, n, h, tile * KEYS, to);
    copy_keys<T, W, KEYS>(p, p.v, p.extra_v, n, h, tile * KEYS, to + kTile);
    commit_copies();
  };
  T* const own_rows = buffers + 2 * kTile + own * kPitch<W>;
  copy_queries<T, W, 16 * M>(p, n, h, first, own_rows);
  commit_copies();
  copy_tile(0);
  wait_for_copies<1>();
  __syncwarp();
  Queries<W> q[M];
#pragma unroll
  for (int m = 0; m < M; ++m) q[m].load(own_rows + 16 * m * kPitch<W>);

  float total[M][W / 8][4] = {};
  Softmax softmax[M];
  const int tiles = (p.all_keys() + KEYS - 1) / KEYS;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile has arrived, and no thread needs the other buffer any more
    if (tile + 1 < tiles) copy_tile(tile + 1);
    const T* const keys = buffers + tile % 2 * 2 * kTile;
#pragma unroll 1
    for (int i = 0; i < KEYS; i += kStepKeys) {
      float s[M][kStepKeys / 8][4];
      unsigned weights[M][kStepKeys / 16][4];
      score<T, W>(s, q, keys + i * kPitch<W>);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float shrink[2];
        weigh<MASKED>(s[m], weights[m], softmax[m], p, n, h, first + 16 * m, tile * KEYS + i,
                      shrink);
        // after a few tiles the largest score rarely changes, and a product with 1 can be skipped
        if (__ballot_sync(kAllLanes, shrink[0] != 1 || shrink[1] != 1) == 0) continue;
#pragma unroll
        for (int c = 0; c < W / 8; ++c)
#pragma unroll
          for (int j = 0; j < 4; ++j) total[m][c][j] *= shrink[j / 2];
      }
      accumulate<T, W>(total, weights, keys + kTile + i * kPitch<W>);
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m)
    write_rows<MASKED, T, W>(p, n, h, first + 16 * m, total[m], softmax[m],
                             buffers + (own + 16 * m) * kPitch<W>);
}

/// Bytes of shared memory: K, V, and two buffers of 16 queries per warp.
template <int W, int KEYS>
constexpr int kContextShared = (2 * KEYS + 32 * kAttentionWarps) * kPitch<W> * 2;

/// Up to KEYS keys, no mask. Grid: N * H * blocks; a warp processes every (4 * blocks)-th tile of 16
/// queries.
template <typename T, int W, int KEYS>
__global__ void __launch_bounds__(kAttentionThreads, KEYS + W <= 200 ? 3 : 2)
    attention_context(Attention<T> p, int blocks) {
  FASTDIFF_DYNAMIC_SHARED(memory);
  constexpr int TILES = KEYS / 8;
  const int head = static_cast<int>(blockIdx.x) / blocks, h = head % p.heads;
  const int64_t n = head / p.heads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  static_assert(kContextShared<W, KEYS> <= kSharedLimit, "more shared memory than sm_86 has");
  T* const keys = reinterpret_cast<T*>(memory);
  T* const values = keys + KEYS * kPitch<W>;
  T* const own = values + (KEYS + 32 * warp) * kPitch<W>;
  const int step = 16 * kAttentionWarps * blocks;
  int first = (static_cast<int>(blockIdx.x) % blocks * kAttentionWarps + warp) * 16;

  copy_keys<T, W, KEYS>(p, p.k, p.extra_k, n, h, 0, keys);
  copy_keys<T, W, KEYS>(p, p.v, p.extra_v, n, h, 0, values);
  copy_queries<T, W, 16>(p, n, h, first, own);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll 1
  for (int buffer = 0; first < p.length; first += step, buffer ^= 1) {
    T* const rows = own + 16 * buffer * kPitch<W>;
    __syncwarp();  // all lanes have stored the results staged in the other buffer
    if (first + step < p.length)
      copy_queries<T, W, 16>(p, n, h, first + step, own + 16 * (buffer ^ 1) * kPitch<W>);
    commit_copies();
    wait_for_copies<1>();
    __syncwarp();
    Queries<W> q[1];
    q[0].load(rows);
    float s[1][TILES][4], total[1][W / 8][4] = {}, shrink[2];
    unsigned weights[1][TILES / 2][4];
    Softmax softmax;
    score<T, W>(s, q, keys);
    weigh<false>(s[0], weights[0], softmax, p, n, h, first, 0, shrink);
    accumulate<T, W>(total, weights, values);
    write_rows<false, T, W>(p, n, h, first, total[0], softmax, rows);
  }
  wait_for_copies<0>();
}

}  // namespace fastdiff
