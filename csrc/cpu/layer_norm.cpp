// LayerNorm on a CPU, optionally after an addition: row by row, so that a row stays in the L1 cache.
#include "layer_norm.h"

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t NUMBERS_PER_THREAD = 8192;  // fewer do not justify waking a thread
constexpr int64_t CHUNK = 16384;              // elements whose dweight is accumulated in fp32

// The mean of 64 elements spread over a row: so close to the row's mean that squares of differences from
// it lose no precision, and one pass cheaper than the mean itself. Exact if all elements are equal.
inline float near_mean(const float* x, int64_t d) {
  constexpr int64_t NUMBERS = 64, PLACES = NUMBERS / LANES;
  if (d < 2 * NUMBERS) return float(double(sum(x, d)) / double(d));
  Vector parts[PLACES];
  for (int64_t i = 0; i < PLACES; ++i) parts[i] = load(x + i * (d / PLACES));
  for (int64_t half = PLACES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return sum_of_lanes(parts[0]) * (1.0f / NUMBERS);
}

// A row's mean as high + low, since x - high is exact when the mean is large, and 1 / deviation.
struct Statistics {
  float high, low, r;

  Statistics(const float* x, int64_t d, double eps) {
    const float center = near_mean(x, d);
    float off, squares;
    sums_around(x, d, center, &off, &squares);
    const double mean = double(center) + off / double(d);
    const double variance = (squares - double(off) * off / double(d)) / double(d);
    high = float(mean);
    low = float(mean - double(high));
    r = float(1.0 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + eps));
  }
};

template <class T> void forward(const LayerNorm& a) {
  const int64_t grain = larger(1, NUMBERS_PER_THREAD / a.d);
  parallel(a.rows, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> memory(3 * a.d);
    float *buffer = memory.data, *residual_buffer = buffer + a.d, *out_buffer = buffer + 2 * a.d;
    for (int64_t row = begin; row < end; ++row) {
      const float* RESTRICT x =
          widen(static_cast<const T*>(a.x) + row * a.x_stride, buffer, a.d);
      if (a.total) {
        T* total = static_cast<T*>(a.total) + row * a.d;
        const int64_t at = row * a.residual_stride;
        const float* RESTRICT more =
            a.wide_residual ? static_cast<const float*>(a.residual) + at
                            : widen(static_cast<const T*>(a.residual) + at, residual_buffer, a.d);
        float* RESTRICT out = target(total, out_buffer);
        SIMD for (int64_t i = 0; i < a.d; ++i) out[i] = x[i] + more[i];
        narrow(out, total, a.d);
        x = widen(total, buffer, a.d);
      }
      const Statistics s(x, a.d, a.eps);
      T* y = static_cast<T*>(a.y) + row * a.d;
      float* RESTRICT out = target(y, out_buffer);
      const float shift = -s.low * s.r;
      const float *RESTRICT weight = a.weight, *RESTRICT bias = a.bias;
      if (weight && bias) {
        SIMD for (int64_t i = 0; i < a.d; ++i)
          out[i] = ((x[i] - s.high) * s.r + shift) * weight[i] + bias[i];
      } else {
        SIMD for (int64_t i = 0; i < a.d; ++i) out[i] = (x[i] - s.high) * s.r + shift;
        if (weight) SIMD for (int64_t i = 0; i < a.d; ++i) out[i] *= weight[i];
        if (bias) SIMD for (int64_t i = 0; i < a.d; ++i) out[i] += bias[i];
      }
      narrow(out, y, a.d);
    }
  });
}

// With n^ the normalized row and g = dy weight: dx = (g - mean(g) - n^ mean(g n^)) / deviation.
template <class T> void backward(const LayerNormBackward& a) {
  const int64_t rows_per_chunk = larger(1, CHUNK / a.d), chunks = ceil_div(a.rows, rows_per_chunk);
  const bool wants = a.dweight || a.dbias;
  Scratch<float> shares(wants ? chunks * 2 * a.d : 0);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> memory(6 * a.d);
    float *x_buffer = memory.data, *dy_buffer = x_buffer + a.d, *more_buffer = x_buffer + 2 * a.d,
          *out_buffer = x_buffer + 3 * a.d;
    float *RESTRICT normal = x_buffer + 4 * a.d, *RESTRICT product = x_buffer + 5 * a.d;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *RESTRICT dweight = shares.data + chunk * 2 * a.d, *RESTRICT dbias = dweight + a.d;
      if (wants)
        for (int64_t i = 0; i < 2 * a.d; ++i) dweight[i] = 0;
      const int64_t last = smaller(a.rows, (chunk + 1) * rows_per_chunk);
      for (int64_t row = chunk * rows_per_chunk; row < last; ++row) {
        const float* RESTRICT x =
            widen(static_cast<const T*>(a.x) + row * a.x_stride, x_buffer, a.d);
        const float* RESTRICT dy =
            widen(static_cast<const T*>(a.dy) + row * a.dy_stride, dy_buffer, a.d);
        const float* RESTRICT weight = a.weight;
        const Statistics s(x, a.d, a.eps);
        const float shift = -s.low * s.r;
        SIMD for (int64_t i = 0; i < a.d; ++i) normal[i] = (x[i] - s.high) * s.r + shift;
        if (wants) SIMD for (int64_t i = 0; i < a.d; ++i) {
            dweight[i] += dy[i] * normal[i];
            dbias[i] += dy[i];
          }
        if (weight) {
          SIMD for (int64_t i = 0; i < a.d; ++i) product[i] = dy[i] * weight[i];
        } else {
          SIMD for (int64_t i = 0; i < a.d; ++i) product[i] = dy[i];
        }
        const float mean = sum(product, a.d) / float(a.d);
        const float slope = dot(product, normal, a.d) / float(a.d);
        T* dx = static_cast<T*>(a.dx) + row * a.d;
        float* RESTRICT out = target(dx, out_buffer);
        SIMD for (int64_t i = 0; i < a.d; ++i)
          out[i] = (product[i] - mean - normal[i] * slope) * s.r;
        if (a.dtotal) {
          const float* RESTRICT more =
              widen(static_cast<const T*>(a.dtotal) + row * a.dtotal_stride, more_buffer, a.d);
          SIMD for (int64_t i = 0; i < a.d; ++i) out[i] += more[i];
        }
        narrow(out, dx, a.d);
      }
    }
  });
  for (int64_t i = 0; wants && i < a.d; ++i) {
    double dweight = 0, dbias = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      dweight += double(shares.data[chunk * 2 * a.d + i]);
      dbias += double(shares.data[chunk * 2 * a.d + a.d + i]);
    }
    if (a.dweight) a.dweight[i] = float(dweight);
    if (a.dbias) a.dbias[i] = float(dbias);
  }
}

}  // namespace

template <> void run(const LayerNorm& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

template <> void run(const LayerNormBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
