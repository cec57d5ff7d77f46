// Applies a row of a sampler table to each sample, updating x and history in place
// (kernels/sampler_step documents the maths).
//
// One launch; if rows may rescale, another launch before it computes the deviations of whole images; if
// the log-density of the noise is asked for, one after it adds up the sums of the warps in a fixed order.
// Rows, indices and the table are read on the device, so a captured launch works for any of them. A
// thread handles the four elements of one Philox counter, in the logical order of an image whatever the
// layouts. Loads and stores are 16 bytes (8 for half precision) if a tensor is dense, else one element.
// Bytes: x in and out, the prediction (twice with guidance, once more for a learned variance), each
// history slot that is read or written, denoised out. If a coefficient is 0, its tensor is not read. A
// block belongs to one sample; blocks of idle samples return at once.
//
// A row or index out of range makes the sample's x NaN and leaves its history alone: a kernel cannot
// raise, and an unchanged x would be a wrong image without any sign of an error.

#pragma once

#include "normal.cuh"

namespace fastdiff {

/// The columns of a table, with the names of kernels/sampler_step/table.py.
enum Column : int {
  kU, kV, kA, kB, kC1, kC2, kC3, kS, kP, kQ, kSlot, kW, kClamp, kLogvarMin, kLogvarMax, kNoiseStep,
  kRescale
};
constexpr int kColumns = 20;
constexpr int kSlots = 3;
constexpr int kStepThreads = 128;
constexpr int kMomentThreads = 256;

/// Offsets of the elements of an image, e = outer * size + inner. An image has fewer than 2^31 elements,
/// so indices are 32-bit (a 64-bit division is a function call); offsets are 64-bit.
struct ImageLayout {
  int64_t image, outer, inner;  // strides
  unsigned size;                // of the inner dimension
  bool dense;                   // in order, without gaps, and images begin at a multiple of 4
};

/// Offsets of four neighboring elements of an image, of which `count` exist.
struct Quad {
  int64_t at[4];
  int count;
  bool packed;

  __device__ __forceinline__ Quad(const ImageLayout& layout, unsigned first, unsigned elements)
      : count(static_cast<int>(elements - first < 4 ? elements - first : 4)),
        packed(layout.dense && count == 4) {
    unsigned o = layout.dense ? 0 : first / layout.size;
    unsigned i = layout.dense ? first : first % layout.size;
    const int64_t step = layout.dense ? 1 : layout.inner;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      at[k] = o * layout.outer + i * step;
      if (++i == layout.size && !layout.dense) {
        i = 0;
        ++o;
      }
    }
  }

  /// Loads them as fp32, 0 beyond the image. `from`: the image's first element.
  template <typename T>
  __device__ __forceinline__ void load(const T* from, float (&out)[4]) const {
    if (packed) return unpack(load_pack<T, 4>(from + at[0]), out);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = k < count ? to_float(from[at[k]]) : 0.0f;
  }

  __device__ __forceinline__ void store(float* to, const float (&in)[4]) const {
    if (packed) return store_pack<float, 4>(to + at[0], pack_of<float, 4>(in));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) to[at[k]] = in[k];
  }
};

/// A sample's row of the table and its entries of the prediction.
template <typename T>
struct Place {
  const float* row;  // null: out of range
  const T *cond, *uncond;  // uncond null: not guided
  bool idle;
};

template <typename T>
struct StepArguments {
  float* x;
  const T* prediction;   // any number of images
  float* history;        // kSlots slots of N images
  const float* table;    // (table_rows, kColumns)
  const int64_t* rows;   // (N,); -1: leave the sample alone
  const int64_t* seeds;  // (N,)
  const int64_t* cond;   // (N,): index into the prediction; null: the sample's own index
  const int64_t* uncond;  // (N,): index, or -1: not guided; null: no sample is guided
  float* denoised;       // N images, or null
  bool* finite;          // (N,), or null: cleared if the prediction is not finite
  float* moments;        // (N, parts, 5); null: no row of a guided sample may rescale
  float* sums;           // (N, warps_of(elements)): sums of noise^2 and of the learned logvar
  float* log_prob;       // (N,), or null: the log-density of the noise
  ImageLayout at_x, at_f, at_history, along_f, at_denoised;  // along_f: in memory order
  int64_t slot_stride, variance;  // between slots; from a prediction to its learned variance
  int64_t n, table_rows, images;
  unsigned elements, parts;
  uint32_t stream;
  bool learned;

  __device__ __forceinline__ Place<T> place(int64_t sample) const {
    const int64_t index = rows[sample];
    const int64_t own = cond != nullptr ? cond[sample] : sample;
    const int64_t other = uncond != nullptr ? uncond[sample] : -1;
    Place<T> out{};
    out.idle = index == -1;
    if (index < 0 || index >= table_rows || own < 0 || own >= images || other < -1 ||
        other >= images)
      return out;
    const float* row = table + index * kColumns;
    if (other >= 0 && moments == nullptr && row[kRescale] != 0) return out;
    out.row = row;
    out.cond = prediction + own * at_f.image;
    out.uncond = other >= 0 ? prediction + other * at_f.image : nullptr;
    return out;
  }
};

__device__ __forceinline__ bool all_finite(const float (&x)[4]) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < 4; ++k) all = all && fabsf(x[k]) < __uint_as_float(0x7f800000u);
  return all;
}

/// F = uncond + W (cond - uncond), rounded the same way everywhere, so that a constant F stays constant.
__device__ __forceinline__ float guide(float uncond, float cond, float scale) {
  return fmaf(scale, cond - uncond, uncond);
}

/// Adds the first `count` (1 to 4) numbers, with Chan's formula like `Moments::merge`. The division may
/// be off by 2 ulp, which only affects the weights of the merge.
__device__ __forceinline__ void add_four(Moments& moments, const float (&d)[4], int count) {
  const float more = static_cast<float>(count), total = moments.count + more;
  float mean = 0, m2 = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) mean += k < count ? d[k] : 0.0f;
  mean = __fdividef(mean, more);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float apart = k < count ? d[k] - mean : 0.0f;
    m2 += apart * apart;
  }
  const float share = __fdividef(more, total), delta = mean - moments.mean;
  moments.mean += delta * share;
  moments.m2 += m2 + delta * delta * moments.count * share;
  moments.count = total;
}

/// Over every parts-th tile of an image: the count, mean and squares of F, and mean and squares of
/// F_cond. Means are relative to the image's first element, so that a constant image has squares of
/// exactly 0. Skips samples that are not rescaled. Grid: N * parts.
template <typename T>
__global__ void __launch_bounds__(kMomentThreads) sampler_step_moments(StepArguments<T> p) {
  FASTDIFF_SHARED(float, scratch, 3 * kMomentThreads / kWarpSize);
  const int64_t image = blockIdx.x / p.parts;
  const unsigned part = blockIdx.x % p.parts;
  const Place<T> at = p.place(image);
  // the whole block returns; the next launch does not read its moments
  if (at.row == nullptr || at.uncond == nullptr || at.row[kRescale] == 0) return;
  const float scale = at.row[kW];
  const float pivot_cond = to_float(*at.cond);
  const float pivot = guide(to_float(*at.uncond), pivot_cond, scale);
  Moments of_f, of_cond;
  const unsigned stride = p.parts * kMomentThreads * 4;
  for (unsigned first = (part * kMomentThreads + threadIdx.x) * 4; first < p.elements;
       first += stride) {  // cannot overflow: 2^31 plus a stride is below 2^32
    const Quad quad(p.along_f, first, p.elements);
    float f[4], c[4];
    quad.load(at.uncond, f);
    quad.load(at.cond, c);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      f[k] = guide(f[k], c[k], scale) - pivot;
      c[k] -= pivot_cond;
    }
    add_four(of_f, f, quad.count);
    add_four(of_cond, c, quad.count);
  }
  of_f = block_merge(of_f, scratch);
  of_cond = block_merge(of_cond, scratch);
  if (threadIdx.x != 0) return;
  float* out = p.moments + static_cast<int64_t>(blockIdx.x) * 5;
  out[0] = of_f.count;
  out[1] = of_f.mean;
  out[2] = of_f.m2;
  out[3] = of_cond.mean;
  out[4] = of_cond.m2;
}

/// std(F_cond) / std(F) of an image, 1 if F is constant; every lane of a warp must call it.
template <typename T>
__device__ __forceinline__ float ratio_of_deviations(const StepArguments<T>& p, int64_t image) {
  Moments of_f, of_cond;
  for (unsigned i = threadIdx.x % kWarpSize; i < p.parts; i += kWarpSize) {
    const float* in = p.moments + (image * p.parts + i) * 5;
    Moments f, cond;
    f.count = cond.count = in[0];
    f.mean = in[1];
    f.m2 = in[2];
    cond.mean = in[3];
    cond.m2 = in[4];
    of_f.merge(f);
    of_cond.merge(cond);
  }
  of_f = warp_merge(of_f);
  of_cond = warp_merge(of_cond);
  return of_f.m2 > 0 ? sqrtf(of_cond.m2 / of_f.m2) : 1.0f;
}

/// Computes the factor of the noise, S or exp(logvar / 2) from the learned variance; returns whether the
/// latter is finite. If kLogProb, adds its logarithms, logvar, to `density`.
template <typename T, bool kLogProb>
__device__ __forceinline__ bool noise_factors(const StepArguments<T>& p, const Place<T>& at,
                                              Quad quad, float (&out)[4], float& density) {
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = at.row[kS];
  if (!p.learned) return true;
  quad.packed = quad.packed && p.variance % 4 == 0;
  quad.load(at.cond + p.variance, out);
  const bool finite = all_finite(out);
  const float low = at.row[kLogvarMin], high = at.row[kLogvarMax];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float fraction = (out[k] + 1.0f) * 0.5f;
    const float logvar = fraction * high + (1.0f - fraction) * low;
    out[k] = expf(0.5f * logvar);
    if (kLogProb && k < quad.count) density += logvar;
  }
  return finite;
}

/// Sets x and denoised of a sample whose row or indices are out of range to NaN.
template <typename T>
__device__ __forceinline__ void spoil(const StepArguments<T>& p, int64_t image, unsigned first) {
  if (first >= p.elements) return;
  const float nan = __uint_as_float(0x7fc00000u);
  const float out[4] = {nan, nan, nan, nan};
  Quad(p.at_x, first, p.elements).store(p.x + image * p.at_x.image, out);
  if (p.denoised != nullptr)
    Quad(p.at_denoised, first, p.elements).store(p.denoised + image * p.at_denoised.image, out);
  if (p.finite != nullptr) p.finite[image] = false;
}

/// Elements 4 * block to 4 * block + 3 of an image. If kLogProb, returns the sum over them of noise^2 and
/// of the learned logvar; 0 without noise.
template <typename T, bool kLogProb>
__device__ __forceinline__ float step_four(const StepArguments<T>& p, const Place<T>& place,
                                           int64_t image, unsigned block, float share) {
  const float* row = place.row;
  float density = 0;
  float x[4], f[4], d[4], next[4];
  float* to = p.x + image * p.at_x.image;
  const Quad at_x(p.at_x, 4 * block, p.elements);
  at_x.load(to, x);
  const Quad at_f(p.at_f, 4 * block, p.elements);
  at_f.load(place.cond, f);
  bool finite = all_finite(f);
  if (place.uncond != nullptr) {
    at_f.load(place.uncond, d);
    finite = finite && all_finite(d);
#pragma unroll
    for (int k = 0; k < 4; ++k) f[k] = guide(d[k], f[k], row[kW]) * share;
  }
  const float bound = row[kClamp];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    d[k] = row[kU] * x[k] + row[kV] * f[k];
    d[k] = d[k] > bound ? bound : d[k] < -bound ? -bound : d[k];  // keeps NaN
    next[k] = row[kA] * x[k] + row[kB] * d[k];
  }
  const Quad at_history(p.at_history, 4 * block, p.elements);
  float* history = p.history + image * p.at_history.image;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const float c = row[kC1 + slot];
    if (c == 0) continue;
    float h[4];
    at_history.load(history + slot * p.slot_stride, h);
#pragma unroll
    for (int k = 0; k < 4; ++k) next[k] += c * h[k];
  }
  if (row[kS] != 0) {
    float factors[4], z[4];
    finite = noise_factors<T, kLogProb>(p, place, at_f, factors, density) && finite;
    const NormalKey key{static_cast<uint64_t>(p.seeds[image]),
                        static_cast<uint32_t>(row[kNoiseStep]), p.stream};
    normals_of_block(key, block, z);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      next[k] += factors[k] * z[k];
      if (kLogProb && k < at_x.count) density += z[k] * z[k];
    }
  }
  if (p.denoised != nullptr)
    Quad(p.at_denoised, 4 * block, p.elements).store(p.denoised + image * p.at_denoised.image, d);
  if (p.finite != nullptr && !finite) p.finite[image] = false;  // several threads may store this
  const int slot = static_cast<int>(row[kSlot]);
  if (slot >= 0 && slot < kSlots) {
#pragma unroll
    for (int k = 0; k < 4; ++k) d[k] = row[kP] * x[k] + row[kQ] * d[k];
    at_history.store(history + slot * p.slot_stride, d);
  }
  at_x.store(to, next);
  return density;
}

/// Warps that share an image.
__host__ __device__ __forceinline__ int64_t warps_of(unsigned elements) {
  return (static_cast<int64_t>(elements) - 1) / (4 * kWarpSize) + 1;
}

/// The sum over the first `count` lanes of a warp, complete in lane 0; the others have returned. A block
/// needs no barrier then, whose bookkeeping spilled a register.
__device__ __forceinline__ float sum_of_first(float x, int count) {
  const unsigned lanes = count == kWarpSize ? kAllLanes : (1u << count) - 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
    const bool exists = lane + apart < count;
    const float other = __shfl_sync(lanes, x, exists ? lane + apart : lane);
    x += exists ? other : 0.0f;
  }
  return x;
}

/// Grid: N * tiles; a tile is 4 * kStepThreads elements of an image.
template <typename T, bool kLogProb>
__global__ void __launch_bounds__(kStepThreads) sampler_step_row(StepArguments<T> p, unsigned tiles) {
  const int64_t image = blockIdx.x / tiles;
  const unsigned block = blockIdx.x % tiles * kStepThreads + threadIdx.x;
  const bool outside = 4 * block >= p.elements;
  const Place<T> place = p.place(image);
  const float* row = place.row;
  if (place.idle) return;  // the whole block, here and in the next line
  if (row == nullptr) return spoil(p, image, 4 * block);
  float share = 1.0f;
  if (place.uncond != nullptr && row[kRescale] != 0)
    share = row[kRescale] * ratio_of_deviations(p, image) + (1.0f - row[kRescale]);
  if (outside) return;
  const float density = step_four<T, kLogProb>(p, place, image, block, share);
  if (kLogProb) {
    const unsigned quads = (p.elements - 1) / 4 + 1;
    const float sum = sum_of_first(density, min(kWarpSize, int(quads - block / kWarpSize * kWarpSize)));
    if (threadIdx.x % kWarpSize == 0) p.sums[image * warps_of(p.elements) + block / kWarpSize] = sum;
  }
}

/// -(the sum of an image's warps + elements (log(2 pi) + 2 log |S|)) / 2, without S if the variance is
/// learned; 0 for a row without noise, NaN for one out of range. Grid: N.
template <typename T>
__global__ void __launch_bounds__(kStepThreads) sampler_step_log_prob(StepArguments<T> p) {
  FASTDIFF_SHARED(double, parts, kStepThreads);
  const int64_t image = blockIdx.x;
  const Place<T> at = p.place(image);
  if (at.idle) return;  // the whole block
  const bool noisy = at.row != nullptr && at.row[kS] != 0;
  const int64_t warps = warps_of(p.elements);
  double mine = 0;
  if (noisy)
    for (int64_t i = threadIdx.x; i < warps; i += kStepThreads)
      mine += static_cast<double>(p.sums[image * warps + i]);
  parts[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < kStepThreads; ++i) sum += parts[i];
  double each = 1.8378770664093453;  // log(2 pi)
  if (noisy && !p.learned) each += 2.0 * log(static_cast<double>(fabsf(at.row[kS])));
  const float density = static_cast<float>(-0.5 * (sum + static_cast<double>(p.elements) * each));
  p.log_prob[image] = at.row == nullptr ? __uint_as_float(0x7fc00000u) : noisy ? density : 0.0f;
}

}  // namespace fastdiff
