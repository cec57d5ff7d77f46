// GroupNorm on a CPU, with addends before it, and scale, shift and SiLU after it.
//
// NHWC: the sample's rows of C elements are processed k at a time, so that loops are long even with few
// channels, and split into chunks that stay in the L2 cache. A chunk's moments are computed in one pass
// around a pivot per channel, the mean of a few of its rows: it is so close to the mean that the squares
// lose no precision. The moments of channels and chunks are merged in fp64 with Chan's formula, in
// order. NCHW: a group is contiguous, and is one unit of work from its moments to its results.
//
// Two inputs are joined a chunk or a group at a time (Halves).
//
// A mean is stored as two fp32 numbers (high + low): x - high is exact when the mean is large, and the
// low part is folded into the shift.
#include "group_norm_walk.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

template <class T> struct Forward {
  const GroupNorm& a;
  const Affine affine;
  const int64_t size, numbers;  // channels per group, elements per sample
  const bool adds;
  const T* x;
  T *total, *y;
  const Halves<const T> normed;  // the tensor to normalize: x, or the total, and the skip

  explicit Forward(const GroupNorm& arguments)
      : a(arguments), affine{a.weight, a.bias, a.scale_shift, a.c}, size(a.c / a.groups),
        numbers(a.c * a.space), adds(a.total != nullptr), x(static_cast<const T*>(a.x)),
        total(static_cast<T*>(a.total)), y(static_cast<T*>(a.y)),
        normed{adds ? total : x, static_cast<const T*>(a.skip), a.c, a.split, a.space} {}

  const float* widen_residual(int64_t at, float* buffer, int64_t n) const {
    if (a.wide_residual) return static_cast<const float*>(a.residual) + at;
    return widen(static_cast<const T*>(a.residual) + at, buffer, n);
  }

  const float* channel_add(int64_t n) const { return a.channel_add + a.channel_add_stride * n; }

  // y = activation((x - m) * factor + shift), all three per column
  void apply(const T* x, T* y, const float* RESTRICT m, const float* RESTRICT factor,
             const float* RESTRICT shift, int64_t n) const {
    alignas(64) float buffer[PIECE], out_buffer[PIECE];
    const float* RESTRICT in = widen(x, buffer, n);
    float* RESTRICT out = target(y, out_buffer);
    if (a.silu) {
      SIMD for (int64_t i = 0; i < n; ++i) {
        const float f = (in[i] - m[i]) * factor[i] + shift[i];
        out[i] = f * sigmoid(f);
      }
    } else {
      SIMD for (int64_t i = 0; i < n; ++i) out[i] = (in[i] - m[i]) * factor[i] + shift[i];
    }
    narrow(out, y, n);
  }

  void apply(const T* x, T* y, float m, float factor, float shift, int64_t n) const {
    alignas(64) float buffer[PIECE], out_buffer[PIECE];
    const float* RESTRICT in = widen(x, buffer, n);
    float* RESTRICT out = target(y, out_buffer);
    if (a.silu) {
      SIMD for (int64_t i = 0; i < n; ++i) {
        const float f = (in[i] - m) * factor + shift;
        out[i] = f * sigmoid(f);
      }
    } else {
      SIMD for (int64_t i = 0; i < n; ++i) out[i] = (in[i] - m) * factor + shift;
    }
    narrow(out, y, n);
  }

  // NHWC

  // Groups that are processed together: all, or a range of the columns of whole rows.
  struct Part {
    int64_t first_group, last_group, first, last;  // columns
  };

  Part part_of(const Rows& rows, int64_t first_group, int64_t last_group) const {
    if (rows.k > 1) return {0, a.groups, 0, rows.width};
    return {first_group, last_group, first_group * size, last_group * size};
  }

  Part whole(const Rows& rows) const { return part_of(rows, 0, a.groups); }

  // total = x + add + residual, from an element on
  void add_piece(int64_t at, const float* RESTRICT add, int64_t count) const {
    alignas(64) float buffer[PIECE], residual_buffer[PIECE], out_buffer[PIECE];
    const float* RESTRICT in = widen(x + at, buffer, count);
    float* RESTRICT out = target(total + at, out_buffer);
    if (a.residual && a.channel_add) {
      const float* RESTRICT more = widen_residual(at, residual_buffer, count);
      SIMD for (int64_t i = 0; i < count; ++i) out[i] = in[i] + add[i] + more[i];
    } else if (a.residual) {
      const float* RESTRICT more = widen_residual(at, residual_buffer, count);
      SIMD for (int64_t i = 0; i < count; ++i) out[i] = in[i] + more[i];
    } else {
      SIMD for (int64_t i = 0; i < count; ++i) out[i] = in[i] + add[i];
    }
    narrow(out, total + at, count);
  }

  // The same for the places of a chunk where x has fewer channels than the rows.
  void add_left(const Rows& rows, int64_t n, int64_t chunk, const Part& part) const {
    const int64_t place = n * a.space + chunk * rows.per_chunk * rows.k;
    const int64_t first = rows.k > 1 ? 0 : part.first, last = rows.k > 1 ? a.c : part.last;
    for (int64_t p = 0; p < rows.chunk_numbers(chunk) / a.c; ++p)
      for (int64_t j = first; j < smaller(last, a.split); j += PIECE)
        add_piece((place + p) * a.split + j, a.channel_add ? channel_add(n) + j : nullptr,
                  smaller(PIECE, smaller(last, a.split) - j));
  }

  void add_chunk(const Rows& rows, int64_t n, int64_t chunk, const Part& part,
                 float* columns) const {
    if (normed.right) return add_left(rows, n, chunk, part);
    if (a.channel_add) {
      const float* values = channel_add(n);
      for (int64_t i = 0; i < a.c; ++i) columns[i] = values[i];
      rows.spread(columns);
    }
    rows.pieces(chunk, part.first, part.last, [&](int64_t at, int64_t column, int64_t count) {
      add_piece(n * numbers + at, columns + column, count);
    });
  }

  // s += the sum of x - pivot, q += the sum of its square, over some rows of one piece of the columns.
  static void add_rows(const T* x, int64_t stride, int64_t count_of_rows, int64_t n,
                       const float* RESTRICT pivot, float* RESTRICT s, float* RESTRICT q) {
    alignas(64) float buffers[4][PIECE];
    int64_t r = 0;
    for (; r + 4 <= count_of_rows; r += 4) {  // four at a time: updating s and q is the costly part
      const T* from = x + r * stride;
      const float* RESTRICT x0 = widen(from, buffers[0], n);
      const float* RESTRICT x1 = widen(from + stride, buffers[1], n);
      const float* RESTRICT x2 = widen(from + 2 * stride, buffers[2], n);
      const float* RESTRICT x3 = widen(from + 3 * stride, buffers[3], n);
      SIMD for (int64_t i = 0; i < n; ++i) {
        const float d0 = x0[i] - pivot[i], d1 = x1[i] - pivot[i], d2 = x2[i] - pivot[i],
                    d3 = x3[i] - pivot[i];
        s[i] += (d0 + d1) + (d2 + d3);
        q[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
    }
    for (; r < count_of_rows; ++r) {
      const float* RESTRICT in = widen(x + r * stride, buffers[0], n);
      SIMD for (int64_t i = 0; i < n; ++i) {
        const float d = in[i] - pivot[i];
        s[i] += d;
        q[i] += d * d;
      }
    }
  }

  // Approximates the mean of each channel by the mean of some rows of a chunk of `count` elements.
  static void pivots(const Rows& rows, const T* chunk, int64_t count, const Part& part,
                     float* pivot) {
    alignas(64) float buffer[PIECE];
    const int64_t full = count / rows.width, taken = larger(1, smaller(full, PIVOT_ROWS));
    const int64_t width = full ? rows.width : count;
    clear(pivot + part.first, part.last - part.first);
    for (int64_t r = 0; r < taken; ++r) {
      const T* row = chunk + r * (full / taken) * rows.width;
      for (int64_t j = part.first; j < smaller(part.last, width); j += PIECE) {
        const int64_t n = smaller(PIECE, smaller(part.last, width) - j);
        const float* RESTRICT in = widen(row + j, buffer, n);
        float* RESTRICT to = pivot + j;
        SIMD for (int64_t i = 0; i < n; ++i) to[i] += in[i];
      }
    }
    rows.fold(pivot);
    const float share = float(rows.c) / float(taken * width);
    for (int64_t i = part.first; i < smaller(part.last, rows.c); ++i) pivot[i] *= share;
    rows.spread(pivot);
  }

  // Numbers of the memory in which the halves of a chunk are joined.
  int64_t joined_numbers(const Rows& rows) const {
    return normed.right ? rows.per_chunk * rows.width : 0;
  }

  // Moments of the part's groups over a chunk; `memory` has room for three rows.
  void chunk_moments(const Rows& rows, int64_t n, int64_t chunk, const Part& part, float* memory,
                     T* joined, Moments* moments) const {
    float *s = memory, *q = s + rows.width, *pivot = q + rows.width;
    if (adds) add_chunk(rows, n, chunk, part, s);
    clear(s + part.first, part.last - part.first);
    clear(q + part.first, part.last - part.first);
    const T* begin = normed.chunk(rows, n, chunk, part.first, part.last, joined);
    const int64_t count = rows.chunk_numbers(chunk), full = count / rows.width;
    pivots(rows, begin, count, part, pivot);
    for (int64_t j = part.first; j < part.last; j += PIECE) {
      const int64_t width = smaller(PIECE, part.last - j);
      add_rows(begin + j, rows.width, full, width, pivot + j, s + j, q + j);
      const int64_t rest = smaller(width, count - full * rows.width - j);
      if (rest > 0) add_rows(begin + full * rows.width + j, 0, 1, rest, pivot + j, s + j, q + j);
    }
    rows.fold(s);
    rows.fold(q);
    const double of_channel = double(count / a.c), share = 1 / of_channel, part_of_group = 1 / double(size);
    for (int64_t g = part.first_group; g < part.last_group; ++g)
      moments[g] = merge_channels(s + g * size, q + g * size, pivot + g * size, of_channel, share,
                                  part_of_group);
  }

  // Merges the channels of a group, given the sums around their pivots. The channels' means are taken
  // relative to the first pivot: in fp64 their squares lose no precision that the fp32 sums had.
  Moments merge_channels(const float* RESTRICT s, const float* RESTRICT q,
                         const float* RESTRICT pivot, double count, double share,
                         double part_of_group) const {
    double total = 0, squares = 0, within = 0;
    const double first = double(pivot[0]);
    int64_t i = 0;
    if (size >= WIDE_LANES) {
      Wide totals{}, squares_of{}, withins{};
      for (; i + WIDE_LANES <= size; i += WIDE_LANES) {
        const Wide sums = load_wide(s + i), off = sums * share;
        const Wide d = (load_wide(pivot + i) - first) + off;
        totals += d;
        squares_of += d * d;
        withins += load_wide(q + i) - sums * off;
      }
      total = sum_of_lanes(totals);
      squares = sum_of_lanes(squares_of);
      within = sum_of_lanes(withins);
    }
    for (; i < size; ++i) {
      const double off = double(s[i]) * share, d = (double(pivot[i]) - first) + off;
      total += d;
      squares += d * d;
      within += double(q[i]) - double(s[i]) * off;
    }
    const double mean = total * part_of_group, between = squares - total * mean;
    // rounding may leave a negative sum; NaN passes through
    return {first + mean, (within < 0 ? 0 : within) + (between < 0 ? 0 : between) * count};
  }

  // From the chunks' moments to the columns' (mean, factor, shift).
  void columns_of(const Rows& rows, int64_t n, const Part& part, const Moments* moments,
                  float* columns) const {
    const double count = double(a.space * size);
    const double full = double(rows.chunk_numbers(0) / a.groups),
                 last = double(rows.chunk_numbers(rows.chunks - 1) / a.groups);
    float *m = columns, *factor = m + rows.width, *shift = factor + rows.width;
    affine.write(n, part.first_group * size, part.last_group * size, factor, shift);
    for (int64_t g = part.first_group; g < part.last_group; ++g) {
      const Moments merged = merge(moments + g, rows.chunks, a.groups, full, last);
      float stats[3];
      write_stats(stats, merged, count, a.eps);
      if (a.stats)
        for (int i = 0; i < 3; ++i) a.stats[(n * a.groups + g) * 3 + i] = stats[i];
      const float high = stats[0], low = stats[1], r = stats[2];
      float *RESTRICT mean = m + g * size, *RESTRICT times = factor + g * size,
                      *RESTRICT plus = shift + g * size;
      SIMD for (int64_t i = 0; i < size; ++i) {
        mean[i] = high;
        times[i] *= r;
        plus[i] -= low * times[i];
      }
    }
    rows.spread(m);
    rows.spread(factor);
    rows.spread(shift);
  }

  void apply_chunk(const Rows& rows, int64_t n, int64_t chunk, const Part& part,
                   const float* columns, T* joined) const {
    const float *m = columns, *factor = m + rows.width, *shift = factor + rows.width;
    const T* begin = normed.chunk(rows, n, chunk, part.first, part.last, joined);
    const int64_t offset = chunk * rows.per_chunk * rows.width;
    rows.pieces(chunk, part.first, part.last, [&](int64_t at, int64_t column, int64_t count) {
      apply(begin + (at - offset), y + n * numbers + at, m + column, factor + column,
            shift + column, count);
    });
  }

  // One thread per sample, or per part of its groups, from start to end.
  void small_samples(const Rows& rows, int64_t parts) const {
    const int64_t groups = ceil_div(a.groups, parts);
    parts = ceil_div(a.groups, groups);
    parallel(a.n * parts, larger(1, NUMBERS_PER_THREAD * parts / numbers),
             [&](int64_t begin, int64_t end) {
               Scratch<Moments> moments(rows.chunks * a.groups);
               Scratch<float> columns(3 * rows.width);  // until then, scratch for the moments
               Scratch<T> joined(joined_numbers(rows));
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t n = i / parts, g = i % parts * groups;
                 const Part part = part_of(rows, g, smaller(g + groups, a.groups));
                 for (int64_t j = 0; j < rows.chunks; ++j)
                   chunk_moments(rows, n, j, part, columns.data, joined.data,
                                 moments.data + j * a.groups);
                 columns_of(rows, n, part, moments.data, columns.data);
                 for (int64_t j = rows.chunks; j-- > 0;)
                   apply_chunk(rows, n, j, part, columns.data, joined.data);
               }
             });
  }

  // How threads share the work does not change any bit: a chunk's moments are always computed the same
  // way.
  void channels_last() const {
    const Rows rows(a.c, a.space);
    if (numbers <= SMALL_SAMPLE) {
      const int64_t most = a.n >= MANY_SAMPLES ? 1 : numbers / NUMBERS_PER_THREAD;
      const int64_t parts = smaller(smaller(most, MANY_SAMPLES), smaller(a.groups, a.c / ROW * 4));
      if (rows.k == 1 || most <= 1) return small_samples(rows, larger(1, rows.k == 1 ? parts : 1));
    }
    const Part part = whole(rows);
    Scratch<Moments> moments(a.n * rows.chunks * a.groups);
    Scratch<float> columns(a.n * 3 * rows.width);
    parallel(a.n * rows.chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch<float> memory(3 * rows.width);
      Scratch<T> joined(joined_numbers(rows));
      for (int64_t i = begin; i < end; ++i)
        chunk_moments(rows, i / rows.chunks, i % rows.chunks, part, memory.data, joined.data,
                      moments.data + i * a.groups);
    });
    for (int64_t n = 0; n < a.n; ++n)
      columns_of(rows, n, part, moments.data + n * rows.chunks * a.groups,
                 columns.data + n * 3 * rows.width);
    parallel(a.n * rows.chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> joined(joined_numbers(rows));
      for (int64_t i = end; i-- > begin;)  // backwards: the last chunks read are still in the cache
        apply_chunk(rows, i / rows.chunks, i % rows.chunks, part,
                    columns.data + i / rows.chunks * 3 * rows.width, joined.data);
    });
  }

  // NCHW

  void add_channel(int64_t n, int64_t c) const {
    alignas(64) float buffer[PIECE], residual_buffer[PIECE], out_buffer[PIECE];
    const float add = a.channel_add ? channel_add(n)[c] : 0.0f;
    for (int64_t j = 0; j < a.space; j += PIECE) {
      const int64_t at = (n * a.split + c) * a.space + j, count = smaller(PIECE, a.space - j);
      const float* RESTRICT in = widen(x + at, buffer, count);
      float* RESTRICT out = target(total + at, out_buffer);
      if (a.residual) {
        const float* RESTRICT more = widen_residual(at, residual_buffer, count);
        SIMD for (int64_t i = 0; i < count; ++i) out[i] = in[i] + add + more[i];
      } else {
        SIMD for (int64_t i = 0; i < count; ++i) out[i] = in[i] + add;
      }
      narrow(out, total + at, count);
    }
  }

  Moments run_moments(const T* run, int64_t length) const {
    alignas(64) float buffer[PIECE];
    double s = 0, off = 0, q = 0;
    for (int64_t j = 0; j < length; j += PIECE) {
      const int64_t count = smaller(PIECE, length - j);
      const float* RESTRICT in = widen(run + j, buffer, count);
      s += sum(in, count);
    }
    const float center = float(s / double(length));
    for (int64_t j = 0; j < length; j += PIECE) {
      const int64_t count = smaller(PIECE, length - j);
      const float* RESTRICT in = widen(run + j, buffer, count);
      float part, squares;
      sums_around(in, count, center, &part, &squares);
      off += part;
      q += squares;
    }
    const double mean_off = off / double(length);
    return {double(center) + mean_off, q - off * mean_off};
  }

  // joined: memory for a group whose channels are in both halves.
  void group(int64_t n, int64_t g, T* joined) const {
    const int64_t length = size * a.space, chunks = ceil_div(length, CHUNK);
    if (adds)
      for (int64_t c = g * size; c < smaller(a.split, (g + 1) * size); ++c) add_channel(n, c);
    const T* run = normed.channels(n, g * size, (g + 1) * size, joined);
    Moments merged;
    if (chunks == 1) {
      merged = run_moments(run, length);
    } else {
      Scratch<Moments> parts(chunks);
      const int64_t last = length - (chunks - 1) * CHUNK;
      for (int64_t i = 0; i < chunks; ++i)
        parts.data[i] = run_moments(run + i * CHUNK, i + 1 < chunks ? CHUNK : last);
      merged = merge(parts.data, chunks, 1, double(CHUNK), double(last));
    }
    float stats[3];
    write_stats(stats, merged, double(length), a.eps);
    if (a.stats)
      for (int i = 0; i < 3; ++i) a.stats[(n * a.groups + g) * 3 + i] = stats[i];
    for (int64_t c = (g + 1) * size; c-- > g * size;) {
      const float factor = stats[2] * affine.factor(n, c);
      const float shift = affine.offset(n, c) - stats[1] * factor;
      for (int64_t j = 0; j < a.space; j += PIECE) {
        const int64_t at = (c - g * size) * a.space + j;
        apply(run + at, y + n * numbers + g * length + at, stats[0], factor, shift,
              smaller(PIECE, a.space - j));
      }
    }
  }

  void channels_first() const {
    const int64_t grain = larger(1, NUMBERS_PER_THREAD / (size * a.space));
    parallel(a.n * a.groups, grain, [&](int64_t begin, int64_t end) {
      Scratch<T> joined(a.split % size ? size * a.space : 0);
      for (int64_t i = begin; i < end; ++i) group(i / a.groups, i % a.groups, joined.data);
    });
  }
};

}  // namespace

template <> void run(const GroupNorm& a) {
  with_type(a.dtype, [&](auto type) {
    const Forward<decltype(type)> forward(a);
    if (a.channels_last)
      forward.channels_last();
    else
      forward.channels_first();
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
