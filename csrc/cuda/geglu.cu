// Launchers of geglu.

#include "geglu.cuh"

#include "launch.cuh"

namespace fastdiff {
namespace {

template <int V>
dim3 geglu_grid(const GegluShape& shape) {
  return grid_of(ceil_div(shape.rows * (shape.d / V), kGegluSpan));
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// x: (rows, 2 d), rows x_stride apart, y: (rows, d) dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_geglu(int device, void* stream, int dtype, const void* x,
                                                void* y, int64_t rows, int64_t d,
                                                int64_t x_stride) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GegluShape shape{rows, d};
    const auto run = [&](auto kernel, dim3 grid) {
      return launch(kernel, grid, kGegluThreads, 0, target, static_cast<const T*>(x),
                    static_cast<T*>(y), shape, x_stride);
    };
    constexpr int V = kWide<T>;
    return d % V == 0 && rows_aligned<T>(x, x_stride) && aligned16(y)
               ? run(geglu_forward<T, V>, geglu_grid<V>(shape))
               : run(geglu_forward<T, 1>, geglu_grid<1>(shape));
  });
}

/// dy: (rows, d), x: (rows, 2 d), with strides; dx: (rows, 2 d), dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_geglu_backward(int device, void* stream, int dtype,
                                                         const void* dy, const void* x, void* dx,
                                                         int64_t rows, int64_t d,
                                                         int64_t dy_stride, int64_t x_stride) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GegluShape shape{rows, d};
    const auto run = [&](auto kernel, dim3 grid) {
      return launch(kernel, grid, kGegluThreads, 0, target, static_cast<const T*>(dy),
                    static_cast<const T*>(x), static_cast<T*>(dx), shape, dy_stride, x_stride);
    };
    constexpr int V = kWide<T>;
    const bool aligned =
        rows_aligned<T>(dy, dy_stride) && rows_aligned<T>(x, x_stride) && aligned16(dx);
    return d % V == 0 && aligned ? run(geglu_backward<T, V>, geglu_grid<V>(shape))
                                 : run(geglu_backward<T, 1>, geglu_grid<1>(shape));
  });
}
