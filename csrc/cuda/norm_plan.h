// How group_norm_silu is split into blocks. It depends on the shape of one sample and on the device,
// never on the number of samples, so a sample's result does not depend on its batch.

#pragma once

#include <cstdint>
#include <numeric>

#include "group_norm_silu_backward.cuh"
#include "launch.cuh"

namespace fastdiff {

struct NormPlan {
  bool on_chip;
  int vector;       // elements per load
  int slab;         // NHWC on chip: groups per block
  int threads;      // on chip: threads per block
  int64_t shared;   // dynamic shared memory of the first kernel, bytes
  int64_t chunks;   // in parts: chunks of a sample's places
  int64_t length;   // places per chunk, or per stretch on chip (NCHW on chip: packs)
  int columns;      // NHWC in parts: channels per block
  int64_t workspace;  // fp32 numbers
  int cluster;      // on chip: blocks that share a slab (NCHW: a group)

  static constexpr int kFields = 10;  // must match kernels/group_norm_silu/cuda.py
  static NormPlan from(const int64_t* f) {
    return {f[0] != 0, int(f[1]), int(f[2]), int(f[3]), f[4], f[5], f[6], int(f[7]), f[8],
            int(f[9])};
  }
  void write(int64_t* f) const {
    const int64_t fields[kFields] = {on_chip, vector, slab,    threads,   shared,
                                     chunks,  length, columns, workspace, cluster};
    for (int i = 0; i < kFields; ++i) f[i] = fields[i];
  }
};

/// The call to plan for.
struct NormTask {
  NormShape shape;
  int itemsize;
  bool channels_last, aligned, backward;
};

/// Limits of a block.
struct NormLimits {
  int64_t shared;  // bytes of shared memory
  int cluster;     // blocks per cluster; 1: no clusters
  bool exact;      // use exactly that many blocks
};

constexpr int64_t kAnySize = int64_t{1} << 62;
constexpr int64_t kFewThreads = 32 * 1024;  // a block alone with a larger tile has 512 threads
constexpr int64_t kLeastTile = 1024;        // smaller ones cost more than they bring
constexpr int kEnoughBlocks = 128;          // for one sample, so that few SMs of an H200's 132 are idle
constexpr int kPortableCluster = 8;        // supported by every GPU with clusters

/// Bytes of shared memory for 3 numbers per column and for `publish`.
inline int64_t column_bytes(int64_t width, int vector, int threads) {
  const int64_t packs = width / vector, rows = threads / packs;
  return rows * 2 * width * 4 + 3 * width * 4;
}

/// NHWC: plans `blocks` blocks for a slab of whole groups and whole packs, with at least `least`
/// bytes of every row, or the whole row. Returns the size of a block's tile in bytes.
inline int64_t plan_columns(NormPlan& plan, const NormTask& task, int64_t least, int blocks) {
  const NormShape& shape = task.shape;
  const int step = plan.vector / std::gcd(shape.size, plan.vector);
  int slab = step;
  while (slab < shape.groups && int64_t(slab) * shape.size * task.itemsize < least) slab += step;
  plan.slab = slab < shape.groups ? slab : shape.groups;
  plan.cluster = blocks;
  plan.length = (shape.s + blocks - 1) / blocks;
  const int64_t width = int64_t(plan.slab) * shape.size;
  const int64_t tile = plan.length * width * task.itemsize * (task.backward ? 2 : 1);
  const bool few = tile < kFewThreads || blocks > 1 || task.backward;
  const int64_t most = few ? kNormThreads : 2 * kNormThreads, row = width / plan.vector;
  // kNormBatch packs per thread and one row at a time at least: every thread has moments to merge
  const int64_t wanted = plan.length * row / kNormBatch;
  const int64_t least_threads = row < 64 ? 64 : row;
  const int64_t threads = (wanted < least_threads ? least_threads : wanted) + kWarpSize - 1;
  plan.threads = int(threads > most || task.backward ? most : threads / kWarpSize * kWarpSize);
  if (row > plan.threads) {
    plan.shared = kAnySize;
  } else if (task.backward) {
    const int64_t rows = plan.threads / row;
    plan.shared = tile + 16 + 8 * plan.slab +
                  4 * width * (kChannelNumbers + 2 + 2 + 2 * blocks + 2 * rows);
  } else {
    plan.shared = tile + 16 + column_bytes(width, plan.vector, plan.threads) +
                  int64_t(plan.slab) * 12 * (2 + blocks);
  }
  return tile;
}

/// NCHW, forward only: plans `blocks` blocks for a group. Returns the size of a block's tile in bytes.
inline int64_t plan_rows(NormPlan& plan, const NormTask& task, int blocks) {
  const NormShape& shape = task.shape;
  const int64_t packs = shape.size * shape.s / plan.vector;
  plan.cluster = blocks;
  plan.length = (packs + blocks - 1) / blocks;
  const int64_t tile = plan.length * plan.vector * task.itemsize;
  const int64_t threads = (plan.length / kNormBatch + 31) / 32 * 32;
  const int64_t most = blocks > 1 ? kNormThreads : 2 * kNormThreads;
  plan.threads = int(threads < 64 ? 64 : threads > most ? most : threads);
  plan.shared = tile + 16 + int64_t(shape.size) * 8 + 12 * (most / kWarpSize) + 12 * (2 + blocks);
  return tile;
}

/// Plans the on-chip strategy; false if it is impossible. With clusters: enough blocks for the chip, if
/// a tile then has kLeastTile bytes, or as many as possible. Two blocks shall share an SM, a cluster
/// have the portable 8 blocks at most, and a block read long pieces of a row, in this order. Without
/// clusters: one block.
inline bool plan_on_chip(NormPlan& plan, const NormTask& task, const NormLimits& limits) {
  if (task.backward && !task.channels_last) return false;
  int64_t tile = 0;
  const auto fits = [&](int64_t least, int blocks, int64_t shared) {
    tile = task.channels_last ? plan_columns(plan, task, least, blocks)
                              : plan_rows(plan, task, blocks);
    return plan.shared <= shared;
  };
  // 128 bytes of every row, 64 (the fetch size of the L2), or as few as groups and packs allow
  const int64_t wide = 128, narrow = 64, any = 0;
  if (limits.exact)
    return fits(wide, limits.cluster, limits.shared) ||
           fits(any, limits.cluster, limits.shared);
  const int64_t half_an_sm = (limits.shared + 1024) / 2 - 1024;  // an SM reserves 1 KiB per block
  const int groups = task.shape.groups;
  int64_t most = 0;
  NormPlan best = plan;
  for (const int64_t shared : {half_an_sm, limits.shared}) {
    if (limits.cluster <= 1) break;
    for (const bool portable : {true, false})
      for (const int64_t least : {wide, narrow})
        for (int blocks = portable ? 1 : 2 * kPortableCluster;
             blocks <= limits.cluster && (blocks <= kPortableCluster || !portable); blocks *= 2) {
          if (!fits(least, blocks, shared) || (blocks > 1 && tile < kLeastTile)) continue;
          const int slabs = task.channels_last ? (groups + plan.slab - 1) / plan.slab : groups;
          const int64_t all = int64_t(slabs) * blocks;
          if (all > most) {
            most = all;
            best = plan;
          }
          if (all >= kEnoughBlocks) return true;
        }
    if (most > 0) break;  // fewer blocks, but two per SM
  }
  plan = best;
  return most > 0 || fits(wide, 1, limits.shared) || fits(any, 1, limits.shared);
}

inline NormPlan plan_norm(const NormTask& task, const NormLimits& limits) {
  const auto [shape, itemsize, channels_last, aligned, backward] = task;
  NormPlan plan{};
  const int wide = 16 / itemsize;
  const int64_t inner = channels_last ? shape.c : shape.s;
  plan.vector = aligned && inner % wide == 0 ? wide : 1;
  plan.on_chip = plan_on_chip(plan, task, limits);
  if (plan.on_chip) return plan;

  // 8 packs per thread, 32 if a sample is large enough that many blocks remain
  plan.cluster = 1;
  const int64_t bytes = shape.s * shape.c * itemsize;
  const int64_t packs = bytes < 8 * 1024 * 1024 ? 8 : 32;
  if (channels_last) {
    const int64_t all = shape.c / plan.vector;
    const int64_t blocks = (all + kNormThreads - 1) / kNormThreads;
    const int64_t mine = (all + blocks - 1) / blocks;
    plan.columns = int(mine * plan.vector);
    plan.length = packs * (kNormThreads / mine);
    plan.shared = column_bytes(plan.columns, plan.vector, kNormThreads);
    // the last block may be narrower and then has more rows, so it may need more
    const int64_t last = shape.c - (blocks - 1) * plan.columns;
    const int64_t other = column_bytes(last, plan.vector, kNormThreads);
    if (other > plan.shared) plan.shared = other;
  } else {
    plan.length = packs * kWarpSize * plan.vector;
    plan.shared = 0;
  }
  plan.chunks = (shape.s + plan.length - 1) / plan.length;
  plan.workspace = shape.n * plan.chunks * shape.c * 2;
  return plan;
}

/// Writes the plan for a device. If the device has no room for a cluster of the planned size (part of a
/// GPU, or GPCs with missing SMs), it plans with fewer blocks per cluster, and finally without clusters.
/// limits.shared < 0 and limits.cluster = 0 stand for the device's limits. kernel(T{}, vector): the
/// kernel that runs in clusters.
template <typename Kernel>
const char* plan_on_device(const Target& target, int dtype, NormTask task, NormLimits limits,
                           Kernel kernel, int64_t* out) {
  FASTDIFF_TRY(select_device(target));
  if (limits.shared < 0) FASTDIFF_TRY(shared_limit(target.device, &limits.shared));
  int possible = 1;
  FASTDIFF_TRY(cluster_limit(target.device, &possible));
  if (limits.cluster == 0) limits.cluster = possible;
  return with_dtype(dtype, [&](auto zero) -> const char* {
    task.itemsize = sizeof zero;
    for (;;) {
      const NormPlan plan = plan_norm(task, limits);
      plan.write(out);
      int count = plan.on_chip && limits.cluster <= possible;
      // a plan for larger clusters than this device has cannot be checked here
      if (plan.cluster > 1 && plan.cluster <= possible)
        FASTDIFF_TRY(active_clusters(target, kernel(zero, plan.vector), plan.cluster,
                                     plan.threads, plan.shared, &count));
      if (limits.exact)
        return count > 0 ? nullptr
                         : keep_message("a cluster of this size cannot keep a group on chip");
      if (plan.cluster <= 1 || plan.cluster > possible || count > 0) return nullptr;
      limits.cluster = plan.cluster / 2;
    }
  });
}

}  // namespace fastdiff
