// Small matrix products on the vectors of the instruction set. Included in the same way as cpu.h.
#pragma once

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

// The most vectors per row that a product holds in registers, and the number of rows for 1, 2, ... of
// them.
#if defined(__AVX512F__)
constexpr int MOST_VECTORS = 5, ROWS_OF[] = {0, 12, 12, 8, 6, 5};
#else
constexpr int MOST_VECTORS = 3, ROWS_OF[] = {0, 12, 6, 4};
#endif
typedef int32_t Places __attribute__((vector_size(4 * LANES)));

inline int64_t padded(int64_t n) { return ceil_div(n, LANES) * LANES; }
// A product C = A B. `row` and `column` are the strides of A, b_row and c_row the row strides of B and
// C.
struct Product {
  const float* a;
  int64_t row, column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row, depth;
  const float* factor;  // if given, row r of C is multiplied by factor[r] and the product is added
  bool add;             // without a factor: add the product to C

  void step(int64_t rows) {
    a += rows * row;
    c += rows * c_row;
    if (factor) factor += rows;
  }
};

// Keeps x in a register; the compiler would otherwise reload it for every use.
#if defined(__x86_64__)
#define IN_REGISTER(x) asm("" : "+v"(x))
#else
#define IN_REGISTER(x)
#endif

template <int ROWS, int VECTORS> void rows_of_product(const Product& p) {
  Vector sums[ROWS][VECTORS] = {};
  const int64_t row = p.row, column = p.column, b_row = p.b_row, depth = p.depth;
  const float *a = p.a, *b = p.b;
  for (int64_t k = 0; k < depth; ++k, a += column, b += b_row) {
    Vector right[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      right[v] = load(b + v * LANES);
      IN_REGISTER(right[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float left = a[r * row];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += right[v] * left;
    }
  }
  const float* factor = p.factor;
  float* c = p.c;
  const bool keep = p.add || factor;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r, c += p.c_row) {
    if (keep) {
      const float times = factor ? factor[r] : 1.0f;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += load(c + v * LANES) * times;
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c + v * LANES, sums[r][v]);
  }
}

template <int ROWS, int VECTORS> inline void panel(Product p, int64_t rows) {
  for (; rows >= ROWS; rows -= ROWS) {
    rows_of_product<ROWS, VECTORS>(p);
    p.step(ROWS);
  }
  if constexpr (ROWS > 1)
    if (rows > 0) panel<(ROWS + 1) / 2, VECTORS>(p, rows);
}

template <int VECTORS = MOST_VECTORS>
inline void panel_of(const Product& p, int64_t rows, int64_t vectors) {
  if (vectors == VECTORS)
    panel<ROWS_OF[VECTORS], VECTORS>(p, rows);
  else if constexpr (VECTORS > 1)
    panel_of<VECTORS - 1>(p, rows, vectors);
}

// Computes the whole product, `columns` wide (a multiple of LANES).
void multiply(Product p, int64_t rows, int64_t columns) {
  int64_t vectors = columns / LANES;
  for (int64_t left = ceil_div(vectors, MOST_VECTORS); left > 0; --left) {
    const int64_t now = ceil_div(vectors, left);
    panel_of(p, rows, now);
    p.b += now * LANES;
    p.c += now * LANES;
    vectors -= now;
  }
}

// Interleaves the first (or second) halves of a and b.
inline Vector interleave(Vector a, Vector b, bool second) {
#if defined(__clang__)
  Vector both{};
  for (int i = 0; i < LANES; ++i) both[i] = (i % 2 ? b : a)[i / 2 + (second ? LANES / 2 : 0)];
  return both;
#else
  Places places{};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) places[i] = i / 2 + (i % 2 ? LANES : 0) + (second ? LANES / 2 : 0);
  return __builtin_shuffle(a, b, places);
#endif
}

// Transposes LANES x LANES elements; rows of x are x_row apart, rows of y are y_row apart.
inline void transpose(const float* x, int64_t x_row, float* y, int64_t y_row) {
  Vector rows[LANES], next[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = load(x + i * x_row);
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + LANES / 2], false);
      next[2 * i + 1] = interleave(rows[i], rows[i + LANES / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(y + i * y_row, rows[i]);
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
