// The gradients of GroupNorm with addends, scale, shift and SiLU on a CPU, traversed as in
// group_norm_silu.cpp.
#include "group_norm_walk.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

// With n^ the normalized x, f = n^ factor + offset and df = dy activation'(f):
//   s1 = sum of df, s2 = sum of df n^ over space, per sample and channel
//   p1, p2 = sums of factor s1 and factor s2 over the channels of a group of M numbers
//   dx = (df factor - p1 / M - n^ p2 / M) / std

template <class T> struct Backward {
  const GroupNormBackward& a;
  const Affine affine;
  const int64_t size, numbers;
  const T* dy;
  const Halves<const T> x, dtotal;
  const Halves<T> dx;

  explicit Backward(const GroupNormBackward& arguments)
      : a(arguments), affine{a.weight, a.bias, a.scale_shift, a.c}, size(a.c / a.groups),
        numbers(a.c * a.space), dy(static_cast<const T*>(a.dy)),
        x{static_cast<const T*>(a.x), static_cast<const T*>(a.skip), a.c, a.split, a.space},
        dtotal{static_cast<const T*>(a.dtotal), nullptr, a.c, a.split, a.space},
        dx{static_cast<T*>(a.dx), static_cast<T*>(a.dskip), a.c, a.split, a.space} {}

  float derivative(float f) const {
    const float s = sigmoid(f);
    return s * (1.0f + f * (1.0f - s));
  }

  // Per channel: n^ = (x - m) r + t, f = n^ factor + offset, dx = df k1 + n^ k2 + k3.
  enum Column { M, R, T_, FACTOR, OFFSET, K1, K2, K3, COLUMNS };

  void channel(int64_t n, int64_t c, float* columns, int64_t stride) const {
    const float* stats = a.stats + (n * a.groups + c / size) * 3;
    columns[M * stride] = stats[0];
    columns[R * stride] = stats[2];
    columns[T_ * stride] = -stats[1] * stats[2];
    columns[FACTOR * stride] = affine.factor(n, c);
    columns[OFFSET * stride] = affine.offset(n, c);
  }

  // Computes k1, k2, k3 of a group. s1, s2: the sums of the sample's channels.
  void finish_group(int64_t n, int64_t g, const double* s1, const double* s2, float* columns,
                    int64_t stride) const {
    double p1 = 0, p2 = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      p1 += double(affine.factor(n, c)) * s1[c];
      p2 += double(affine.factor(n, c)) * s2[c];
    }
    const double r = a.stats[(n * a.groups + g) * 3 + 2], count = double(size * a.space);
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      columns[K1 * stride + c] = float(double(affine.factor(n, c)) * r);
      columns[K2 * stride + c] = float(-p2 / count * r);
      columns[K3 * stride + c] = float(-p1 / count * r);
    }
  }

  // The gradients of the parameters, from s1 and s2 (n, c), adding up samples in order.
  void parameters(const double* s1, const double* s2) const {
    for (int64_t n = 0; a.dscale_shift && n < a.n; ++n)
      for (int64_t c = 0; c < a.c; ++c) {
        const double weight = affine.weight_of(c), bias = affine.bias_of(c);
        a.dscale_shift[2 * a.c * n + c] = float(s2[n * a.c + c] * weight + s1[n * a.c + c] * bias);
        a.dscale_shift[2 * a.c * n + a.c + c] = float(s1[n * a.c + c]);
      }
    for (int64_t c = 0; (a.dweight || a.dbias) && c < a.c; ++c) {
      double dweight = 0, dbias = 0;
      for (int64_t n = 0; n < a.n; ++n) {
        dweight += s2[n * a.c + c] * double(affine.scale_of(n, c));
        dbias += s1[n * a.c + c] * double(affine.scale_of(n, c));
      }
      if (a.dweight) a.dweight[c] = float(dweight);
      if (a.dbias) a.dbias[c] = float(dbias);
    }
  }

  // NHWC

  void chunk_sums(const Rows& rows, int64_t n, int64_t chunk, const float* columns,
                  float* sums) const {
    Scratch<float> memory(2 * rows.width);
    float *sum1 = memory.data, *sum2 = sum1 + rows.width;
    clear(sum1, 2 * rows.width);
    alignas(64) float buffer[PIECE], dy_buffer[PIECE];
    Scratch<T> joined(x.right ? rows.per_chunk * rows.width : 0);
    const T* chunk_x = x.chunk(rows, n, chunk, 0, a.c, joined.data);
    const int64_t offset = chunk * rows.per_chunk * rows.width;
    rows.pieces(chunk, [&](int64_t at, int64_t column, int64_t count) {
      const float* RESTRICT in = widen(chunk_x + (at - offset), buffer, count);
      const float* RESTRICT gradient = widen(dy + n * numbers + at, dy_buffer, count);
      const float *RESTRICT m = columns + column, *RESTRICT r = m + R * rows.width,
                  *RESTRICT t = m + T_ * rows.width, *RESTRICT factor = m + FACTOR * rows.width,
                  *RESTRICT offset = m + OFFSET * rows.width;
      float *RESTRICT s1 = sum1 + column, *RESTRICT s2 = sum2 + column;
      if (a.silu) {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m[i]) * r[i] + t[i];
          const float df = gradient[i] * derivative(normal * factor[i] + offset[i]);
          s1[i] += df;
          s2[i] += df * normal;
        }
      } else {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m[i]) * r[i] + t[i];
          s1[i] += gradient[i];
          s2[i] += gradient[i] * normal;
        }
      }
    });
    rows.fold(sum1);
    rows.fold(sum2);
    for (int64_t c = 0; c < a.c; ++c) {
      sums[c] = sum1[c];
      sums[a.c + c] = sum2[c];
    }
  }

  // A chunk of dtotal, and zeros in the columns of the skip.
  const T* with_zeros(const Rows& rows, int64_t n, int64_t chunk, T* to) const {
    __builtin_memset(to, 0, size_t(rows.chunk_numbers(chunk)) * sizeof(T));
    return dtotal.columns(rows, n, chunk, 0, a.split, to);
  }

  // channel_sums: (c), sums of this chunk's dx, or null.
  void chunk_dx(const Rows& rows, int64_t n, int64_t chunk, const float* columns,
                float* channel_sums) const {
    Scratch<float> memory(rows.width);
    if (channel_sums) clear(memory.data, rows.width);
    alignas(64) float buffer[PIECE], dy_buffer[PIECE], more_buffer[PIECE], out_buffer[PIECE];
    const bool joins = x.right != nullptr;
    const int64_t room = joins ? rows.per_chunk * rows.width : 0;
    const int64_t offset = chunk * rows.per_chunk * rows.width;
    Scratch<T> joined_x(room), joined_dx(room), joined_dtotal(dtotal.left ? room : 0);
    const T* chunk_x = x.chunk(rows, n, chunk, 0, a.c, joined_x.data);
    const T* chunk_dtotal = nullptr;
    if (dtotal.left)
      chunk_dtotal = joins ? with_zeros(rows, n, chunk, joined_dtotal.data)
                           : dtotal.left + n * numbers + offset;
    T* const chunk_dx = joins ? joined_dx.data : dx.left + n * numbers + offset;
    rows.pieces(chunk, [&](int64_t at, int64_t column, int64_t count) {
      const float* RESTRICT gradient = widen(dy + n * numbers + at, dy_buffer, count);
      at -= offset;
      const float* RESTRICT in = widen(chunk_x + at, buffer, count);
      const float *RESTRICT m = columns + column, *RESTRICT r = m + R * rows.width,
                  *RESTRICT t = m + T_ * rows.width, *RESTRICT factor = m + FACTOR * rows.width,
                  *RESTRICT offset = m + OFFSET * rows.width, *RESTRICT k1 = m + K1 * rows.width,
                  *RESTRICT k2 = m + K2 * rows.width, *RESTRICT k3 = m + K3 * rows.width;
      float* RESTRICT out = target(chunk_dx + at, out_buffer);
      if (a.silu) {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m[i]) * r[i] + t[i];
          const float df = gradient[i] * derivative(normal * factor[i] + offset[i]);
          out[i] = df * k1[i] + (normal * k2[i] + k3[i]);
        }
      } else {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m[i]) * r[i] + t[i];
          out[i] = gradient[i] * k1[i] + (normal * k2[i] + k3[i]);
        }
      }
      if (dtotal.left) {
        const float* RESTRICT more = widen(chunk_dtotal + at, more_buffer, count);
        SIMD for (int64_t i = 0; i < count; ++i) out[i] += more[i];
      }
      if (channel_sums) {
        float* RESTRICT s = memory.data + column;
        SIMD for (int64_t i = 0; i < count; ++i) s[i] += out[i];
      }
      narrow(out, chunk_dx + at, count);
    });
    if (joins) dx.split_chunk(rows, n, chunk, chunk_dx);
    if (channel_sums) {
      rows.fold(memory.data);
      for (int64_t c = 0; c < a.c; ++c) channel_sums[c] = memory.data[c];
    }
  }

  void channels_last() const {
    const Rows rows(a.c, a.space);
    const int64_t units = a.n * rows.chunks, width = rows.width;
    const int64_t grain = larger(1, NUMBERS_PER_THREAD / smaller(CHUNK, numbers));
    Scratch<float> columns(a.n * COLUMNS * width), sums(units * 2 * a.c);
    Scratch<double> s1(a.n * a.c), s2(a.n * a.c);
    for (int64_t n = 0; n < a.n; ++n) {
      float* mine = columns.data + n * COLUMNS * width;
      for (int64_t c = 0; c < a.c; ++c) channel(n, c, mine + c, width);
      for (int i = M; i <= OFFSET; ++i) rows.spread(mine + i * width);
    }
    parallel(units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        chunk_sums(rows, i / rows.chunks, i % rows.chunks,
                   columns.data + i / rows.chunks * COLUMNS * width, sums.data + i * 2 * a.c);
    });
    for (int64_t n = 0; n < a.n; ++n) {
      double *to1 = s1.data + n * a.c, *to2 = s2.data + n * a.c;
      for (int64_t c = 0; c < a.c; ++c) to1[c] = to2[c] = 0;
      for (int64_t i = n * rows.chunks; i < (n + 1) * rows.chunks; ++i)
        for (int64_t c = 0; c < a.c; ++c) {
          to1[c] += double(sums.data[i * 2 * a.c + c]);
          to2[c] += double(sums.data[i * 2 * a.c + a.c + c]);
        }
      float* mine = columns.data + n * COLUMNS * width;
      for (int64_t g = 0; g < a.groups; ++g) finish_group(n, g, to1, to2, mine, width);
      for (int i = K1; i <= K3; ++i) rows.spread(mine + i * width);
    }
    parameters(s1.data, s2.data);
    parallel(units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;)
        chunk_dx(rows, i / rows.chunks, i % rows.chunks,
                 columns.data + i / rows.chunks * COLUMNS * width,
                 a.dchannel ? sums.data + i * a.c : nullptr);
    });
    for (int64_t n = 0; a.dchannel && n < a.n; ++n)
      for (int64_t c = 0; c < a.c; ++c) {
        double s = 0;
        for (int64_t i = n * rows.chunks; i < (n + 1) * rows.chunks; ++i)
          s += double(sums.data[i * a.c + c]);
        a.dchannel[n * a.c + c] = float(s);
      }
  }

  // NCHW

  void channel_sums(int64_t n, int64_t c, const float* v, double* s1, double* s2) const {
    alignas(64) float buffer[PIECE], dy_buffer[PIECE];
    double sum1 = 0, sum2 = 0;
    for (int64_t j = 0; j < a.space; j += PIECE) {
      const int64_t count = smaller(PIECE, a.space - j);
      const float* RESTRICT in = widen(x.channel(n, c) + j, buffer, count);
      const float* RESTRICT gradient =
          widen(dy + n * numbers + c * a.space + j, dy_buffer, count);
      const float m = v[M], r = v[R], t = v[T_], factor = v[FACTOR], offset = v[OFFSET];
      float part1 = 0, part2 = 0;
      if (a.silu) {
#pragma omp simd reduction(+ : part1, part2)
        for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m) * r + t;
          const float df = gradient[i] * derivative(normal * factor + offset);
          part1 += df;
          part2 += df * normal;
        }
      } else {
#pragma omp simd reduction(+ : part1, part2)
        for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m) * r + t;
          part1 += gradient[i];
          part2 += gradient[i] * normal;
        }
      }
      sum1 += part1;
      sum2 += part2;
    }
    s1[c] = sum1;
    s2[c] = sum2;
  }

  void channel_dx(int64_t n, int64_t c, const float* v, float k1, float k2, float k3) const {
    alignas(64) float buffer[PIECE], dy_buffer[PIECE], more_buffer[PIECE], out_buffer[PIECE];
    double total = 0;
    for (int64_t j = 0; j < a.space; j += PIECE) {
      const int64_t count = smaller(PIECE, a.space - j);
      const float* RESTRICT in = widen(x.channel(n, c) + j, buffer, count);
      const float* RESTRICT gradient =
          widen(dy + n * numbers + c * a.space + j, dy_buffer, count);
      T* const to = dx.channel(n, c) + j;
      float* RESTRICT out = target(to, out_buffer);
      const float m = v[M], r = v[R], t = v[T_], factor = v[FACTOR], offset = v[OFFSET];
      if (a.silu) {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m) * r + t;
          const float df = gradient[i] * derivative(normal * factor + offset);
          out[i] = df * k1 + (normal * k2 + k3);
        }
      } else {
        SIMD for (int64_t i = 0; i < count; ++i) {
          const float normal = (in[i] - m) * r + t;
          out[i] = gradient[i] * k1 + (normal * k2 + k3);
        }
      }
      if (dtotal.left && c < a.split) {
        const float* RESTRICT more = widen(dtotal.channel(n, c) + j, more_buffer, count);
        SIMD for (int64_t i = 0; i < count; ++i) out[i] += more[i];
      }
      if (a.dchannel) {
        total += sum(out, count);
      }
      narrow(out, to, count);
    }
    if (a.dchannel) a.dchannel[n * a.c + c] = float(total);
  }

  void channels_first() const {
    Scratch<double> s1(a.n * a.c), s2(a.n * a.c);
    const int64_t grain = larger(1, NUMBERS_PER_THREAD / (size * a.space));
    parallel(a.n * a.groups, grain, [&](int64_t begin, int64_t end) {
      Scratch<float> columns(COLUMNS * a.c);  // only K1, K2, K3 of the group's channels are used
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / a.groups, g = i % a.groups;
        float v[COLUMNS];
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          channel(n, c, v, 1);
          channel_sums(n, c, v, s1.data + n * a.c, s2.data + n * a.c);
        }
        finish_group(n, g, s1.data + n * a.c, s2.data + n * a.c, columns.data, a.c);
        for (int64_t c = (g + 1) * size; c-- > g * size;) {
          channel(n, c, v, 1);
          channel_dx(n, c, v, columns.data[K1 * a.c + c], columns.data[K2 * a.c + c],
                     columns.data[K3 * a.c + c]);
        }
      }
    });
    parameters(s1.data, s2.data);
  }
};

}  // namespace

template <> void run(const GroupNormBackward& a) {
  with_type(a.dtype, [&](auto type) {
    const Backward<decltype(type)> backward(a);
    if (a.channels_last)
      backward.channels_last();
    else
      backward.channels_first();
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
