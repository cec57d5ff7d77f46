// Gathered rows on a CPU.
#include "gather_rows.h"

#include <cstring>

#include "cpu.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

template <class T> void gather(const GatherRows& a) {
  const int64_t channels = a.channels + a.more;
  const int64_t piece = a.channels_last ? larger(1, PIECE / larger(1, channels)) : PIECE;
  const auto plane = [&](int64_t sample, int64_t channel) {
    return channel < a.channels ? a.x + (sample * a.channels + channel) * a.space
                                : a.extra + (sample * a.more + channel - a.channels) * a.space;
  };
  parallel(a.rows, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> memory(larger(PIECE, channels));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = a.samples[row];
      T* y = static_cast<T*>(a.inputs) + row * channels * a.space;
      for (int64_t first = 0; first < a.space; first += piece) {
        const int64_t n = smaller(piece, a.space - first);
        if (a.channels_last) {
          T* to = y + first * channels;
          float* RESTRICT out = target(to, memory.data);
          for (int64_t c = 0; c < channels; ++c) {
            const float* RESTRICT from = plane(sample, c) + first;
            for (int64_t i = 0; i < n; ++i) out[i * channels + c] = from[i];
          }
          narrow(out, to, n * channels);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            const float* RESTRICT from = plane(sample, c) + first;
            T* to = y + c * a.space + first;
            float* RESTRICT out = target(to, memory.data);
            SIMD for (int64_t i = 0; i < n; ++i) out[i] = from[i];
            narrow(out, to, n);
          }
        }
      }
      const T* from = static_cast<const T*>(a.embeddings) + a.places[row] * a.width;
      std::memcpy(static_cast<T*>(a.emb) + row * a.width, from, a.width * sizeof(T));
    }
  });
}

}  // namespace

template <> void run(const GatherRows& a) {
  with_type(a.dtype, [&](auto type) { gather<decltype(type)>(a); });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
