// Launcher of the backward pass of group_norm_silu, add_group_norm_silu and cat_group_norm_silu.

#include "group_norm_silu_backward.cuh"

#include "launch.cuh"
#include "norm_plan.h"

namespace fastdiff {
namespace {

template <typename T, int V>
const char* run(NormBackward<T> p, const NormShape& shape, const NormPlan& plan,
                bool channels_last, float* partial, const NormSums& out, float* dweight,
                float* dbias, const Target& target) {
  const auto parameters = [&] {
    if (dweight == nullptr && dbias == nullptr) return static_cast<const char*>(nullptr);
    return launch(norm_parameter_gradients<T>, grid_of(ceil_div(shape.c, kNormThreads)),
                  kNormThreads, 0, target, p, shape, const_cast<const float*>(out.sums), dweight,
                  dbias);
  };
  if (plan.on_chip) {
    const dim3 grid = grid_of(shape.n * ceil_div(shape.groups, plan.slab) * plan.cluster);
    FASTDIFF_TRY(plan.cluster > 1
                     ? launch_cluster(norm_backward_on_chip<T, V, true>, grid, plan.cluster,
                                      plan.threads, plan.shared, target, p, shape, plan.slab,
                                      plan.length, out)
                     : launch(norm_backward_on_chip<T, V, false>, grid, plan.threads, plan.shared,
                              target, p, shape, plan.slab, plan.length, out));
    return parameters();
  }
  const Chunks chunks{plan.chunks, plan.length};
  constexpr int64_t kWarps = kNormThreads / kWarpSize;
  const dim3 rows = grid_of(ceil_div(shape.n * shape.c * plan.chunks, kWarps));
  const dim3 columns = grid_of(shape.n * plan.chunks,
                               channels_last ? ceil_div(shape.c, plan.columns) : 1);
  const size_t column_bytes = 4 * plan.columns;

  FASTDIFF_TRY(channels_last
                   ? launch(norm_sums_columns<T, V>, columns, kNormThreads,
                            2 * column_bytes + plan.shared, target, p, shape, chunks,
                            plan.columns, partial)
                   : launch(norm_sums_rows<T, V>, rows, kNormThreads, 0, target, p, shape, chunks,
                            partial));
  FASTDIFF_TRY(launch(norm_finalize_sums<T>, grid_of(shape.n * shape.groups), kNormThreads,
                      0, target, p, shape, chunks, const_cast<const float*>(partial), out));
  FASTDIFF_TRY(parameters());
  p.means = out.means;
  return channels_last ? launch(norm_dx_columns<T, V>, columns, kNormThreads, 7 * column_bytes,
                                target, p, shape, chunks, plan.columns)
                       : launch(norm_dx_rows<T, V>, rows, kNormThreads, 0, target, p, shape,
                                chunks);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// How the backward pass is split; arguments as in fastdiff_cuda_group_norm_plan.
FASTDIFF_EXPORT const char* fastdiff_cuda_group_norm_backward_plan(
    int device, int dtype, int channels_last, int64_t n, int c, int64_t s, int groups, int aligned,
    int64_t limit, int cluster, int exact, int64_t* out) {
  const NormTask task{{n, s, c, groups, c / groups, c}, 0, channels_last != 0, aligned != 0, true};
  const auto kernel = [](auto zero, int vector) {
    using T = decltype(zero);
    return vector == kWide<T>
               ? reinterpret_cast<const void*>(norm_backward_on_chip<T, kWide<T>, true>)
               : reinterpret_cast<const void*>(norm_backward_on_chip<T, 1, true>);
  };
  return plan_on_device({device, nullptr}, dtype, task, {limit, cluster, exact != 0}, kernel, out);
}

/// Gradients of group_norm_silu. plan_fields: from the function above. workspace: fp32, as many numbers
/// as the plan says, plus N * C * 2 and N * G * 2. dweight, dbias: (C,) fp32 or null; dscale_shift:
/// (N, 2C) fp32 or null; dtotal: added to dx, or null. x, dtotal and dx have `split` channels, skip and
/// dskip the others.
FASTDIFF_EXPORT const char* fastdiff_cuda_group_norm_silu_backward(
    int device, void* stream, int dtype, int channels_last, int64_t n, int c, int64_t s,
    int groups, const int64_t* plan_fields, const void* dy, const void* x, const void* skip,
    int split, const void* dtotal, void* dx, void* dskip, const float* stats, float* workspace, const void* weight, int weight_dtype,
    const void* bias, int bias_dtype, const void* scale_shift, int scale_shift_dtype,
    float* dweight, float* dbias, float* dscale_shift, int silu) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  const NormShape shape{n, s, c, groups, c / groups, split};
  const NormPlan plan = NormPlan::from(plan_fields);
  float* sums = workspace + plan.workspace;
  const NormSums out{sums, sums + n * c * 2, dscale_shift};
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    NormBackward<T> p{};
    p.dy = static_cast<const T*>(dy);
    p.x = static_cast<const T*>(x);
    p.skip = static_cast<const T*>(skip);
    p.dtotal = static_cast<const T*>(dtotal);
    p.dx = static_cast<T*>(dx);
    p.dskip = static_cast<T*>(dskip);
    p.weight = {weight, weight_dtype};
    p.bias = {bias, bias_dtype};
    p.scale_shift = {scale_shift, scale_shift_dtype};
    p.stats = stats;
    p.silu = silu != 0;
    return plan.vector == kWide<T>
               ? run<T, kWide<T>>(p, shape, plan, channels_last != 0, workspace, out, dweight,
                                  dbias, target)
               : run<T, 1>(p, shape, plan, channels_last != 0, workspace, out, dweight, dbias,
                           target);
  });
}
