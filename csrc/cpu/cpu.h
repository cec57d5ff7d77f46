// Shared by the CPU kernels: half precision in and out, functions that compilers can vectorize, and
// parallel loops. Included by files that are compiled once per instruction set, so everything has
// internal linkage: the linker must never substitute one instruction set's copy for another's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define RESTRICT __restrict__
#define SIMD _Pragma("omp simd")

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Kernels compute in fp32 on pieces of at most this many elements, which stay in the L1 cache.
constexpr int64_t PIECE = 1024;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  // exponent and mantissa moved to their fp32 position, 2^112 too small; infinity and NaN are special
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float wide = from_bits(magnitude) * 0x1p112f;
  wide = magnitude >= 0x0f800000 ? from_bits(magnitude | 0x7f800000) : wide;
  return from_bits(to_bits(wide) | uint32_t(x.bits & 0x8000) << 16);
}

// Rounded to nearest, ties to even.
template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}
template <> inline fp16 from_float<fp16>(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000, magnitude = to_bits(x) & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // below 2^-14: adding 1/2 leaves the bits of the subnormal, rounded, at the end of the sum
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return {uint16_t(sign | half)};
}

// n elements as fp32: in place, or converted into `buffer`.
inline const float* widen(const float* x, float*, int64_t) { return x; }

inline const float* widen(const bf16* RESTRICT x, float* RESTRICT buffer, int64_t n) {
  SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

inline const float* widen(const fp16* RESTRICT x, float* RESTRICT buffer, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
  SIMD for (int64_t j = i; j < n; ++j) buffer[j] = to_float(x[j]);
  return buffer;
}

// Where to write fp32 results before `narrow` stores them to y.
inline float* target(float* y, float*) { return y; }
template <class T> inline float* target(T*, float* buffer) { return buffer; }

inline void narrow(const float*, float*, int64_t) {}  // already in place

inline void narrow(const float* RESTRICT x, bf16* RESTRICT y, int64_t n) {
  SIMD for (int64_t i = 0; i < n; ++i) y[i] = from_float<bf16>(x[i]);
}

inline void narrow(const float* RESTRICT x, fp16* RESTRICT y, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256((__m256i*)(y + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#endif
  SIMD for (int64_t j = i; j < n; ++j) y[j] = from_float<fp16>(x[j]);
}

// e^x within 1 ulp from -87.33 to 88.02; 0 below, the value at 88.02 above, NaN for NaN.
inline float exp_(float x) {
  const float top = 88.02f < x ? 88.02f : x;
  const float shifted = top * 1.44269504f + 12582912.0f;  // rounds to an integer k, in the low bits
  const float k = shifted - 12582912.0f;
  const float r = k * 2.12194440e-4f + (k * -0.693359375f + top);  // top - k ln 2
  float p = 1.3836843e-3f;  // minimax of e^r on |r| <= ln(2) / 2, error 2e-9
  p = p * r + 8.3748158e-3f;
  p = p * r + 4.1668225e-2f;
  p = p * r + 1.6666420e-1f;
  p = p * r + 4.9999991e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scaled = p * from_bits((to_bits(shifted) << 23) + 0x3f800000);
  return x < -87.33f ? 0.0f : scaled;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// The error function within 1.5 ulp of 1 (absolute).
inline float erf_(float x) {
  const float z = x < 0 ? -x : x, s = x * x;
  float inner = 7.647115853e-05f;  // erf(z) / z in z^2 for z <= 1
  inner = inner * s + -7.942355587e-04f;
  inner = inner * s + 5.179749336e-03f;
  inner = inner * s + -2.684859186e-02f;
  inner = inner * s + 1.128343046e-01f;
  inner = inner * s + -3.761260509e-01f;
  inner = inner * s + 1.128379107e+00f;
  const float far = 4.0f < z ? 4.0f : z;
  float log_erfc = 1.855748996e-04f;  // ln(1 - erf(z)) for 1 <= z <= 4
  log_erfc = log_erfc * far + -2.939615864e-03f;
  log_erfc = log_erfc * far + 2.180535160e-02f;
  log_erfc = log_erfc * far + -1.030374393e-01f;
  log_erfc = log_erfc * far + -6.382256150e-01f;
  log_erfc = log_erfc * far + -1.127040029e+00f;
  log_erfc = log_erfc * far + -3.537089215e-04f;
  const float outer = 1.0f - exp_(log_erfc);
  const float signed_outer = x < 0 ? -outer : outer;
  return z > 1.0f ? signed_outer : x * inner;  // NaN takes the second branch
}

// LANES numbers in one vector register (several, if the instruction set has no wide enough one).
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
inline Vector load(const float* x) {
  Vector v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}
inline void store(float* x, Vector v) { __builtin_memcpy(x, &v, sizeof v); }


inline float sum_of_lanes(Vector v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Calls add(u, i) for vectors starting at i, with u cycling through four accumulators, and rest(i) for
// the remaining elements: an order that depends only on n and the instruction set.
template <class Add, class Rest> inline void in_vectors(int64_t n, const Add& add, const Rest& rest) {
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) add(u, i + u * LANES);
  }
  for (; i + LANES <= n; i += LANES) add(0, i);
  for (; i < n; ++i) rest(i);
}

inline float sum_of(const Vector (&v)[4]) { return sum_of_lanes((v[0] + v[1]) + (v[2] + v[3])); }

inline float sum(const float* x, int64_t n) {
  Vector s[4] = {};
  float rest = 0;
  in_vectors(n, [&](int u, int64_t i) { s[u] += load(x + i); }, [&](int64_t i) { rest += x[i]; });
  return sum_of(s) + rest;
}

inline float dot(const float* x, const float* y, int64_t n) {
  Vector s[4] = {};
  float rest = 0;
  in_vectors(
      n, [&](int u, int64_t i) { s[u] += load(x + i) * load(y + i); },
      [&](int64_t i) { rest += x[i] * y[i]; });
  return sum_of(s) + rest;
}

// The sums of x - center and of its square.
inline void sums_around(const float* x, int64_t n, float center, float* off, float* squares) {
  Vector s[4] = {}, q[4] = {};
  float s_rest = 0, q_rest = 0;
  in_vectors(
      n,
      [&](int u, int64_t i) {
        const Vector d = load(x + i) - center;
        s[u] += d;
        q[u] += d * d;
      },
      [&](int64_t i) {
        const float d = x[i] - center;
        s_rest += d;
        q_rest += d * d;
      });
  *off = sum_of(s) + s_rest;
  *squares = sum_of(q) + q_rest;
}

// Temporary memory, freed at the end of the scope and aligned to a cache line.
template <class T> struct Scratch {
  T* data;
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(std::aligned_alloc(64, (sizeof(T) * size_t(n) / 64 + 1) * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Call f(begin, end) on pieces of [0, n), each of at least `grain`, on the pool's threads.
template <class F> inline void parallel(int64_t n, int64_t grain, const F& f) {
  fastdiff::parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

// Call f(T()) with the storage type of a dtype.
template <class F> inline void with_type(Dtype dtype, const F& f) {
  if (dtype == F16)
    f(fp16());
  else if (dtype == BF16)
    f(bf16());
  else
    f(float());
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
