// One row of a sampler table on a CPU: every tensor is read and written once.
#include "sampler_step.h"

#include "noise.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

enum Column { U, V, A, B, C1, C2, C3, S, P, Q, SLOT, W, CLAMP, LOGVAR_MIN, LOGVAR_MAX };

constexpr int64_t PART = 4 * BLOCKS - 4;  // numbers at once
// Fewer are not worth waking a thread for, which takes longer than 10 us: without noise and with it.
constexpr int64_t NUMBERS_PER_THREAD = 65536, NOISY_NUMBERS_PER_THREAD = 16384;

template <class T> struct Step {
  const SamplerStep& a;
  const int64_t numbers;  // of a sample
  const T* prediction;

  explicit Step(const SamplerStep& arguments)
      : a(arguments), numbers(a.runs * a.length), prediction(static_cast<const T*>(a.prediction)) {}

  // n <= PART numbers of the prediction from position j of a run, as fp32
  const float* read(int64_t image, int64_t run, int64_t j, int64_t channels, float* buffer,
                    int64_t n) const {
    const T* p = prediction + image * a.image_stride + run * a.run_stride + j * a.stride + channels;
    if (a.stride == 1) return widen(p, buffer, n);
    if (a.stride == 4)  // latents in channels_last: a constant stride is shuffled, not gathered
      SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i * 4]);
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i * a.stride]);
    return buffer;
  }

  // The network's F, guided: n numbers of `image`.
  const float* guided(int64_t image, int64_t run, int64_t j, float* buffer, float* other,
                      int64_t n) const {
    if (!a.guided) return read(image, run, j, 0, buffer, n);
    const float* uncond = read(image, run, j, 0, other, n);
    const float* cond = read(a.n + image, run, j, 0, buffer, n);
    const float w = a.row[W];
    SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = uncond[i] + w * (cond[i] - uncond[i]);
    return buffer;
  }

  // Variance over a sample of what `piece(run, j, n)` gives, in two passes; the mean is taken above the
  // first number, so that a constant sample has none.
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

  // What guidance_rescale multiplies F by: phi std(F_cond) / std(F) + 1 - phi.
  float rescale(int64_t image) const {
    alignas(64) float buffer[4 * BLOCKS], other[4 * BLOCKS];
    const double wanted = variance([&](int64_t run, int64_t j, int64_t n) {
      return read(a.n + image, run, j, 0, buffer, n);
    });
    const double have = variance([&](int64_t run, int64_t j, int64_t n) {
      return guided(image, run, j, buffer, other, n);
    });
    const double ratio = have > 0 ? __builtin_sqrt(wanted / have) : 1.0;
    return float(a.rescale * ratio + (1.0 - a.rescale));
  }

  void part(int64_t image, int64_t run, int64_t j, int64_t n, float factor) const {
    alignas(64) float buffer[4 * BLOCKS], other[4 * BLOCKS], d[4 * BLOCKS], next[4 * BLOCKS];
    const float* row = a.row;
    const int64_t element = run * a.length + j, at = image * numbers + element;
    const int64_t slot_size = a.n * numbers;
    float* RESTRICT x = a.x + at;
    const float* RESTRICT f = guided(image, run, j, buffer, other, n);
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
      const float* RESTRICT h = a.history + slot * slot_size + at;
      SIMD for (int64_t i = 0; i < n; ++i) next[i] += k * h[i];
    }
    if (row[S] != 0) {
      const uint64_t seed = uint64_t(a.seeds[image]);
      const NoiseKey key{uint32_t(seed), uint32_t(seed >> 32), uint32_t(a.step), a.stream};
      const float* RESTRICT z = normals(key, element, n, other);
      if (a.learned) {
        const float low = row[LOGVAR_MIN], high = row[LOGVAR_MAX];
        const float* RESTRICT w =
            read(a.guided ? a.n + image : image, run, j, a.variance_offset, buffer, n);
        SIMD for (int64_t i = 0; i < n; ++i) {
          const float fraction = (w[i] + 1.0f) * 0.5f;
          next[i] += exp_(0.5f * (fraction * high + (1.0f - fraction) * low)) * z[i];
        }
      } else {
        const float s = row[S];
        SIMD for (int64_t i = 0; i < n; ++i) next[i] += s * z[i];
      }
    }
    if (row[SLOT] >= 0) {
      const float p = row[P], q = row[Q];
      float* RESTRICT h = a.history + int64_t(row[SLOT]) * slot_size + at;
      SIMD for (int64_t i = 0; i < n; ++i) h[i] = p * x[i] + q * d[i];
    }
    SIMD for (int64_t i = 0; i < n; ++i) x[i] = next[i];
  }

  void all() const {
    Scratch<float> factors(a.n);
    const bool rescales = a.guided && a.rescale != 0;
    parallel(rescales ? a.n : 0, larger(1, 8192 / numbers), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) factors.data[image] = rescale(image);
    });
    const int64_t parts = ceil_div(a.length, PART), units = a.n * a.runs * parts;
    const int64_t wanted = a.row[S] != 0 ? NOISY_NUMBERS_PER_THREAD : NUMBERS_PER_THREAD;
    const int64_t grain = larger(1, wanted / smaller(PART, a.length));
    parallel(units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i % parts * PART, run = i / parts % a.runs, image = i / parts / a.runs;
        part(image, run, j, smaller(PART, a.length - j), rescales ? factors.data[image] : 1.0f);
      }
    });
  }
};

}  // namespace

template <> void run(const SamplerStep& a) {
  with_type(a.dtype, [&](auto type) { Step<decltype(type)>(a).all(); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
