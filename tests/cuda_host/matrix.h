// ldmatrix and mma.sync on the CPU, for csrc/cuda/mma.cuh. A lane passes its part to the warp
// (`exchange`) and then selects the contents of its registers from all 32 parts.
//
// ldmatrix reads a row as soon as the row's lane arrives, which is as early as possible. A lane
// that reads what another lane wrote without __syncwarp thus sees old bytes in some order of the
// threads. mma.sync sums in fp32, in the order of k; products of half-precision numbers are exact
// there. A GPU's matrix unit sums in another order and truncates: bits may differ, but the error
// has the same size.

#pragma once

#include "emulation.h"

namespace emulation {

inline float float_of(__half x) { return __half2float(x); }
inline float float_of(__nv_bfloat16 x) { return __bfloat162float(x); }

inline void load_matrices(unsigned* to, int count, bool transposed, const void* row) {
  uint16_t mine[8] = {};
  if (lane() < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that is not aligned");
    std::memcpy(mine, row, sizeof mine);
  }
  const Slots& rows = exchange(~0u, mine, sizeof mine, EMULATION_SITE("ldmatrix"));
  const int g = lane() / 4, t = lane() % 4;
  const auto number = [&rows](int matrix, int r, int c) {
    uint16_t bits;
    std::memcpy(&bits, rows.bytes[8 * matrix + r] + 2 * c, 2);
    return static_cast<unsigned>(bits);
  };
  for (int m = 0; m < count; ++m)
    to[m] = transposed ? number(m, 2 * t, g) | number(m, 2 * t + 1, g) << 16
                       : number(m, g, 2 * t) | number(m, g, 2 * t + 1) << 16;
}

/// c += A B with A (16, depth) in depth / 4 registers, B (depth, 8) in depth / 8; depth 16 or 8.
template <typename T>
void multiply(float (&c)[4], const unsigned* a, const unsigned* b, int depth) {
  unsigned mine[6] = {};
  std::memcpy(mine, a, depth);  // depth / 4 registers of 4 bytes
  std::memcpy(mine + 4, b, depth / 2);
  const Slots& parts = exchange(~0u, mine, sizeof mine, EMULATION_SITE("mma.sync"));
  const auto number = [&parts](int from, int reg, int place) {
    T x;
    std::memcpy(&x, parts.bytes[from] + 4 * reg + 2 * place, 2);
    return float_of(x);
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int k = 0; k < depth; ++k) {
    const int pair = k % 8 / 2, upper = k / 8, place = k % 2;
    const float a0 = number(4 * g + pair, 2 * upper, place);
    const float a1 = number(4 * g + pair, 2 * upper + 1, place);
    const float b0 = number(4 * (2 * t) + pair, 4 + upper, place);
    const float b1 = number(4 * (2 * t + 1) + pair, 4 + upper, place);
    c[0] += a0 * b0;
    c[1] += a0 * b1;
    c[2] += a1 * b0;
    c[3] += a1 * b1;
  }
}

}  // namespace emulation
