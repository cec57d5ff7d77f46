// How layer_norm is split into blocks: it depends only on D, so that no row affects another's bits.

#pragma once

#include "launch.cuh"
#include "layer_norm.cuh"

namespace fastdiff {

struct RowPlan {
  bool wide;     // a row does not fit into registers
  bool warps;    // one row per warp, else per block
  int threads;   // per block
  int64_t rows;  // per block

  /// numbers: elements of a row per thread. widest: the longest row to keep in registers, if it fits.
  RowPlan(int64_t d, int numbers, int64_t widest)
      : wide(d > widest || d > numbers * kRowThreads), warps(!wide && d <= numbers * kWarpSize) {
    const int64_t needed = ceil_div(d, numbers * kWarpSize) * kWarpSize;
    threads = wide ? kRowThreads : warps ? kRowBlock : int(needed);
    rows = warps ? kRowBlock / kWarpSize : 1;
  }

  int64_t tiles(int64_t all) const { return ceil_div(all, rows); }
};

}  // namespace fastdiff
