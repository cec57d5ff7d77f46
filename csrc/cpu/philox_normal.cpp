// Normal noise for a batch of images on a CPU.
#include "philox_normal.h"

#include "noise.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

template <> void run(const PhiloxNormal& a) {
  constexpr int64_t piece = 4 * BLOCKS - 4;
  const int64_t pieces = ceil_div(a.elements, piece);
  parallel(a.n * pieces, 4, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[4 * BLOCKS];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / pieces, first = i % pieces * piece;
      const int64_t count = smaller(piece, a.elements - first);
      const uint64_t seed = uint64_t(a.seeds[image]);
      const NoiseKey key{uint32_t(seed), uint32_t(seed >> 32), a.step, a.stream};
      const float* RESTRICT z = normals(key, first, count, buffer);
      float* RESTRICT out = a.out + image * a.elements + first;
      for (int64_t j = 0; j < count; ++j) out[j] = z[j];
    }
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
