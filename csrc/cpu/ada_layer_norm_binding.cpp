// Python bindings of the CPU kernels of `ada_layer_norm`.
#include "ada_layer_norm.h"
#include "bindings.h"

using namespace fastdiff;

namespace {

void ada_layer_norm(int dtype, Address x, Address y, Address scale, Address shift, int64_t n,
                    int64_t length, int64_t d, int64_t x_stride, double eps) {
  run(AdaLayerNorm{Dtype(dtype), in(x), out(y), pointer<const float>(scale),
                   pointer<const float>(shift), n, length, d, x_stride, eps});
}

void ada_layer_norm_backward(int dtype, Address dy, Address x, Address dx, Address scale,
                             Address dscale, Address dshift, int64_t n, int64_t length, int64_t d,
                             int64_t dy_stride, int64_t x_stride, double eps) {
  run(AdaLayerNormBackward{Dtype(dtype), in(dy), in(x), out(dx), pointer<const float>(scale),
                           pointer<float>(dscale), pointer<float>(dshift), n, length, d, dy_stride,
                           x_stride, eps});
}

const Binding ada_layer_norm_binding([](py::module_& m) {
  m.def("ada_layer_norm", &ada_layer_norm, Release());
  m.def("ada_layer_norm_backward", &ada_layer_norm_backward, Release());
});

}  // namespace
