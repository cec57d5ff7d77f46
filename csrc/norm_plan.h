// How group_norm_silu is cut into blocks. It depends on the shape of one sample and on the device,
// never on the number of samples: a sample's bits do not depend on its batch.

#pragma once

#include <cstdint>
#include <numeric>

#include "group_norm_silu.cuh"

namespace fastdiff {

struct NormPlan {
  bool on_chip;
  int vector;       // numbers in one load
  int slab;         // NHWC on chip: groups of a block
  int threads;      // of a block on chip
  int64_t shared;   // dynamic shared memory of the first kernel, bytes
  int64_t chunks;   // in parts: chunks of a sample's places
  int64_t length;   // places of a chunk
  int columns;      // NHWC in parts: channels of a block
  int64_t workspace;  // fp32 numbers

  static NormPlan from(const int64_t* f) {
    return {f[0] != 0, int(f[1]), int(f[2]), int(f[3]), f[4], f[5], f[6], int(f[7]), f[8]};
  }
};

/// Bytes of shared memory for 3 numbers a column and the tree over the rows of a block.
inline int64_t tree_bytes(int64_t width, int vector, int threads) {
  const int64_t packs = width / vector, rows = threads / packs;
  return rows * (2 * width + 1) * 4 + 3 * width * 4;
}

inline NormPlan plan_norm(const NormShape& shape, int itemsize, bool channels_last, bool aligned,
                          int64_t limit) {
  NormPlan plan{};
  const int wide = 16 / itemsize;
  const int64_t inner = channels_last ? shape.c : shape.s;
  plan.vector = aligned && inner % wide == 0 ? wide : 1;
  const int64_t rounding = 16;

  if (channels_last) {
    // whole groups, a whole number of packs, and 128 bytes of every row where that fits
    const int least = plan.vector / std::gcd(shape.size, plan.vector);
    for (int pass = 0; pass < 2 && !plan.on_chip; ++pass) {
      int slab = least;
      while (pass == 0 && slab < shape.groups && int64_t(slab) * shape.size * itemsize < 128)
        slab += least;
      if (slab > shape.groups) slab = shape.groups;
      const int64_t width = int64_t(slab) * shape.size;
      const int64_t tile = shape.s * width * itemsize;
      plan.threads = tile < 32 * 1024 ? kNormThreads : 2 * kNormThreads;
      if (width / plan.vector > plan.threads) continue;
      plan.shared = tile + rounding + tree_bytes(width, plan.vector, plan.threads) +
                    int64_t(slab) * 12;
      plan.on_chip = plan.shared <= limit;
      plan.slab = slab;
    }
  } else {
    const int64_t numbers = int64_t(shape.size) * shape.s;
    plan.shared = numbers * itemsize + rounding + int64_t(shape.size) * 8 +
                  3 * 4 * (2 * kNormThreads / kWarpSize);
    plan.on_chip = plan.shared <= limit;
    int64_t threads = (numbers / plan.vector / kNormBatch + 31) / 32 * 32;
    plan.threads = int(threads < 64 ? 64 : threads > 2 * kNormThreads ? 2 * kNormThreads : threads);
  }
  if (plan.on_chip) return plan;

  // 8 packs a thread, 32 where a sample is so large that many blocks remain
  const int64_t bytes = shape.s * shape.c * itemsize;
  const int64_t packs = bytes < 8 * 1024 * 1024 ? 8 : 32;
  if (channels_last) {
    const int64_t all = shape.c / plan.vector;
    const int64_t blocks = (all + kNormThreads - 1) / kNormThreads;
    const int64_t mine = (all + blocks - 1) / blocks;
    plan.columns = int(mine * plan.vector);
    plan.length = packs * (kNormThreads / mine);
    plan.shared = tree_bytes(plan.columns, plan.vector, kNormThreads);
    // the last block may be narrower and then has more rows: the most that a tree can take
    const int64_t last = shape.c - (blocks - 1) * plan.columns;
    const int64_t other = tree_bytes(last, plan.vector, kNormThreads);
    if (other > plan.shared) plan.shared = other;
  } else {
    plan.length = packs * kWarpSize * plan.vector;
    plan.shared = 0;
  }
  plan.chunks = (shape.s + plan.length - 1) / plan.length;
  plan.workspace = shape.n * plan.chunks * shape.c * 2;
  return plan;
}

}  // namespace fastdiff
