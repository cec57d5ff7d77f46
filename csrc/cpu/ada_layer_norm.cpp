// Adaptive LayerNorm on a CPU: row by row, so that a row stays in the L1 cache.
#include "ada_layer_norm.h"

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t NUMBERS_PER_THREAD = 8192;  // fewer do not justify waking a thread
constexpr int64_t CHUNK = 16384;              // elements whose dscale is accumulated in fp32

// Normalizes a row in fp32. The mean is stored as high + low, since x - high is exact when the mean
// is large; squares are taken around it. Returns 1 / standard deviation.
inline float normalise(const float* RESTRICT x, float* RESTRICT normal, int64_t d, double eps) {
  const float center = float(double(sum(x, d)) / double(d));
  float off, squares;
  sums_around(x, d, center, &off, &squares);
  const double mean = double(center) + off / double(d);
  const double variance = (squares - double(off) * off / double(d)) / double(d);
  const float high = float(mean), low = float(mean - double(high));
  const float r = float(1.0 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + eps));
  const float shift = -low * r;
  SIMD for (int64_t i = 0; i < d; ++i) normal[i] = (x[i] - high) * r + shift;
  return r;
}

template <class T> void forward(const AdaLayerNorm& a) {
  parallel(a.n * a.length, larger(1, NUMBERS_PER_THREAD / a.d), [&](int64_t begin, int64_t end) {
    Scratch<float> memory(3 * a.d);
    float *buffer = memory.data, *RESTRICT normal = buffer + a.d;
    for (int64_t row = begin; row < end; ++row) {
      const float* x = widen(static_cast<const T*>(a.x) + row * a.x_stride, buffer, a.d);
      normalise(x, normal, a.d, a.eps);
      const float* RESTRICT scale = a.scale + row / a.length * a.d;
      const float* RESTRICT shift = a.shift + row / a.length * a.d;
      T* y = static_cast<T*>(a.y) + row * a.d;
      float* RESTRICT out = target(y, buffer + 2 * a.d);
      SIMD for (int64_t i = 0; i < a.d; ++i) out[i] = normal[i] * (1.0f + scale[i]) + shift[i];
      narrow(out, y, a.d);
    }
  });
}

// With g = dy (1 + scale): dx = (g - mean(g) - n^ mean(g n^)) / deviation. A sample's rows are split
// into chunks that depend only on its shape; their partial sums are added up in order.
template <class T> void backward(const AdaLayerNormBackward& a) {
  const int64_t rows = larger(1, CHUNK / a.d), chunks = ceil_div(a.length, rows);
  Scratch<float> shares(a.n * chunks * 2 * a.d);
  parallel(a.n * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> memory(5 * a.d);
    float *x_buffer = memory.data, *dy_buffer = x_buffer + a.d, *out_buffer = x_buffer + 2 * a.d;
    float *RESTRICT normal = x_buffer + 3 * a.d, *RESTRICT product = x_buffer + 4 * a.d;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *RESTRICT dscale = shares.data + chunk * 2 * a.d, *RESTRICT dshift = dscale + a.d;
      for (int64_t i = 0; i < 2 * a.d; ++i) dscale[i] = 0;
      const int64_t sample = chunk / chunks, first = chunk % chunks * rows;
      const float* RESTRICT scale = a.scale + sample * a.d;
      for (int64_t t = first; t < smaller(a.length, first + rows); ++t) {
        const int64_t row = sample * a.length + t;
        const float* x = widen(static_cast<const T*>(a.x) + row * a.x_stride, x_buffer, a.d);
        const float* RESTRICT dy =
            widen(static_cast<const T*>(a.dy) + row * a.dy_stride, dy_buffer, a.d);
        const float r = normalise(x, normal, a.d, a.eps);
        SIMD for (int64_t i = 0; i < a.d; ++i) {
          dscale[i] += dy[i] * normal[i];
          dshift[i] += dy[i];
          product[i] = dy[i] * (1.0f + scale[i]);
        }
        const float mean = sum(product, a.d) / float(a.d);
        const float slope = dot(product, normal, a.d) / float(a.d);
        T* dx = static_cast<T*>(a.dx) + row * a.d;
        float* RESTRICT out = target(dx, out_buffer);
        SIMD for (int64_t i = 0; i < a.d; ++i)
          out[i] = (product[i] - mean - normal[i] * slope) * r;
        narrow(out, dx, a.d);
      }
    }
  });
  for (int64_t sample = 0; sample < a.n; ++sample)
    for (int64_t i = 0; i < a.d; ++i) {
      double dscale = 0, dshift = 0;
      for (int64_t chunk = sample * chunks; chunk < (sample + 1) * chunks; ++chunk) {
        dscale += double(shares.data[chunk * 2 * a.d + i]);
        dshift += double(shares.data[chunk * 2 * a.d + a.d + i]);
      }
      a.dscale[sample * a.d + i] = float(dscale);
      a.dshift[sample * a.d + i] = float(dshift);
    }
}

}  // namespace

template <> void run(const AdaLayerNorm& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

template <> void run(const AdaLayerNormBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
