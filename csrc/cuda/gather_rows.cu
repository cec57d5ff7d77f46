// Launcher of gather_rows.

#include "gather_rows.cuh"

#include "launch.cuh"

using namespace fastdiff;

/// dtype: of embeddings, inputs and emb. x: (count, channels, space), extra: (count, more, space) or null,
/// embeddings: (length, width), samples and places: (rows,); all dense.
FASTDIFF_EXPORT const char* fastdiff_cuda_gather_rows(
    int device, void* stream, int dtype, const float* x, const float* extra, const int64_t* samples,
    const void* embeddings, const int64_t* places, void* inputs, void* emb, int64_t rows,
    int64_t count, int64_t length, int64_t channels, int64_t more, int64_t space, int64_t width,
    int channels_last) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    GatherRows<T> p{};
    p.x = x;
    p.extra = extra;
    p.samples = samples;
    p.places = places;
    p.embeddings = static_cast<const T*>(embeddings);
    p.inputs = static_cast<T*>(inputs);
    p.emb = static_cast<T*>(emb);
    p.count = count;
    p.length = length;
    p.channels = channels;
    p.more = more;
    p.space = space;
    p.width = width;
    p.tiles = ceil_div(space, kGatherThreads);
    p.channels_last = channels_last != 0;
    const dim3 grid = grid_of(rows, p.tiles + ceil_div(width, kGatherThreads));
    return launch(gather_rows_tile<T>, grid, kGatherThreads, 0, target, p);
  });
}
