// Python bindings of the CPU kernels of `gate_residual`.
#include "gate_residual.h"
#include "bindings.h"

using namespace fastdiff;

namespace {

void gate_residual(int dtype, Address x, Address residual, Address y, Address gate, int64_t n,
                   int64_t length, int64_t d, int64_t x_stride, int64_t residual_stride) {
  run(GateResidual{Dtype(dtype), in(x), in(residual), out(y), pointer<const float>(gate), n, length,
                   d, x_stride, residual_stride});
}

void gate_residual_backward(int dtype, Address dy, Address x, Address dx, Address gate,
                            Address dgate, int64_t n, int64_t length, int64_t d, int64_t dy_stride,
                            int64_t x_stride) {
  run(GateResidualBackward{Dtype(dtype), in(dy), in(x), out(dx), pointer<const float>(gate),
                           pointer<float>(dgate), n, length, d, dy_stride, x_stride});
}

const Binding gate_residual_binding([](py::module_& m) {
  m.def("gate_residual", &gate_residual, Release());
  m.def("gate_residual_backward", &gate_residual_backward, Release());
});

}  // namespace
