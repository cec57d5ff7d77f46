// The Python side of the CPU kernels of `sampler_step`.
#include "bindings.h"
#include "sampler_step.h"

using namespace fastdiff;

namespace {

void sampler_step(int dtype, bool guided, bool learned, Address x, Address prediction,
                  Address history, Address row, Address seeds, int64_t n, int64_t runs,
                  int64_t length, int64_t image_stride, int64_t run_stride, int64_t stride,
                  int64_t variance_offset, int64_t step, uint32_t stream, double rescale) {
  run(SamplerStep{Dtype(dtype), guided, learned, pointer<float>(x), in(prediction),
                  pointer<float>(history), pointer<const float>(row),
                  pointer<const int64_t>(seeds), n, runs, length, image_stride, run_stride, stride,
                  variance_offset, step, stream, rescale});
}

const Binding binding([](py::module_& m) {
  m.def("sampler_step", &sampler_step, Release());
});

}  // namespace
