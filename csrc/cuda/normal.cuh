// Normal numbers from Philox words on a GPU (kernels/philox_normal documents the scheme; philox.h
// computes the words).
//
// fp32 and integers only: r, cos and sin are sums of two fp32 numbers, accurate to 2^-25, and their
// product is rounded once. The result is at most 1.4 ulp from the reference, as a test over all 2^23
// values of u confirms. Every product that is added to something is either an explicit fma or exact, so
// that every compiler and GPU gives the same bits. kernels/philox_normal/triton.py has the same
// functions for Triton.

#pragma once

#include "common.cuh"
#include "philox.h"

namespace fastdiff {

/// high + low, |low| <= ulp(high).
struct TwoPart {
  float high, low;
};

/// sqrt(-2 ln u), u = (k + 1/2) / 2^23.
///
/// u = 2^-halvings (1 + x) with sqrt(1/2) <= 1 + x < sqrt(2), x exact. Then -ln u = halvings ln 2 - x
/// + x^2 / 2 - x^3 p(x), where all but the small last term is summed in two parts. p is a minimax
/// polynomial; its error relative to the sum is 2^-30.
__device__ __forceinline__ TwoPart normal_radius(int k) {
  const float n = static_cast<float>(2 * k + 1);
  const int bits = static_cast<int>(__float_as_uint(n));
  const int exponent = (bits - 0x3F3504F3) >> 23;  // minus the bits of sqrt(1/2)
  const float x =
      __uint_as_float(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float halvings = static_cast<float>(24 - exponent);
  const float square = x * x, square_rest = fmaf(x, x, -square);
  float p = fmaf(x, 0.06920981844405235f, -0.11780652425670435f);
  p = fmaf(x, p, 0.1186513528142905f);
  p = fmaf(x, p, -0.12385560341324574f);
  p = fmaf(x, p, 0.14220022299820936f);
  p = fmaf(x, p, -0.16669215926695688f);
  p = fmaf(x, p, 0.2000214604066092f);
  p = fmaf(x, p, -0.24999986427650803f);
  p = fmaf(x, p, 0.33333311934300913f);
  const float twos = halvings * 0.693145751953125f;  // ln 2 to 16 bits: exact
  const float first = twos - x;
  const float second = fmaf(square, 0.5f, first);
  float rest = ((twos - first) - x) + fmaf(square, 0.5f, first - second);
  rest = fmaf(halvings, 1.4286068202862268e-06f, rest);
  rest = fmaf(square_rest, 0.5f, rest);
  rest = fmaf(-x * square, p, rest);
  const float log = second + rest, log_rest = (second - log) + rest;
  const float root = sqrtf(2.0f * log);
  const float left = fmaf(log_rest, 2.0f, fmaf(-root, root, 2.0f * log));  // -2 ln u - root^2
  return {root, 0.5f * left / root};
}

/// cos and sin of 2 pi u, u = (k + 1/2) / 2^23.
///
/// The nearest quarter turn is subtracted in integers. The rest is t eighths of a turn, -1 < t < 1
/// exact, with sin = t (pi/4 + s S(s)) and cos = 1 + s (-pi^2/32 + s C(s)), s = t^2.
__device__ __forceinline__ void normal_circle(int k, TwoPart& across, TwoPart& up) {
  const int n = 2 * k + 1;
  const int quarter = (n + 0x200000) >> 22;
  const float t = static_cast<float>(n - (quarter << 22)) * 4.76837158203125e-07f;  // 2^-21
  const float s = t * t, s_rest = fmaf(t, t, -s);
  float p = fmaf(s, 3.0986709576675916e-07f, -3.657402448680323e-05f);
  p = fmaf(s, p, 0.002490394134771033f);
  p = fmaf(s, p, -0.08074551217468735f);
  p = fmaf(s, p, -2.1855694143368964e-08f);
  float slope = 0.78539818525314331f + p;
  TwoPart sine;
  sine.high = t * slope;
  sine.low = fmaf(t, (0.78539818525314331f - slope) + p, fmaf(t, slope, -sine.high));
  p = fmaf(s, 3.541966947430206e-06f, -0.00032596140167883125f);
  p = fmaf(s, p, 0.015854338155321383f);
  p = fmaf(s, p, -9.074112017337654e-09f);
  slope = p - 0.3084251284599304f;
  const float drop = fmaf(s, slope, 0.0f);  // a bare product would be fused into the sums below
  float rest = fmaf(s, (-0.3084251284599304f - slope) + p, fmaf(s, slope, -drop));
  rest = fmaf(s_rest, slope, rest);
  TwoPart cosine;
  cosine.high = 1.0f + drop;
  cosine.low = ((1.0f - cosine.high) + drop) + rest;
  across = quarter & 1 ? sine : cosine;
  up = quarter & 1 ? cosine : sine;
  if ((quarter + 1) & 2) across = {-across.high, -across.low};
  if (quarter & 2) up = {-up.high, -up.low};
}

__device__ __forceinline__ float rounded_product(const TwoPart& a, const TwoPart& b) {
  return fmaf(a.high, b.high, fmaf(a.high, b.low, a.low * b.high));
}

/// The key of an image's noise, apart from the element.
struct NormalKey {
  uint64_t seed;
  uint32_t step, stream;
};

/// Numbers 4 * block to 4 * block + 3 of an image.
__device__ __forceinline__ void normals_of_block(const NormalKey& key, uint64_t block,
                                                 float (&z)[4]) {
  const Words words = philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                   key.step, key.stream}},
                                 static_cast<uint32_t>(key.seed),
                                 static_cast<uint32_t>(key.seed >> 32));
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const TwoPart r = normal_radius(static_cast<int>(words.w[i] >> 9));
    TwoPart across, up;
    normal_circle(static_cast<int>(words.w[i + 1] >> 9), across, up);
    z[i] = rounded_product(r, across);
    z[i + 1] = rounded_product(r, up);
  }
}

}  // namespace fastdiff
