// Python bindings of the CPU kernels of `geglu`.
#include "bindings.h"
#include "geglu.h"

using namespace fastdiff;

namespace {

void geglu(int dtype, Address x, Address y, int64_t rows, int64_t d, int64_t x_stride) {
  run(Geglu{Dtype(dtype), in(x), out(y), rows, d, x_stride});
}

void geglu_backward(int dtype, Address dy, Address x, Address dx, int64_t rows, int64_t d,
                    int64_t dy_stride, int64_t x_stride) {
  run(GegluBackward{Dtype(dtype), in(dy), in(x), out(dx), rows, d, dy_stride, x_stride});
}

const Binding geglu_binding([](py::module_& m) {
  m.def("geglu", &geglu, Release());
  m.def("geglu_backward", &geglu_backward, Release());
});

}  // namespace
