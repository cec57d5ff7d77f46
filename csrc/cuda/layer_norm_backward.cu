// Launcher of the backward pass of layer_norm and add_layer_norm.

#include "layer_norm_backward.cuh"

#include "launch.cuh"
#include "layer_norm_plan.h"

namespace fastdiff {
namespace {

/// `programs`: the most partial sums that the workspace has room for.
template <typename T, int V>
const char* run(const LayerNormGradients<T>& p, const ParameterGradient& dweight,
                const ParameterGradient& dbias, int64_t programs, int64_t widest,
                const Target& target) {
  const RowPlan plan(p.d, kRowNumbers<V>, widest);
  const int64_t tiles = plan.tiles(p.rows);
  const bool wanted = p.dweights != nullptr || p.dbiases != nullptr;
  const int64_t shares = programs < tiles ? programs : tiles;
  if (plan.wide) {
    FASTDIFF_TRY(launch(layer_norm_wide_backward<T, V>, grid_of(p.rows), plan.threads, 0, target, p));
    dim3 grid = grid_of(ceil_div(p.d / V, kRowBlock));
    grid.y = unsigned(shares);
    if (wanted)
      FASTDIFF_TRY(launch(layer_norm_wide_shares<T, V>, grid, kRowBlock, 0, target, p));
  } else {
    const size_t shared = wanted && plan.warps ? plan.rows * p.d * sizeof(float) : 0;
    FASTDIFF_TRY(launch(layer_norm_rows_backward<T, V>, grid_of(wanted ? shares : tiles),
                        plan.threads, shared, target, p, plan.warps, tiles));
  }
  if (!wanted) return nullptr;
  dim3 grid = grid_of(ceil_div(p.d, kShareColumns));
  grid.y = 2;
  return launch(layer_norm_sum_shares, grid, kShareColumns * kShareRows, 0, target, dweight,
                dbias, shares, p.d);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// Gradients of layer_norm; x is the tensor that was normalized. dweights, dbiases: (programs, D) fp32
/// workspace for dweight and dbias, null if those are not needed; statistics: (rows, 3) fp32 for rows
/// longer than `widest` or than registers can hold. dx, dweight and dbias are dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_layer_norm_backward(
    int device, void* stream, int dtype, const void* dy, const void* dtotal, const void* x,
    void* dx, const void* weight, int weight_dtype, float* dweights, void* dweight,
    int dweight_dtype, float* dbiases, void* dbias, int dbias_dtype, float* statistics,
    int64_t rows, int64_t d, int64_t dy_stride, int64_t dtotal_stride, int64_t x_stride, float eps,
    int64_t programs, int64_t widest) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    LayerNormGradients<T> p{};
    p.dy = static_cast<const T*>(dy);
    p.dtotal = static_cast<const T*>(dtotal);
    p.x = static_cast<const T*>(x);
    p.weight = {weight, weight_dtype};
    p.dx = static_cast<T*>(dx);
    p.dweights = dweights;
    p.dbiases = dbiases;
    p.statistics = statistics;
    p.rows = rows;
    p.d = d;
    p.dy_stride = dy_stride;
    p.dtotal_stride = dtotal_stride;
    p.x_stride = x_stride;
    p.eps = eps;
    const ParameterGradient of_weight{dweights, dweight, dweight_dtype};
    const ParameterGradient of_bias{dbiases, dbias, dbias_dtype};
    constexpr int V = kWide<T>;
    const bool aligned = d % V == 0 && rows_aligned<T>(dy, dy_stride) &&
                         rows_aligned<T>(dtotal, dtotal_stride) && rows_aligned<T>(x, x_stride) &&
                         aligned16(dx) && aligned16(weight);
    return aligned ? run<T, V>(p, of_weight, of_bias, programs, widest, target)
                   : run<T, 1>(p, of_weight, of_bias, programs, widest, target);
  });
}
