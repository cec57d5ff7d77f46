// The module fastdiff.kernels._native. Tensors come as addresses (data_ptr()), sizes and strides;
// the Python side has checked them. No torch header, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "build_info.h"
#include "kernels.h"
#include "philox.h"

namespace py = pybind11;
using namespace fastdiff;

#if defined(FASTDIFF_CUDA)
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

namespace {

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }
const void* in(Address address) { return pointer<const void>(address); }
void* out(Address address) { return pointer<void>(address); }

py::dict build() {
  py::list isas;
#define X(isa) isas.append(#isa);
  FASTDIFF_ISAS
#undef X
  py::dict info;
  info["version"] = build_info.version;
  info["digest"] = build_info.digest;
  info["compiler"] = build_info.compiler;
  info["isas"] = py::tuple(isas);
  info["cuda_architectures"] = build_info.cuda_architectures;
  return info;
}

void use_isa_or_raise(const std::string& name) {
  if (!use_isa(name.c_str()))
    throw py::value_error("instruction set '" + name + "' is not compiled in or not in this CPU");
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  const Words words = philox4x32({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
  return {words.w[0], words.w[1], words.w[2], words.w[3]};
}

void geglu(int dtype, Address x, Address y, int64_t rows, int64_t d, int64_t x_stride) {
  run(Geglu{Dtype(dtype), in(x), out(y), rows, d, x_stride});
}

void geglu_backward(int dtype, Address dy, Address x, Address dx, int64_t rows, int64_t d,
                    int64_t dy_stride, int64_t x_stride) {
  run(GegluBackward{Dtype(dtype), in(dy), in(x), out(dx), rows, d, dy_stride, x_stride});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels; fastdiff.kernels.extension finds them.";
  m.def("build", &build, "What the module was built with.");
  m.def("isa", &isa, "The instruction set in use.");
  m.def("use_isa", &use_isa_or_raise, "Use another instruction set, for tests.");
  m.def(
      "set_parallel_for",
      [](Address function) { set_parallel_for(reinterpret_cast<ParallelFor>(function)); },
      "The address of torch_parallel_for, 0 for one thread.");
  m.def("has_parallel_for", &has_parallel_for);
  m.def("philox4x32", &philox, "Ten rounds on four words with a key of two.");
  m.def("geglu", &geglu, Release());
  m.def("geglu_backward", &geglu_backward, Release());
#if defined(FASTDIFF_CUDA)
  bind_cuda(m);
#endif
}
