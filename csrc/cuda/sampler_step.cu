// Launcher of sampler_step.

#include "sampler_step.cuh"

#include "launch.cuh"

namespace fastdiff {
namespace {

/// fields: strides of the image, outer and inner dimensions; size of the inner dimension; in order?
ImageLayout layout_of(const int64_t* fields, const void* data, size_t itemsize) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % (4 * itemsize) == 0;
  return {fields[0], fields[1], fields[2], unsigned(fields[3]),
          fields[4] != 0 && aligned && fields[0] % 4 == 0};
}

template <typename T>
const char* run(const StepArguments<T>& p, const Target& target) {
  if (p.moments != nullptr)
    FASTDIFF_TRY(launch(sampler_step_moments<T>, grid_of(p.n * p.parts), kMomentThreads, 0, target,
                        p));
  const int64_t tiles = ceil_div(p.elements, 4 * kStepThreads);
  if (p.log_prob == nullptr)
    return launch(sampler_step_row<T, false>, grid_of(p.n * tiles), kStepThreads, 0, target, p,
                  unsigned(tiles));
  FASTDIFF_TRY(launch(sampler_step_row<T, true>, grid_of(p.n * tiles), kStepThreads, 0, target, p,
                      unsigned(tiles)));
  return launch(sampler_step_log_prob<T>, grid_of(p.n), kStepThreads, 0, target, p);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// Applies each sample's row of the table. dtype: of the prediction. images: in the prediction. elements:
/// per image, below 2^31. layouts: 5 times 5 numbers (see layout_of), for x, the prediction, history, the
/// prediction in memory order, and denoised. cond, uncond, denoised, finite: as in StepArguments.
/// moments: (n, parts, 5) fp32 for rows with RESCALE, or null. log_prob: null, or with sums, fp32,
/// (n, warps_of(elements)).
FASTDIFF_EXPORT const char* fastdiff_cuda_sampler_step(
    int device, void* stream, int dtype, float* x, const void* prediction, float* history,
    const float* table, const int64_t* rows, const int64_t* seeds, const int64_t* cond,
    const int64_t* uncond, float* denoised, bool* finite, float* moments, const int64_t* layouts,
    float* sums, float* log_prob, int64_t slot_stride, int64_t variance, int64_t n, int64_t table_rows, int64_t images,
    int64_t elements, int64_t parts, int64_t noise_stream, int learned) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    StepArguments<T> p{};
    p.x = x;
    p.prediction = static_cast<const T*>(prediction);
    p.history = history;
    p.table = table;
    p.rows = rows;
    p.seeds = seeds;
    p.cond = cond;
    p.uncond = uncond;
    p.denoised = denoised;
    p.finite = finite;
    p.moments = moments;
    p.sums = sums;
    p.log_prob = log_prob;
    p.at_x = layout_of(layouts, x, sizeof(float));
    p.at_f = layout_of(layouts + 5, prediction, sizeof(T));
    p.at_history = layout_of(layouts + 10, history, sizeof(float));
    p.at_history.dense = p.at_history.dense && slot_stride % 4 == 0;
    p.along_f = layout_of(layouts + 15, prediction, sizeof(T));
    p.at_denoised = layout_of(layouts + 20, denoised, sizeof(float));
    p.slot_stride = slot_stride;
    p.variance = variance;
    p.n = n;
    p.table_rows = table_rows;
    p.images = images;
    p.elements = unsigned(elements);
    p.parts = unsigned(parts);
    p.stream = uint32_t(noise_stream);
    p.learned = learned != 0;
    return run<T>(p, target);
  });
}
