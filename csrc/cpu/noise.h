// Normal numbers from Philox words on a CPU, included by the kernels that need noise. The formulas are
// in kernels/philox_normal. log, sin and cos are computed in fp64 (errors of 1e-11) and the product is
// rounded once, so a number differs from the reference only if both are next to a rounding tie.
#pragma once

#include "cpu.h"
#include "philox.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t BLOCKS = 256;  // blocks of 4 numbers generated at a time

struct NoiseKey {
  uint32_t seed_low, seed_high, step, stream;
};

// 2 pi u = (quadrant + x) pi / 2 with |x| <= 1/2: x is exact in fp32, and so is u.
inline void box_muller(uint32_t w0, uint32_t w1, float* z0, float* z1) {
  const float u0 = (float(int32_t(w0 >> 9)) + 0.5f) * 0x1p-23f;
  const float u1 = (float(int32_t(w1 >> 9)) + 0.5f) * 0x1p-21f;  // in quarters of a turn

  // ln u = e ln 2 + ln m with m in [sqrt(1/2), sqrt(2)]; ln m = 2 artanh((m - 1) / (m + 1))
  const int32_t bits = int32_t(to_bits(u0)) - 0x3f3504f3;
  const int32_t exponent = bits >> 23;
  const double m = double(from_bits(uint32_t((bits & 0x7fffff) + 0x3f3504f3)));
  const double s = (m - 1.0) / (m + 1.0), q = s * s;
  double series = 1.0 / 17.0;
  series = series * q + 1.0 / 15.0;
  series = series * q + 1.0 / 13.0;
  series = series * q + 1.0 / 11.0;
  series = series * q + 1.0 / 9.0;
  series = series * q + 1.0 / 7.0;
  series = series * q + 1.0 / 5.0;
  series = series * q + 1.0 / 3.0;
  series = series * q + 1.0;
  const double log_u = double(exponent) * 0.693147180559945309 + 2.0 * s * series;
  const double radius = __builtin_sqrt(-2.0 * log_u);

  const int32_t quadrant = int32_t(u1 + 0.5f);  // 0 to 4
  const double y = double(u1 - float(quadrant)) * 1.57079632679489662, t = y * y;
  double sine = 1.0 / 6227020800.0;
  sine = sine * t - 1.0 / 39916800.0;
  sine = sine * t + 1.0 / 362880.0;
  sine = sine * t - 1.0 / 5040.0;
  sine = sine * t + 1.0 / 120.0;
  sine = sine * t - 1.0 / 6.0;
  sine = (sine * t + 1.0) * y;
  double cosine = -1.0 / 87178291200.0;
  cosine = cosine * t + 1.0 / 479001600.0;
  cosine = cosine * t - 1.0 / 3628800.0;
  cosine = cosine * t + 1.0 / 40320.0;
  cosine = cosine * t - 1.0 / 720.0;
  cosine = cosine * t + 1.0 / 24.0;
  cosine = cosine * t - 0.5;
  cosine = cosine * t + 1.0;
  const float a = float(radius * cosine), b = float(radius * sine);
  const bool odd = quadrant & 1;
  const float along = odd ? b : a, across = odd ? a : b;
  const uint32_t flip_cosine = uint32_t((quadrant + 1) & 2) << 30;  // in quadrants 1 and 2
  const uint32_t flip_sine = uint32_t(quadrant & 2) << 30;          // in quadrants 2 and 3
  *z0 = from_bits(to_bits(along) ^ flip_cosine);
  *z1 = from_bits(to_bits(across) ^ flip_sine);
}

// Numbers 4 * first to 4 * (first + count) of an image, count <= BLOCKS.
inline void normals_of_blocks(const NoiseKey& key, int64_t first, int64_t count,
                              float* RESTRICT out) {
  alignas(64) uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS];
  SIMD for (int64_t i = 0; i < count; ++i) {
    const uint64_t block = uint64_t(first + i);
    c0[i] = uint32_t(block);
    c1[i] = uint32_t(block >> 32);
    c2[i] = key.step;
    c3[i] = key.stream;
  }
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    SIMD for (int64_t i = 0; i < count; ++i) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0[i], p1 = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = uint32_t(p1);
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  alignas(64) float z0[BLOCKS], z1[BLOCKS], z2[BLOCKS], z3[BLOCKS];
  SIMD for (int64_t i = 0; i < count; ++i) box_muller(c0[i], c1[i], z0 + i, z1 + i);
  SIMD for (int64_t i = 0; i < count; ++i) box_muller(c2[i], c3[i], z2 + i, z3 + i);
  for (int64_t i = 0; i < count; ++i) {
    out[4 * i] = z0[i];
    out[4 * i + 1] = z1[i];
    out[4 * i + 2] = z2[i];
    out[4 * i + 3] = z3[i];
  }
}

// Generates the numbers first to first + n of an image, n <= 4 * BLOCKS - 4, and returns where they
// begin in `buffer`, which has room for 4 * BLOCKS.
inline const float* normals(const NoiseKey& key, int64_t first, int64_t n, float* buffer) {
  const int64_t block = first / 4, end = ceil_div(first + n, 4);
  normals_of_blocks(key, block, end - block, buffer);
  return buffer + (first - 4 * block);
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
