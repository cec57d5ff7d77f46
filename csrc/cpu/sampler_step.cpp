// One sampler step per image on a CPU, by its row of the table: every tensor is read and written once.
#include "sampler_step.h"

#include "noise.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

using namespace columns;

constexpr int64_t PART = 4 * BLOCKS - 4;  // elements at a time
// Fewer do not justify waking a thread, which takes longer than 10 us; without noise, and with it.
constexpr int64_t NUMBERS_PER_THREAD = 65536, NOISY_NUMBERS_PER_THREAD = 16384;

// Whether all n numbers are finite: compared as bits, no magnitude reaches that of infinity.
inline bool all_finite(const float* x, int64_t n) {
  uint32_t largest = 0;
  _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = to_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f800000u;
}

// The sum of z[i]^2
inline double sum_of_squares(const float* z, int64_t n) {
  double total = 0;
  _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; ++i)
    total += double(z[i]) * double(z[i]);
  return total;
}

// The sum of f high + (1 - f) low, f = (v + 1) / 2
inline double sum_of_log_variance(const float* v, int64_t n, double low, double high) {
  double total = 0;
  _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; ++i) {
    const double fraction = (double(v[i]) + 1.0) * 0.5;
    total += fraction * high + (1.0 - fraction) * low;
  }
  return total;
}

// An image's row of the table, and its indices into the prediction.
struct Place {
  const float* row;      // null: an idle slot
  int64_t cond, uncond;  // uncond -1: not guided

  bool rescales() const { return row && uncond >= 0 && row[RESCALE] != 0; }
};

template <class T> struct Step {
  const SamplerStep& a;
  const int64_t numbers;  // elements per sample
  const T* prediction;

  explicit Step(const SamplerStep& arguments)
      : a(arguments), numbers(a.runs * a.length), prediction(static_cast<const T*>(a.prediction)) {}

  Place place(int64_t image) const {
    const int64_t row = a.rows[image];
    return {row < 0 ? nullptr : a.table + row * COUNT, a.cond ? a.cond[image] : image,
            a.uncond ? a.uncond[image] : -1};
  }

  // n <= PART elements of an image of the prediction, from position j of a run, as fp32
  const float* read(int64_t image, int64_t run, int64_t j, int64_t channels, float* buffer,
                    int64_t n) const {
    const T* p = prediction + image * a.image_stride + run * a.run_stride + j * a.stride + channels;
    if (a.stride == 1) return widen(p, buffer, n);
    if (a.stride == 4)  // channels_last latents: with a constant stride, compilers shuffle, not gather
      SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i * 4]);
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i * a.stride]);
    return buffer;
  }

  // n elements of the network's F, guided. Clears `finite`, if given, if any element read is not.
  const float* guided(const Place& at, int64_t run, int64_t j, float* buffer, float* other,
                      int64_t n, bool* finite) const {
    const float* cond = read(at.cond, run, j, 0, buffer, n);
    if (finite && !all_finite(cond, n)) *finite = false;
    if (at.uncond < 0) return cond;
    const float* uncond = read(at.uncond, run, j, 0, other, n);
    if (finite && !all_finite(uncond, n)) *finite = false;
    const float w = at.row[W];
    SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = uncond[i] + w * (cond[i] - uncond[i]);
    return buffer;
  }

  // Variance over a sample of the values that `piece(run, j, n)` returns, in two passes. The mean is taken
  // relative to the first value, so that a constant sample has a variance of exactly 0.
  template <class F> double variance(const F& piece) const {
    const double first = piece(0, 0, 1)[0];
    double total = 0, squares = 0;
    for (int pass = 0; pass < 2; ++pass) {
      const float center = float(first + total / double(numbers));
      for (int64_t run = 0; run < a.runs; ++run)
        for (int64_t j = 0; j < a.length; j += PART) {
          const int64_t n = smaller(PART, a.length - j);
          const float* v = piece(run, j, n);
          float off, square;
          sums_around(v, n, center, &off, &square);
          if (pass == 0)
            total += double(off);
          else
            squares += double(square);
        }
    }
    return squares / double(numbers);
  }

  // The factor by which rescaling multiplies F: phi std(F_cond) / std(F) + 1 - phi.
  float rescale(const Place& at) const {
    alignas(64) float buffer[4 * BLOCKS], other[4 * BLOCKS];
    const double wanted = variance([&](int64_t run, int64_t j, int64_t n) {
      return read(at.cond, run, j, 0, buffer, n);
    });
    const double have = variance([&](int64_t run, int64_t j, int64_t n) {
      return guided(at, run, j, buffer, other, n, nullptr);
    });
    const double ratio = have > 0 ? __builtin_sqrt(wanted / have) : 1.0, phi = at.row[RESCALE];
    return float(phi * ratio + (1.0 - phi));
  }

  // Returns the sum of z^2 + 2 log |factor of z| over the part if log_prob is asked for, 0 without noise.
  double part(int64_t image, const Place& at, int64_t run, int64_t j, int64_t n, float factor) const {
    alignas(64) float buffer[4 * BLOCKS], other[4 * BLOCKS], d[4 * BLOCKS], next[4 * BLOCKS];
    const float* row = at.row;
    const int64_t element = run * a.length + j, first = image * numbers + element;
    const int64_t slot_size = a.n * numbers;
    bool finite = true;
    double density = 0;
    bool* const checked = a.finite ? &finite : nullptr;
    float* RESTRICT x = a.x + first;
    const float* RESTRICT f = guided(at, run, j, buffer, other, n, checked);
    const float u = row[U], v = row[V] * factor, ka = row[A], kb = row[B], bound = row[CLAMP];
    SIMD for (int64_t i = 0; i < n; ++i) {
      float value = u * x[i] + v * f[i];
      value = value > bound ? bound : value;
      value = value < -bound ? -bound : value;
      d[i] = value;
      next[i] = ka * x[i] + kb * value;
    }
    for (int slot = 0; slot < 3; ++slot) {
      const float k = row[C1 + slot];
      if (k == 0) continue;
      const float* RESTRICT h = a.history + slot * slot_size + first;
      SIMD for (int64_t i = 0; i < n; ++i) next[i] += k * h[i];
    }
    if (row[S] != 0) {
      const uint64_t seed = uint64_t(a.seeds[image]);
      const NoiseKey key{uint32_t(seed), uint32_t(seed >> 32), uint32_t(row[NOISE_STEP]), a.stream};
      const float* RESTRICT z = normals(key, element, n, other);
      if (a.log_prob) density = sum_of_squares(z, n);
      if (a.learned) {
        const float low = row[LOGVAR_MIN], high = row[LOGVAR_MAX];
        const float* RESTRICT w = read(at.cond, run, j, a.variance_offset, buffer, n);
        if (checked && !all_finite(w, n)) finite = false;
        SIMD for (int64_t i = 0; i < n; ++i) {
          const float fraction = (w[i] + 1.0f) * 0.5f;
          next[i] += exp_(0.5f * (fraction * high + (1.0f - fraction) * low)) * z[i];
        }
        if (a.log_prob) density += sum_of_log_variance(w, n, low, high);
      } else {
        const float s = row[S];
        SIMD for (int64_t i = 0; i < n; ++i) next[i] += s * z[i];
        if (a.log_prob) density += 2.0 * double(n) * __builtin_log(__builtin_fabs(double(s)));
      }
    }
    if (row[SLOT] >= 0) {
      const float p = row[P], q = row[Q];
      float* RESTRICT h = a.history + int64_t(row[SLOT]) * slot_size + first;
      SIMD for (int64_t i = 0; i < n; ++i) h[i] = p * x[i] + q * d[i];
    }
    SIMD for (int64_t i = 0; i < n; ++i) x[i] = next[i];
    if (a.denoised) __builtin_memcpy(a.denoised + first, d, size_t(n) * sizeof(float));
    if (!finite) __atomic_store_n(a.finite + image, false, __ATOMIC_RELAXED);  // threads may race
    return density;
  }

  // The log-densities of the samples, from their `parts` sums each
  void add_up(const double* densities, int64_t parts) const {
    constexpr double LOG_2_PI = 1.8378770664093453;
    for (int64_t image = 0; image < a.n; ++image) {
      const Place at = place(image);
      if (!at.row) continue;
      double total = 0;
      for (int64_t i = 0; i < parts; ++i) total += densities[image * parts + i];
      a.log_prob[image] = at.row[S] != 0 ? float(-0.5 * (total + double(numbers) * LOG_2_PI)) : 0.0f;
    }
  }

  void all() const {
    bool noisy = false, rescales = false;
    for (int64_t image = 0; image < a.n; ++image) {
      const Place at = place(image);
      noisy = noisy || (at.row && at.row[S] != 0);
      rescales = rescales || at.rescales();
    }
    Scratch<float> factors(rescales ? a.n : 0);
    parallel(rescales ? a.n : 0, larger(1, 8192 / numbers), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        const Place at = place(image);
        factors.data[image] = at.rescales() ? rescale(at) : 1.0f;
      }
    });
    const int64_t parts = ceil_div(a.length, PART), units = a.n * a.runs * parts;
    const int64_t wanted = noisy ? NOISY_NUMBERS_PER_THREAD : NUMBERS_PER_THREAD;
    const int64_t grain = larger(1, wanted / smaller(PART, a.length));
    Scratch<double> densities(a.log_prob ? units : 0);
    parallel(units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i % parts * PART, run = i / parts % a.runs, image = i / parts / a.runs;
        const Place at = place(image);
        if (!at.row) continue;
        const double density = part(image, at, run, j, smaller(PART, a.length - j),
                                    rescales ? factors.data[image] : 1.0f);
        if (a.log_prob) densities.data[i] = density;
      }
    });
    if (a.log_prob) add_up(densities.data, a.runs * parts);
  }
};

}  // namespace

template <> void run(const SamplerStep& a) {
  with_type(a.dtype, [&](auto type) { Step<decltype(type)>(a).all(); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
