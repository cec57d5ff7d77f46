// Launchers of gate_residual.

#include "gate_residual.cuh"

#include "launch.cuh"

namespace fastdiff {
namespace {

/// Threads of a block: one per pack of a row, in whole warps.
int gate_threads(int64_t packs) {
  const int64_t whole = ceil_div(packs, kWarpSize) * kWarpSize;
  return static_cast<int>(whole < kGateThreads ? whole : kGateThreads);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// x, residual: (n, length, d) with row strides; y: dense; gate: (n, d), dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_gate_residual(
    int device, void* stream, int dtype, const void* x, const void* residual, void* y,
    const void* gate, int gate_dtype, int64_t n, int64_t length, int64_t d, int64_t x_stride,
    int64_t residual_stride) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GateResidualRows<T> p{static_cast<const T*>(x), static_cast<const T*>(residual),
                                static_cast<T*>(y), {gate, gate_dtype}, length, d, x_stride,
                                residual_stride};
    constexpr int V = kWide<T>;
    const auto run = [&](auto kernel, int64_t packs) {
      return launch(kernel, grid_of(n * length), gate_threads(packs), 0, target, p);
    };
    const bool aligned = d % V == 0 && rows_aligned<T>(x, x_stride) &&
                         rows_aligned<T>(residual, residual_stride) && aligned16(y) &&
                         aligned16(gate);
    return aligned ? run(gate_residual_rows<T, V>, d / V) : run(gate_residual_rows<T, 1>, d);
  });
}

/// dy, x: (n, length, d) with row strides; dx: dense; shares: (n, chunks, d) fp32.
FASTDIFF_EXPORT const char* fastdiff_cuda_gate_residual_backward(
    int device, void* stream, int dtype, const void* dy, const void* x, void* dx, const void* gate,
    int gate_dtype, float* shares, int64_t n, int64_t length, int64_t d, int64_t chunks,
    int64_t dy_stride, int64_t x_stride) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GateResidualGradients<T> p{static_cast<const T*>(dy), static_cast<const T*>(x),
                                     static_cast<T*>(dx), {gate, gate_dtype}, shares, length, d,
                                     chunks, dy_stride, x_stride};
    constexpr int V = kWide<T>;
    const auto run = [&](auto kernel, int64_t packs) {
      const int threads = gate_threads(packs);
      const dim3 grid = grid_of(n * chunks, ceil_div(packs, threads));
      return launch(kernel, grid, threads, 0, target, p);
    };
    const bool aligned = d % V == 0 && rows_aligned<T>(dy, dy_stride) &&
                         rows_aligned<T>(x, x_stride) && aligned16(dx) && aligned16(gate);
    return aligned ? run(gate_residual_rows_backward<T, V>, d / V)
                   : run(gate_residual_rows_backward<T, 1>, d);
  });
}
