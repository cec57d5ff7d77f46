// How the CPU kernels of GroupNorm traverse a sample, forward and backward: pieces, moments, and the
// affine step after the norm.
#pragma once

#include "cpu.h"
#include "group_norm_silu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t CHUNK = 32768;             // elements; 128 KB as fp32
constexpr int64_t ROW = 256;                 // short rows are joined up to this many elements
constexpr int64_t PIVOT_ROWS = 8;            // rows of a chunk, evenly spaced
constexpr int64_t NUMBERS_PER_THREAD = 8192;  // fewer do not justify waking a thread
constexpr int64_t SMALL_SAMPLE = 262144;     // elements; up to this, one parallel loop does it all
constexpr int64_t MANY_SAMPLES = 8;          // enough to give each sample to one thread

// A register full of fp64 numbers, and sums of them.
constexpr int64_t WIDE_LANES = LANES / 2;
typedef double Wide __attribute__((vector_size(4 * LANES)));

inline Wide load_wide(const float* x) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  Half v;
  __builtin_memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, Wide);
}

inline double sum_of_lanes(Wide v) {
  double sum = 0;
  for (int i = 0; i < WIDE_LANES; ++i) sum += v[i];
  return sum;
}

struct Moments {
  double mean, m2;  // m2: sum of squared distances from the mean
};

// How a sample in NHWC is traversed.
struct Rows {
  int64_t c, numbers, k, width, per_chunk, count, chunks;

  Rows(int64_t channels, int64_t space)
      : c(channels), numbers(channels * space), k(larger(1, smaller(ROW / channels, space))),
        width(k * channels), per_chunk(larger(1, CHUNK / width)), count(ceil_div(space, k)),
        chunks(ceil_div(count, per_chunk)) {}

  int64_t chunk_numbers(int64_t chunk) const {
    return smaller(per_chunk * width, numbers - chunk * per_chunk * width);
  }

  // Calls f(offset in the sample, column, n) for the pieces of a chunk within the columns from `first`
  // to `last`, with n <= PIECE columns each.
  template <class F>
  void pieces(int64_t chunk, int64_t first, int64_t last, const F& f) const {
    const int64_t begin = chunk * per_chunk * width, end = begin + chunk_numbers(chunk);
    for (int64_t row = begin; row < end; row += width) {
      const int64_t stop = smaller(last, end - row);
      for (int64_t j = first; j < stop; j += PIECE) f(row + j, j, smaller(PIECE, stop - j));
    }
  }
  template <class F> void pieces(int64_t chunk, const F& f) const { pieces(chunk, 0, width, f); }

  // Adds up the columns of k joined rows to the c channels.
  void fold(float* v) const {
    for (int64_t j = 1; j < k; ++j) {
      const float* RESTRICT from = v + j * c;
      SIMD for (int64_t i = 0; i < c; ++i) v[i] += from[i];
    }
  }

  // Repeats the c channels for each of the k joined rows.
  void spread(float* v) const {
    for (int64_t j = c; j < width; ++j) v[j] = v[j - c];
  }
};

void clear(float* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = 0;
}

// A tensor of c channels in two: the first `split` of every place in `left`, the others in `right`. The
// kernels join them a chunk (NHWC) or a group (NCHW) at a time, in memory that stays in the cache, so that
// their loops know nothing of it. Without `right`, split is c and everything lies in `left`.
template <class T> struct Halves {
  T *left, *right;
  int64_t c, split, space;

  int64_t right_width() const { return c - split; }

  // Calls f(from or to a half, place in the joined row, count) for the columns [first, last) of a place.
  template <class F>
  void of_place(int64_t place, int64_t first, int64_t last, const F& f) const {
    const int64_t border = smaller(larger(split, first), last);
    if (border > first) f(left + place * split + first, first, border - first);
    if (last > border) f(right + place * right_width() + border - split, border, last - border);
  }

  // NHWC: a chunk, of which the columns [first, last) are needed, in place or in `joined`.
  template <class U>
  const T* chunk(const Rows& rows, int64_t n, int64_t i, int64_t first, int64_t last, U* joined) const {
    if (!right) return left + n * c * space + i * rows.per_chunk * rows.width;
    return rows.k > 1 ? columns(rows, n, i, 0, c, joined) : columns(rows, n, i, first, last, joined);
  }

  // Copies columns [first, last) of all places of a chunk to `joined`, which has room for the chunk.
  template <class U>
  const T* columns(const Rows& rows, int64_t n, int64_t i, int64_t first, int64_t last,
                   U* joined) const {
    const int64_t place = n * space + i * rows.per_chunk * rows.k;
    for (int64_t p = 0; p < rows.chunk_numbers(i) / c; ++p)
      of_place(place + p, first, last, [&](const T* from, int64_t column, int64_t count) {
        __builtin_memcpy(joined + p * c + column, from, size_t(count) * sizeof(T));
      });
    return joined;
  }

  // The other way: the chunk's columns to the halves.
  void split_chunk(const Rows& rows, int64_t n, int64_t i, const T* joined) const {
    const int64_t place = n * space + i * rows.per_chunk * rows.k;
    for (int64_t p = 0; p < rows.chunk_numbers(i) / c; ++p)
      of_place(place + p, 0, c, [&](T* to, int64_t column, int64_t count) {
        __builtin_memcpy(to, joined + p * c + column, size_t(count) * sizeof(T));
      });
  }

  // NCHW: the places of a channel.
  T* channel(int64_t n, int64_t i) const {
    if (i < split) return left + (n * split + i) * space;
    return right + (n * right_width() + i - split) * space;
  }

  // NCHW: the channels [first, last) of a sample, dense; `joined` has room for them.
  template <class U>
  const T* channels(int64_t n, int64_t first, int64_t last, U* joined) const {
    if (last <= split || first >= split) return channel(n, first);
    const int64_t numbers = (split - first) * space;
    __builtin_memcpy(joined, channel(n, first), size_t(numbers) * sizeof(T));
    __builtin_memcpy(joined + numbers, channel(n, split), size_t((last - split) * space) * sizeof(T));
    return joined;
  }
};

// Merges the chunks' moments (Chan et al. 1982): `full` elements each, `last` in the last one.
inline Moments merge(const Moments* parts, int64_t count, int64_t stride, double full, double last) {
  if (count == 1) return *parts;
  const double share = 1 / (full * double(count - 1) + last);
  double mean = 0, m2 = 0;
  for (int64_t i = 0; i < count; ++i)
    mean += parts[i * stride].mean * ((i + 1 < count ? full : last) * share);
  for (int64_t i = 0; i < count; ++i) {
    const double d = parts[i * stride].mean - mean;
    m2 += parts[i * stride].m2 + d * d * (i + 1 < count ? full : last);
  }
  return {mean, m2};
}

// (mean high, mean low, 1 / standard deviation)
inline void write_stats(float* stats, const Moments& m, double numbers, double eps) {
  stats[0] = float(m.mean);
  stats[1] = float(m.mean - double(stats[0]));
  stats[2] = float(1.0 / __builtin_sqrt(m.m2 / numbers + eps));
}

// The affine step after the norm, for channel c of sample n: n^ * factor + offset.
struct Affine {
  const float *weight, *bias, *scale_shift;
  int64_t channels;

  float weight_of(int64_t c) const { return weight ? weight[c] : 1.0f; }
  float bias_of(int64_t c) const { return bias ? bias[c] : 0.0f; }
  float scale_of(int64_t n, int64_t c) const {
    return scale_shift ? 1.0f + scale_shift[2 * channels * n + c] : 1.0f;
  }
  float shift_of(int64_t n, int64_t c) const {
    return scale_shift ? scale_shift[2 * channels * n + channels + c] : 0.0f;
  }
  float factor(int64_t n, int64_t c) const { return weight_of(c) * scale_of(n, c); }
  float offset(int64_t n, int64_t c) const {
    return bias_of(c) * scale_of(n, c) + shift_of(n, c);
  }

  // factor and offset of the channels from `first` to `last`
  void write(int64_t n, int64_t first, int64_t last, float* RESTRICT factors,
             float* RESTRICT offsets) const {
    if (weight && bias && !scale_shift) {
      const float *RESTRICT w = weight, *RESTRICT b = bias;
      SIMD for (int64_t c = first; c < last; ++c) {
        factors[c] = w[c];
        offsets[c] = b[c];
      }
      return;
    }
    for (int64_t c = first; c < last; ++c) {
      factors[c] = factor(n, c);
      offsets[c] = offset(n, c);
    }
  }
};

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
