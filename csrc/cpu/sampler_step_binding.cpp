// Python bindings of the CPU kernel of `sampler_step`.
#include "bindings.h"
#include "sampler_step.h"

using namespace fastdiff;

namespace {

// Returns the first sample with a row or an index out of range, or with RESCALE although `rescale` is
// false. Otherwise takes the step and returns -1; on an error nothing is computed.
int64_t sampler_step(int dtype, bool learned, bool rescale, Address x, Address prediction,
                     Address history, Address table, Address rows, Address seeds, Address cond,
                     Address uncond, Address denoised, Address finite, Address log_prob,
                     int64_t n, int64_t table_rows, int64_t images, int64_t runs, int64_t length,
                     int64_t image_stride, int64_t run_stride, int64_t stride,
                     int64_t variance_offset, uint32_t stream) {
  const SamplerStep a{Dtype(dtype), learned, pointer<float>(x), in(prediction),
                      pointer<float>(history), pointer<const float>(table),
                      pointer<const int64_t>(rows), pointer<const int64_t>(seeds),
                      pointer<const int64_t>(cond), pointer<const int64_t>(uncond),
                      pointer<float>(denoised), pointer<bool>(finite), pointer<float>(log_prob), n,
                      runs, length, image_stride, run_stride, stride, variance_offset, stream};
  for (int64_t i = 0; i < n; ++i) {
    if (a.rows[i] == -1) continue;
    const int64_t other = a.uncond ? a.uncond[i] : -1, own = a.cond ? a.cond[i] : i;
    if (a.rows[i] < 0 || a.rows[i] >= table_rows || own < 0 || own >= images || other < -1 ||
        other >= images)
      return i;
    if (!rescale && other >= 0 && a.table[a.rows[i] * columns::COUNT + columns::RESCALE] != 0) return i;
  }
  run(a);
  return -1;
}

const Binding sampler_step_binding([](py::module_& m) { m.def("sampler_step", &sampler_step, Release()); });

}  // namespace
