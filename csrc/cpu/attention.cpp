// Attention on a CPU. For a tile of queries and a block of keys, one product gives the scores, then
// comes the softmax of their rows, then a second product with V. Over several blocks the softmax is
// online (Milakov and Gimelshein 2018). K^T and V of a block are packed once for all tiles of a piece
// of work.
//
// The sums of a row run over the keys of a block in order, then over the blocks. Blocks depend only on
// the number of keys, and no row depends on another, so tiling and threads do not change any bit.
#include "attention.h"

#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t QUERIES = 40, KEYS = 160;  // per tile, per block: the scores fill half of L1
constexpr int64_t DEPTH = 128;               // a longer sum over d is split
constexpr int64_t STATE = 1 << 17;           // output elements of the tiles that share a packed block
constexpr int64_t PIECES = 4;                // pieces of work per thread, at least
constexpr float LOWEST = -__FLT_MAX__;      // finite, so that no difference is inf - inf

// Splits [0, n) into pieces of nearly equal size, none larger than `most`.
struct Pieces {
  int64_t n, count, size;
  Pieces(int64_t n, int64_t most) : n(n), count(ceil_div(n, most)), size(ceil_div(n, larger(1, count))) {}
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return smaller(size, n - i * size); }
};

// Dense rows of one sample and head.
template <class T> struct Rows {
  const T* x;
  int64_t stride;
  Rows(const T* x, int64_t stride) : x(x), stride(stride) {}
  Rows(const Heads& heads, int64_t n, int64_t h)
      : Rows(static_cast<const T*>(heads.data) + n * heads.sample + h * heads.head, heads.row) {}
  Rows from(int64_t first) const { return {x + first * stride, stride}; }
  const T* operator[](int64_t i) const { return x + i * stride; }
};

// Keys or values from `first` on: `count` rows in total, followed by those of the extra keys.
template <class T> struct TwoRows {
  Rows<T> rows, extra;
  int64_t count, first;
  const T* operator[](int64_t i) const {
    return first + i < count ? rows[first + i] : extra[first + i - count];
  }
};

// n dense rows of d elements as fp32: in place, or converted into `buffer`.
inline Rows<float> as_float(Rows<float> rows, float*, int64_t, int64_t) { return rows; }
template <class T> Rows<float> as_float(Rows<T> rows, float* buffer, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; ++i) widen(rows[i], buffer + i * d, d);
  return {buffer, d};
}

inline void copy(const float* x, float* y, int64_t n) {
  __builtin_memcpy(y, x, sizeof(float) * size_t(n));
}
template <class T> void copy(const T* x, float* y, int64_t n) { widen(x, y, n); }

// Copies n rows of d elements to rows of y, padded with zeros to `wide`.
template <class R> void pack(const R& rows, int64_t n, int64_t d, int64_t wide, float* y) {
  for (int64_t i = 0; i < n; ++i, y += wide) {
    copy(rows[i], y, d);
    for (int64_t j = d; j < wide; ++j) y[j] = 0;
  }
}

// Copies n rows to columns of y, whose rows are y_row apart; padded with zeros to a multiple of LANES.
template <class R>
void pack_columns(const R& rows, int64_t n, int64_t d, int64_t wide, float* buffer, float* y,
                  int64_t y_row) {
  for (int64_t first = 0; first < n; first += LANES) {
    for (int64_t i = 0; i < LANES; ++i) {
      float* to = buffer + i * wide;
      const int64_t known = first + i < n ? d : 0;
      if (known) copy(rows[first + i], to, d);
      for (int64_t j = known; j < wide; ++j) to[j] = 0;
    }
    for (int64_t j = 0; j < wide; j += LANES) transpose(buffer + j, wide, y + j * y_row + first, y_row);
  }
}

// Tiles of queries of one sample and head that are computed together.
struct Piece {
  int64_t head, n, h, first, last;  // tiles
  int64_t query, queries;           // the first query, and their number
};

// Shared by the forward and backward pass: the call, how it is split, and the scores of a tile.
template <class T> struct Call {
  const Attention& a;
  Pieces blocks, tiles, depths;
  int64_t wide, block_wide;  // d and the keys per block, rounded up to multiples of LANES
  int64_t group, groups;     // tiles per piece, pieces per head
  bool plain;                // the scale is applied in the exponent
  float scale;

  explicit Call(const Attention& a)
      : a(a), blocks(a.keys + a.extra_keys, KEYS), tiles(a.length, QUERIES), depths(a.d, DEPTH),
        wide(padded(a.d)), block_wide(padded(blocks.size)), plain(!a.mask.data && a.scale > 0),
        scale(float(a.scale)) {
    const int64_t fitting = larger(1, STATE / (tiles.size * wide));
    group = smaller(fitting, ceil_div(tiles.count * a.n * a.heads, PIECES * a.threads));
    if (a.threads == 1) group = fitting;
    groups = ceil_div(tiles.count, group);
  }

  int64_t items() const { return a.n * a.heads * groups; }
  float unit() const { return plain ? scale : 1.0f; }

  Piece head(int64_t head) const {
    return {head, head / a.heads, head % a.heads, 0, tiles.count, 0, a.length};
  }
  Piece piece(int64_t item) const {
    Piece p = head(item / groups);
    p.first = item % groups * group;
    p.last = smaller(tiles.count, p.first + group);
    p.query = tiles.begin(p.first);
    p.queries = smaller(a.length, tiles.begin(p.last)) - p.query;
    return p;
  }

  Rows<T> rows(const Heads& heads, const Piece& p, int64_t first) const {
    return Rows<T>(heads, p.n, p.h).from(first);
  }
  TwoRows<T> keys(const Piece& p, int64_t first) const {
    return {{a.k, p.n, p.h}, {a.extra_k, p.n, p.h}, a.keys, first};
  }
  TwoRows<T> values(const Piece& p, int64_t first) const {
    return {{a.v, p.n, p.h}, {a.extra_v, p.n, p.h}, a.keys, first};
  }
  // Index of row r of a piece among all rows of a dense tensor.
  int64_t query_row(const Piece& p, int64_t r) const {
    return (p.n * a.length + p.query + r) * a.heads + p.h;
  }

  // Computes left right^T, summed over pieces of d; `right` is packed as columns.
  void scores(Rows<float> left, int64_t rows, const float* right, int64_t columns, float* out) const {
    for (int64_t i = 0; i < depths.count; ++i) {
      const int64_t from = depths.begin(i);
      multiply({left.x + from, left.stride, 1, right + from * block_wide, block_wide, out, block_wide,
                depths.length(i), nullptr, i > 0},
               rows, columns);
    }
  }

  // Turns scores into scale * score + mask, unless the call is `plain`.
  void finish(float* scores, const Piece& p, int64_t query, int64_t rows, int64_t key,
              int64_t count) const {
    if (plain) return;
    const AttentionMask& m = a.mask;
    for (int64_t r = 0; r < rows; ++r) {
      float* RESTRICT s = scores + r * block_wide;
      SIMD for (int64_t i = 0; i < count; ++i) s[i] *= scale;
      const int64_t at = p.n * m.sample + p.h * m.head + (query + r) * m.query + key * m.key;
      if (m.data && m.bytes) {
        const uint8_t* seen = static_cast<const uint8_t*>(m.data) + at;
        for (int64_t i = 0; i < count; ++i) s[i] = seen[i * m.key] ? s[i] : -__builtin_inff();
      } else if (m.data) {
        const float* added = static_cast<const float*>(m.data) + at;
        for (int64_t i = 0; i < count; ++i) s[i] += added[i * m.key];
      }
    }
  }
};

// The online softmax of rows: scores become exp(unit (score - top)), `weight` is their sum, and sums of
// earlier blocks must be multiplied by `factor`. It takes three loops, because row by row it would be
// one long dependency chain. `tail` is added to the last LANES columns: -inf for columns without a key.
inline void soften(float* scores, int64_t rows, int64_t wide, int64_t columns, const float* tail,
                   float unit, float* RESTRICT top, float* RESTRICT weight, float* RESTRICT factor) {
  for (int64_t r = 0; r < rows; ++r) {
    float *s = scores + r * wide, *last = s + columns - LANES;
    SIMD for (int64_t i = 0; i < LANES; ++i) last[i] += tail[i];
    float highest = top[r];
    _Pragma("omp simd reduction(max : highest)") for (int64_t i = 0; i < columns; ++i)
      highest = s[i] > highest ? s[i] : highest;
    factor[r] = highest;
  }
  SIMD for (int64_t r = 0; r < rows; ++r) {
    const float highest = factor[r];
    factor[r] = exp_((top[r] - highest) * unit);
    top[r] = highest;
    weight[r] *= factor[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* RESTRICT s = scores + r * wide;
    const float highest = top[r];
    float sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < columns; ++i) {
      const float e = exp_((s[i] - highest) * unit);
      s[i] = e;
      sum += e;
    }
    weight[r] += sum;
  }
}

// Writes fp32 result rows, `wide` apart, to row `at(r)` of the dense tensor y, multiplied by factor(r).
template <class T, class At, class Factor>
void write(float* x, int64_t wide, int64_t rows, int64_t d, void* y, const At& at, const Factor& factor) {
  for (int64_t r = 0; r < rows; ++r, x += wide) {
    const float times = factor(r);
    T* out = static_cast<T*>(y) + at(r) * d;
    float* to = target(out, x);
    SIMD for (int64_t i = 0; i < d; ++i) to[i] = x[i] * times;
    narrow(to, out, d);
  }
}

template <class T> void forward(const Attention& a) {
  const Call<T> call(a);
  const int64_t wide = call.wide, block_wide = call.block_wide, most = call.group * call.tiles.size;
  parallel(call.items(), 1, [&](int64_t begin, int64_t end) {
    Scratch<float> k_columns(wide * block_wide), v_rows(block_wide * wide), buffer(LANES * wide),
        q_buffer(call.tiles.size * a.d), scores(call.tiles.size * block_wide), sums(most * wide),
        top(most), weight(most), factor(call.tiles.size);
    alignas(64) float tail[LANES];
    int64_t packed = -1;  // the head whose keys are packed, if a head is one block
    for (int64_t item = begin; item < end; ++item) {
      const Piece piece = call.piece(item);
      for (int64_t i = 0; i < piece.queries; ++i) top.data[i] = LOWEST, weight.data[i] = 0;
      for (int64_t block = 0; block < call.blocks.count; ++block) {
        const int64_t key = call.blocks.begin(block), count = call.blocks.length(block);
        const int64_t columns = padded(count);
        if (call.blocks.count > 1 || packed != piece.head) {
          pack_columns(call.keys(piece, key), count, a.d, wide, buffer.data, k_columns.data, block_wide);
          pack(call.values(piece, key), count, a.d, wide, v_rows.data);
          packed = piece.head;
          for (int64_t i = 0; i < LANES; ++i) tail[i] = columns - LANES + i < count ? 0 : -__builtin_inff();
        }
        for (int64_t tile = piece.first; tile < piece.last; ++tile) {
          const int64_t query = call.tiles.begin(tile), rows = call.tiles.length(tile);
          const int64_t at = query - piece.query;
          const Rows<float> q = as_float(call.rows(a.q, piece, query), q_buffer.data, rows, a.d);
          call.scores(q, rows, k_columns.data, columns, scores.data);
          call.finish(scores.data, piece, query, rows, key, count);
          soften(scores.data, rows, block_wide, columns, tail, call.unit(), top.data + at,
                 weight.data + at, factor.data);
          multiply({scores.data, block_wide, 1, v_rows.data, wide, sums.data + at * wide, wide, count,
                    block ? factor.data : nullptr, false},
                   rows, wide);
        }
      }
      write<T>(sums.data, wide, piece.queries, a.d, a.out,
               [&](int64_t r) { return call.query_row(piece, r); },
               [&](int64_t r) { return weight.data[r] > 0 ? 1 / weight.data[r] : 0; });
      if (a.sums) {
        float* kept = a.sums + piece.head * a.length + piece.query;
        copy(top.data, kept, piece.queries);
        copy(weight.data, kept + a.n * a.heads * a.length, piece.queries);
      }
    }
  });
}

// What the backward pass knows about each query: three arrays of (n, heads, length).
struct Known {
  const float *top, *weight, *dots;
  Known at(int64_t i) const { return {top + i, weight + i, dots + i}; }
};

// Turns scores into P, and dP into the gradient of the scores, P (dP - the row's sum of P dP).
inline void differentiate(float* scores, float* dp, int64_t rows, int64_t wide, int64_t columns,
                          float unit, Known known, bool one_key) {
  for (int64_t r = 0; r < rows; ++r) {
    float *RESTRICT s = scores + r * wide, *RESTRICT ds = dp + r * wide;
    const float top = known.top[r], dot = known.dots[r];
    const float share = known.weight[r] > 0 ? 1 / known.weight[r] : 0;
    SIMD for (int64_t i = 0; i < columns; ++i) {
      s[i] = exp_((s[i] - top) * unit) * share;
      ds[i] = one_key ? 0.0f : s[i] * (ds[i] - dot);
    }
  }
}

// Each query's sum of P dP, which equals the sum of dout * out.
template <class T> void dots_of_rows(const AttentionBackward& b, float* dots) {
  const Attention& a = b.forward;
  parallel(a.n * a.heads * a.length, 64, [&](int64_t begin, int64_t end) {
    Scratch<float> buffer(2 * a.d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / a.length, query = i % a.length, n = head / a.heads, h = head % a.heads;
      const T* dout = Rows<T>(b.dout, n, h).from(query).x;
      const T* out = static_cast<const T*>(a.out) + ((n * a.length + query) * a.heads + h) * a.d;
      const float *x = widen(dout, buffer.data, a.d), *y = widen(out, buffer.data + a.d, a.d);
      double sum = 0;  // fp64, because dP - sum cancels
      _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < a.d; ++j)
        sum += double(x[j]) * double(y[j]);
      dots[i] = float(sum);
    }
  });
}

// Corrects the sums for the output having been rounded to half precision (PyTorch keeps an fp32 output
// when a mask needs a gradient). Rows of dscores must sum to zero, so their actual sum is the error.
void correct(float* dots, const float* dscores, int64_t rows, int64_t keys) {
  parallel(rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* ds = dscores + i * keys;
      float sum = 0;
      _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < keys; ++j) sum += ds[j];
      dots[i] += sum;
    }
  });
}

template <class T> void queries_gradient(const AttentionBackward& b, Known known) {
  const Attention& a = b.forward;
  const Call<T> call(a);
  const int64_t wide = call.wide, block_wide = call.block_wide, size = call.tiles.size;
  const int64_t keys = a.keys + a.extra_keys;
  parallel(call.items(), 1, [&](int64_t begin, int64_t end) {
    Scratch<float> k_columns(wide * block_wide), v_columns(wide * block_wide), k_rows(block_wide * wide),
        buffer(LANES * wide), q_buffer(size * a.d), dout_buffer(size * a.d), scores(size * block_wide),
        dscores(size * block_wide), dq(call.group * size * wide);
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const Piece piece = call.piece(item);
      for (int64_t block = 0; block < call.blocks.count; ++block) {
        const int64_t key = call.blocks.begin(block), count = call.blocks.length(block);
        const int64_t columns = padded(count);
        if (call.blocks.count > 1 || packed != piece.head) {
          const auto k = call.keys(piece, key), v = call.values(piece, key);
          pack_columns(k, count, a.d, wide, buffer.data, k_columns.data, block_wide);
          pack_columns(v, count, a.d, wide, buffer.data, v_columns.data, block_wide);
          pack(k, count, a.d, wide, k_rows.data);
          packed = piece.head;
        }
        for (int64_t tile = piece.first; tile < piece.last; ++tile) {
          const int64_t query = call.tiles.begin(tile), rows = call.tiles.length(tile);
          const int64_t at = piece.head * a.length + query;
          const auto q = as_float(call.rows(a.q, piece, query), q_buffer.data, rows, a.d);
          const auto dout = as_float(call.rows(b.dout, piece, query), dout_buffer.data, rows, a.d);
          call.scores(q, rows, k_columns.data, columns, scores.data);
          call.finish(scores.data, piece, query, rows, key, count);
          call.scores(dout, rows, v_columns.data, columns, dscores.data);
          differentiate(scores.data, dscores.data, rows, block_wide, columns, call.unit(), known.at(at), keys == 1);
          if (b.dscores)
            for (int64_t r = 0; r < rows; ++r)
              copy(dscores.data + r * block_wide, b.dscores + (at + r) * keys + key, count);
          multiply({dscores.data, block_wide, 1, k_rows.data, wide,
                    dq.data + (query - piece.query) * wide, wide, count, nullptr, block > 0},
                   rows, wide);
        }
      }
      write<T>(dq.data, wide, piece.queries, a.d, b.dq,
               [&](int64_t r) { return call.query_row(piece, r); }, [&](int64_t) { return call.scale; });
    }
  });
}

template <class T> void keys_gradient(const AttentionBackward& b, Known known) {
  const Attention& a = b.forward;
  const Call<T> call(a);
  const int64_t wide = call.wide, block_wide = call.block_wide, size = call.tiles.size;
  const bool one_key = a.keys + a.extra_keys == 1;
  parallel(a.n * a.heads * call.blocks.count, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> k_columns(wide * block_wide), v_columns(wide * block_wide), buffer(LANES * wide),
        q_rows(size * wide), dout_rows(size * wide), scores(size * block_wide),
        dscores(size * block_wide), dk(block_wide * wide), dv(block_wide * wide);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % call.blocks.count;
      const int64_t key = call.blocks.begin(block), count = call.blocks.length(block);
      const int64_t columns = padded(count);
      const Piece piece = call.head(item / call.blocks.count);
      pack_columns(call.keys(piece, key), count, a.d, wide, buffer.data, k_columns.data, block_wide);
      pack_columns(call.values(piece, key), count, a.d, wide, buffer.data, v_columns.data, block_wide);
      for (int64_t tile = 0; tile < call.tiles.count; ++tile) {
        const int64_t query = call.tiles.begin(tile), rows = call.tiles.length(tile);
        pack(call.rows(a.q, piece, query), rows, a.d, wide, q_rows.data);
        pack(call.rows(b.dout, piece, query), rows, a.d, wide, dout_rows.data);
        call.scores({q_rows.data, wide}, rows, k_columns.data, columns, scores.data);
        call.finish(scores.data, piece, query, rows, key, count);
        call.scores({dout_rows.data, wide}, rows, v_columns.data, columns, dscores.data);
        differentiate(scores.data, dscores.data, rows, block_wide, columns, call.unit(),
                      known.at(piece.head * a.length + query), one_key);
        multiply({scores.data, 1, block_wide, dout_rows.data, wide, dv.data, wide, rows, nullptr, tile > 0},
                 count, wide);
        multiply({dscores.data, 1, block_wide, q_rows.data, wide, dk.data, wide, rows, nullptr, tile > 0},
                 count, wide);
      }
      const int64_t own = larger(0, smaller(count, a.keys - key));  // the rest are extra keys
      const auto at = [&](int64_t r) { return (piece.n * a.keys + key + r) * a.heads + piece.h; };
      const auto extra_at = [&](int64_t r) {
        return (piece.n * a.extra_keys + key + own - a.keys + r) * a.heads + piece.h;
      };
      const auto scale = [&](int64_t) { return call.scale; };
      const auto as_is = [](int64_t) { return 1.0f; };
      write<T>(dk.data, wide, own, a.d, b.dk, at, scale);
      write<T>(dv.data, wide, own, a.d, b.dv, at, as_is);
      write<T>(dk.data + own * wide, wide, count - own, a.d, b.dextra_k, extra_at, scale);
      write<T>(dv.data + own * wide, wide, count - own, a.d, b.dextra_v, extra_at, as_is);
    }
  });
}

}  // namespace

template <> void run(const Attention& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

template <> void run(const AttentionBackward& b) {
  const Attention& a = b.forward;
  const int64_t queries = a.n * a.heads * a.length;
  Scratch<float> dots(queries);
  const Known known{a.sums, a.sums + queries, dots.data};
  with_type(a.dtype, [&](auto type) {
    dots_of_rows<decltype(type)>(b, dots.data);
    queries_gradient<decltype(type)>(b, known);
    if (b.dscores && a.dtype != F32) {
      correct(dots.data, b.dscores, queries, a.keys + a.extra_keys);
      queries_gradient<decltype(type)>(b, known);
    }
    keys_gradient<decltype(type)>(b, known);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
