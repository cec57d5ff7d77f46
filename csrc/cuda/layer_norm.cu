// Launcher of the forward pass of layer_norm and add_layer_norm.

#include "layer_norm.cuh"

#include "launch.cuh"
#include "layer_norm_plan.h"

namespace fastdiff {
namespace {

template <typename T, int V>
const char* run(const LayerNormRows<T>& p, int64_t widest, const Target& target) {
  const RowPlan plan(p.d, kRowNumbers<V>, widest);
  const dim3 grid = grid_of(plan.tiles(p.rows));
  return plan.wide ? launch(layer_norm_wide<T, V>, grid, plan.threads, 0, target, p)
                   : launch(layer_norm_rows<T, V>, grid, plan.threads, 0, target, p, plan.warps);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// x, residual: (rows, D) with strides, the residual of any dtype or null; y and, with a residual,
/// total: dense. widest: the longest row to keep in registers, as far as the kernels can.
FASTDIFF_EXPORT const char* fastdiff_cuda_layer_norm(
    int device, void* stream, int dtype, const void* x, const void* residual, int residual_dtype,
    void* total, void* y, const void* weight, int weight_dtype, const void* bias, int bias_dtype,
    int64_t rows, int64_t d, int64_t x_stride, int64_t residual_stride, float eps,
    int64_t widest) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const LayerNormRows<T> p{static_cast<const T*>(x),
                             {residual, residual_dtype},
                             static_cast<T*>(total),
                             static_cast<T*>(y),
                             {weight, weight_dtype},
                             {bias, bias_dtype},
                             rows,
                             d,
                             x_stride,
                             residual_stride,
                             eps};
    constexpr int V = kWide<T>;
    const bool half_residual = residual_dtype == kFloat16 || residual_dtype == kBFloat16;
    const bool aligned = d % V == 0 && rows_aligned<T>(x, x_stride) && aligned16(y) &&
                         aligned16(total) && aligned16(weight) && aligned16(bias) &&
                         (half_residual ? rows_aligned<half>(residual, residual_stride)
                                        : rows_aligned<float>(residual, residual_stride));
    return aligned ? run<T, V>(p, widest, target) : run<T, 1>(p, widest, target);
  });
}
