// GEGLU on a CPU: row by row, in pieces that stay in the L1 cache.
#include "geglu.h"

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr float SQRT_HALF = 0.70710678f;
constexpr int64_t NUMBERS_PER_THREAD = 8192;  // fewer do not justify waking a thread

template <class T> void forward(const Geglu& a) {
  const int64_t grain = larger(1, NUMBERS_PER_THREAD / larger(1, a.d));
  parallel(a.rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float gate_buffer[PIECE], value_buffer[PIECE], y_buffer[PIECE];
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
      T* y = static_cast<T*>(a.y) + r * a.d;
      for (int64_t i = 0; i < a.d; i += PIECE) {
        const int64_t n = smaller(PIECE, a.d - i);
        const float* RESTRICT value = widen(x + i, value_buffer, n);
        const float* RESTRICT gate = widen(x + a.d + i, gate_buffer, n);
        float* RESTRICT out = target(y + i, y_buffer);
        SIMD for (int64_t j = 0; j < n; ++j)
          out[j] = value[j] * (0.5f * gate[j] * (1.0f + erf_(gate[j] * SQRT_HALF)));
        narrow(out, y + i, n);
      }
    }
  });
}

template <class T> void backward(const GegluBackward& a) {
  const int64_t grain = larger(1, NUMBERS_PER_THREAD / larger(1, a.d));
  parallel(a.rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float gate_buffer[PIECE], value_buffer[PIECE], dy_buffer[PIECE];
    alignas(64) float dvalue_buffer[PIECE], dgate_buffer[PIECE];
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
      const T* dy = static_cast<const T*>(a.dy) + r * a.dy_stride;
      T* dx = static_cast<T*>(a.dx) + r * 2 * a.d;
      for (int64_t i = 0; i < a.d; i += PIECE) {
        const int64_t n = smaller(PIECE, a.d - i);
        const float* RESTRICT value = widen(x + i, value_buffer, n);
        const float* RESTRICT gate = widen(x + a.d + i, gate_buffer, n);
        const float* RESTRICT gradient = widen(dy + i, dy_buffer, n);
        float* RESTRICT dvalue = target(dx + i, dvalue_buffer);
        float* RESTRICT dgate = target(dx + a.d + i, dgate_buffer);
        SIMD for (int64_t j = 0; j < n; ++j) {
          const float g = gate[j], cdf = 0.5f * (1.0f + erf_(g * SQRT_HALF));  // gelu(g) = g cdf(g)
          const float density = 0.39894228f * exp_(-0.5f * g * g);
          dvalue[j] = gradient[j] * (g * cdf);
          dgate[j] = gradient[j] * value[j] * (cdf + g * density);
        }
        narrow(dvalue, dx + i, n);
        narrow(dgate, dx + a.d + i, n);
      }
    }
  });
}

}  // namespace

template <> void run(const Geglu& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

template <> void run(const GegluBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
