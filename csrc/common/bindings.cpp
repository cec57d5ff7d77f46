// The module fastdiff.kernels._native: its build information, and the functions of every op.
#include "bindings.h"

#include "build_info.h"

using namespace fastdiff;

namespace {

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
  info["without_cuda"] = build_info.without_cuda;
  info["sanitizers"] = build_info.sanitizers;
  return info;
}

void use_isa_or_raise(const std::string& name) {
  if (!use_isa(name.c_str()))
    throw py::value_error("instruction set '" + name + "' is not compiled in or not in this CPU");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels; fastdiff.kernels.compiled finds them.";
  m.def("build", &build, "What the module was built with.");
  m.def("isa", &isa, "The instruction set in use.");
  m.def("use_isa", &use_isa_or_raise, "Use another instruction set, for tests.");
  m.def(
      "set_parallel_for",
      [](Address function) { set_parallel_for(reinterpret_cast<ParallelFor>(function)); },
      "The address of torch_parallel_for, 0 for one thread.");
  m.def("has_parallel_for", &has_parallel_for);
  for (const Binding* each = Binding::first(); each; each = each->next) each->define(m);
}
