// Launchers of ada_layer_norm.

#include "ada_layer_norm.cuh"

#include "launch.cuh"

using namespace fastdiff;

/// x: (n, length, d), rows x_stride apart; y: dense; scale, shift: (n, d), dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_ada_layer_norm(
    int device, void* stream, int dtype, const void* x, void* y, const void* scale,
    int scale_dtype, const void* shift, int shift_dtype, int64_t n, int64_t length, int64_t d,
    int64_t x_stride, float eps) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const AdaLayerNormRows<T> p{static_cast<const T*>(x), static_cast<T*>(y), {scale, scale_dtype},
                                {shift, shift_dtype}, length, d, x_stride, eps};
    const auto run = [&](auto kernel) {
      return launch(kernel, grid_of(n * length), kRowThreads, 0, target, p);
    };
    constexpr int V = kWide<T>;
    const bool aligned = d % V == 0 && rows_aligned<T>(x, x_stride) && aligned16(y) &&
                         aligned16(scale) && aligned16(shift);
    return aligned ? run(ada_layer_norm_rows<T, V>) : run(ada_layer_norm_rows<T, 1>);
  });
}

/// dy, x: (n, length, d) with row strides; dx: dense; shares: (n, chunks, 2, d) fp32 zeros.
FASTDIFF_EXPORT const char* fastdiff_cuda_ada_layer_norm_backward(
    int device, void* stream, int dtype, const void* dy, const void* x, void* dx,
    const void* scale, int scale_dtype, float* shares, int64_t n, int64_t length, int64_t d,
    int64_t chunks, int64_t dy_stride, int64_t x_stride, float eps) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const AdaLayerNormGradients<T> p{static_cast<const T*>(dy), static_cast<const T*>(x),
                                     static_cast<T*>(dx), {scale, scale_dtype}, shares, length, d,
                                     chunks, dy_stride, x_stride, eps};
    const auto run = [&](auto kernel) {
      return launch(kernel, grid_of(n * chunks), kRowThreads, 0, target, p);
    };
    constexpr int V = kWide<T>;
    const bool aligned = d % V == 0 && rows_aligned<T>(dy, dy_stride) &&
                         rows_aligned<T>(x, x_stride) && aligned16(dx) && aligned16(scale);
    return aligned ? run(ada_layer_norm_rows_backward<T, V>)
                   : run(ada_layer_norm_rows_backward<T, 1>);
  });
}
