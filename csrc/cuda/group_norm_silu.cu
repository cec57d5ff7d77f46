// Launchers of the forward pass of group_norm_silu, add_group_norm_silu and cat_group_norm_silu: which
// kernels, which grids.

#include "group_norm_silu_on_chip.cuh"

#include "launch.cuh"
#include "norm_plan.h"

namespace fastdiff {
namespace {

/// The kernel that keeps a group in the shared memory of a cluster; the one that adds takes as much.
template <typename T>
const void* cluster_kernel(int vector, bool channels_last) {
  constexpr int V = kWide<T>;
  if (channels_last)
    return vector == V ? reinterpret_cast<const void*>(norm_on_chip_columns<T, V, true, false>)
                       : reinterpret_cast<const void*>(norm_on_chip_columns<T, 1, true, false>);
  return vector == V ? reinterpret_cast<const void*>(norm_on_chip_rows<T, V, true, false>)
                     : reinterpret_cast<const void*>(norm_on_chip_rows<T, 1, true, false>);
}

/// The arguments of the kernels after the first of a norm in parts: they read the total.
template <typename T>
Norm<T> after_addition(Norm<T> p) {
  if (p.total != nullptr) p.x = p.total;
  p.residual = nullptr;
  p.total = nullptr;
  return p;
}

template <typename T, int V, bool kAdd>
const char* run_columns(const Norm<T>& p, const NormShape& shape, const NormPlan& plan,
                        float* workspace, const Target& target) {
  if (plan.on_chip) {
    const dim3 grid = grid_of(shape.n * ceil_div(shape.groups, plan.slab) * plan.cluster);
    if (plan.cluster > 1)
      return launch_cluster(norm_on_chip_columns<T, V, true, kAdd>, grid, plan.cluster, plan.threads,
                            plan.shared, target, p, shape, plan.slab, plan.length);
    return launch(norm_on_chip_columns<T, V, false, kAdd>, grid, plan.threads, plan.shared, target, p,
                  shape, plan.slab, plan.length);
  }
  const Chunks chunks{plan.chunks, plan.length};
  const dim3 grid = grid_of(shape.n * plan.chunks, ceil_div(shape.c, plan.columns));
  const Norm<T> summed = after_addition(p);
  FASTDIFF_TRY(launch(norm_moments_columns<T, V, kAdd>, grid, kNormThreads, plan.shared, target, p,
                      shape, chunks, plan.columns, workspace));
  FASTDIFF_TRY(launch(norm_finalize<T>, grid_of(shape.n * shape.groups), kNormThreads, 0,
                      target, summed, shape, chunks, const_cast<const float*>(workspace), true));
  return launch(norm_apply_columns<T, V>, grid, kNormThreads, 12 * plan.columns, target, summed,
                shape, chunks, plan.columns);
}

template <typename T, int V, bool kAdd>
const char* run_rows(const Norm<T>& p, const NormShape& shape, const NormPlan& plan,
                     float* workspace, const Target& target) {
  if (plan.on_chip) {
    const dim3 grid = grid_of(shape.n * shape.groups * plan.cluster);
    if (plan.cluster > 1)
      return launch_cluster(norm_on_chip_rows<T, V, true, kAdd>, grid, plan.cluster, plan.threads,
                            plan.shared, target, p, shape, plan.length);
    return launch(norm_on_chip_rows<T, V, false, kAdd>, grid, plan.threads, plan.shared, target, p,
                  shape, plan.length);
  }
  const Chunks chunks{plan.chunks, plan.length};
  constexpr int64_t kWarps = kNormThreads / kWarpSize;
  const dim3 grid = grid_of(ceil_div(shape.n * shape.c * plan.chunks, kWarps));
  const Norm<T> summed = after_addition(p);
  FASTDIFF_TRY(launch(norm_moments_rows<T, V, kAdd>, grid, kNormThreads, 0, target, p, shape,
                      chunks, workspace));
  FASTDIFF_TRY(launch(norm_finalize<T>, grid_of(shape.n * shape.groups), kNormThreads, 0,
                      target, summed, shape, chunks, const_cast<const float*>(workspace), false));
  return launch(norm_apply_rows<T, V>, grid, kNormThreads, 0, target, summed, shape, chunks);
}

template <typename T, int V>
const char* run_layout(const Norm<T>& p, const NormShape& shape, const NormPlan& plan,
                       bool channels_last, float* workspace, const Target& target) {
  if (p.total != nullptr)
    return channels_last ? run_columns<T, V, true>(p, shape, plan, workspace, target)
                         : run_rows<T, V, true>(p, shape, plan, workspace, target);
  return channels_last ? run_columns<T, V, false>(p, shape, plan, workspace, target)
                       : run_rows<T, V, false>(p, shape, plan, workspace, target);
}

template <typename T>
const char* run(const Norm<T>& p, const NormShape& shape, const NormPlan& plan,
                bool channels_last, float* workspace, const Target& target) {
  constexpr int V = kWide<T>;
  return plan.vector == V ? run_layout<T, V>(p, shape, plan, channels_last, workspace, target)
                          : run_layout<T, 1>(p, shape, plan, channels_last, workspace, target);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// How a norm is split: the fields of NormPlan. limit: most bytes of shared memory per block, < 0 for the
/// device's limit. cluster: most blocks per cluster, 0 for the device's limit; exact: exactly that many,
/// or an error if they cannot hold a group.
FASTDIFF_EXPORT const char* fastdiff_cuda_group_norm_plan(int device, int dtype, int channels_last,
                                                          int64_t n, int c, int64_t s, int groups,
                                                          int aligned, int64_t limit, int cluster,
                                                          int exact, int64_t* out) {
  const NormTask task{{n, s, c, groups, c / groups, c}, 0, channels_last != 0, aligned != 0, false};
  const auto kernel = [&](auto zero, int vector) {
    return cluster_kernel<decltype(zero)>(vector, task.channels_last);
  };
  return plan_on_device({device, nullptr}, dtype, task, {limit, cluster, exact != 0}, kernel, out);
}

/// Forward pass of group_norm_silu, or if `total` is given, of add_group_norm_silu, or if `skip` is
/// given, of cat_group_norm_silu. x, residual and total have `split` channels, skip the other c - split;
/// they and y are dense and have the same layout. stats (N, G, 3) and workspace are fp32. plan_fields:
/// from fastdiff_cuda_group_norm_plan, for tensors that count as aligned only if split is a multiple of
/// a pack.
FASTDIFF_EXPORT const char* fastdiff_cuda_group_norm_silu(
    int device, void* stream, int dtype, int channels_last, int64_t n, int c, int64_t s,
    int groups, const int64_t* plan_fields, const void* x, const void* skip, int split, void* y,
    float* stats, float* workspace, const void* weight, int weight_dtype, const void* bias, int bias_dtype,
    const void* scale_shift, int scale_shift_dtype, const void* channel_add,
    int channel_add_dtype, int64_t channel_add_stride, const void* residual, void* total,
    float eps, int silu) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  const NormShape shape{n, s, c, groups, c / groups, split};
  const NormPlan plan = NormPlan::from(plan_fields);
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Norm<T> p{};
    p.x = static_cast<const T*>(x);
    p.skip = static_cast<const T*>(skip);
    p.residual = static_cast<const T*>(residual);
    p.channel_add = {channel_add, channel_add_dtype};
    p.channel_add_stride = channel_add_stride;
    p.total = static_cast<T*>(total);
    p.y = static_cast<T*>(y);
    p.weight = {weight, weight_dtype};
    p.bias = {bias, bias_dtype};
    p.scale_shift = {scale_shift, scale_shift_dtype};
    p.stats = stats;
    p.eps = eps;
    p.silu = silu != 0;
    return run<T>(p, shape, plan, channels_last != 0, workspace, target);
  });
}
