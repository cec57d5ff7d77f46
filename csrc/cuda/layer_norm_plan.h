// How layer_norm is cut into blocks: by D only, so that a row's bits do not depend on the others.

#pragma once

#include "launch.cuh"
#include "layer_norm.cuh"

namespace fastdiff {

struct RowPlan {
  bool wide;     // a row does not fit into registers
  bool warps;    // a warp has a row, else a block
  int threads;   // of a block
  int64_t rows;  // of a block

  /// numbers: of a row in a thread. widest: the longest row to keep in registers, where they can.
  RowPlan(int64_t d, int numbers, int64_t widest)
      : wide(d > widest || d > numbers * kRowThreads), warps(!wide && d <= numbers * kWarpSize) {
    const int64_t needed = ceil_div(d, numbers * kWarpSize) * kWarpSize;
    threads = wide ? kRowThreads : warps ? kRowBlock : int(needed);
    rows = warps ? kRowBlock / kWarpSize : 1;
  }

  int64_t tiles(int64_t all) const { return ceil_div(all, rows); }
};

}  // namespace fastdiff
