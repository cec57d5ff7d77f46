// Gated residual sum on a CPU, row by row.
#include "gate_residual.h"

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t NUMBERS_PER_THREAD = 16384;  // fewer do not justify waking a thread
constexpr int64_t CHUNK = 16384;               // elements whose dgate is accumulated in fp32

template <class T> void forward(const GateResidual& a) {
  parallel(a.n * a.length, larger(1, NUMBERS_PER_THREAD / a.d), [&](int64_t begin, int64_t end) {
    Scratch<float> memory(3 * a.d);
    for (int64_t row = begin; row < end; ++row) {
      const float* RESTRICT x =
          widen(static_cast<const T*>(a.x) + row * a.x_stride, memory.data, a.d);
      const float* RESTRICT residual = widen(
          static_cast<const T*>(a.residual) + row * a.residual_stride, memory.data + a.d, a.d);
      const float* RESTRICT gate = a.gate + row / a.length * a.d;
      T* y = static_cast<T*>(a.y) + row * a.d;
      float* RESTRICT out = target(y, memory.data + 2 * a.d);
      SIMD for (int64_t i = 0; i < a.d; ++i) out[i] = gate[i] * x[i] + residual[i];
      narrow(out, y, a.d);
    }
  });
}

// A sample's rows are split into chunks that depend only on its shape; their partial sums of dy x are
// added up in order.
template <class T> void backward(const GateResidualBackward& a) {
  const int64_t rows = larger(1, CHUNK / a.d), chunks = ceil_div(a.length, rows);
  Scratch<float> shares(a.n * chunks * a.d);
  parallel(a.n * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> memory(3 * a.d);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* RESTRICT dgate = shares.data + chunk * a.d;
      for (int64_t i = 0; i < a.d; ++i) dgate[i] = 0;
      const int64_t sample = chunk / chunks, first = chunk % chunks * rows;
      const float* RESTRICT gate = a.gate + sample * a.d;
      for (int64_t t = first; t < smaller(a.length, first + rows); ++t) {
        const int64_t row = sample * a.length + t;
        const float* RESTRICT x =
            widen(static_cast<const T*>(a.x) + row * a.x_stride, memory.data, a.d);
        const float* RESTRICT dy =
            widen(static_cast<const T*>(a.dy) + row * a.dy_stride, memory.data + a.d, a.d);
        T* dx = static_cast<T*>(a.dx) + row * a.d;
        float* RESTRICT out = target(dx, memory.data + 2 * a.d);
        SIMD for (int64_t i = 0; i < a.d; ++i) {
          dgate[i] += dy[i] * x[i];
          out[i] = gate[i] * dy[i];
        }
        narrow(out, dx, a.d);
      }
    }
  });
  for (int64_t sample = 0; sample < a.n; ++sample)
    for (int64_t i = 0; i < a.d; ++i) {
      double total = 0;
      for (int64_t chunk = sample * chunks; chunk < (sample + 1) * chunks; ++chunk)
        total += double(shares.data[chunk * a.d + i]);
      a.dgate[sample * a.d + i] = float(total);
    }
}

}  // namespace

template <> void run(const GateResidual& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

template <> void run(const GateResidualBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
