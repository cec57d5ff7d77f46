// Python bindings of the CPU kernels of `layer_norm`.
#include "bindings.h"
#include "layer_norm.h"

using namespace fastdiff;

namespace {

void layer_norm(int dtype, bool wide_residual, Address x, Address residual, Address total,
                Address y, Address weight, Address bias, int64_t rows, int64_t d, int64_t x_stride,
                int64_t residual_stride, double eps) {
  run(LayerNorm{Dtype(dtype), wide_residual, in(x), in(residual), out(total), out(y),
                pointer<const float>(weight), pointer<const float>(bias), rows, d, x_stride,
                residual_stride, eps});
}

void layer_norm_backward(int dtype, Address dy, Address dtotal, Address x, Address dx,
                         Address weight, Address dweight, Address dbias, int64_t rows, int64_t d,
                         int64_t dy_stride, int64_t dtotal_stride, int64_t x_stride, double eps) {
  run(LayerNormBackward{Dtype(dtype), in(dy), in(dtotal), in(x), out(dx),
                        pointer<const float>(weight), pointer<float>(dweight),
                        pointer<float>(dbias), rows, d, dy_stride, dtotal_stride, x_stride, eps});
}

const Binding layer_norm_binding([](py::module_& m) {
  m.def("layer_norm", &layer_norm, Release());
  m.def("layer_norm_backward", &layer_norm_backward, Release());
});

}  // namespace
