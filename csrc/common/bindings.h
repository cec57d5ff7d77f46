// Building blocks for an op's Python functions. Tensors arrive as addresses (data_ptr()), sizes and
// strides, already checked on the Python side. No torch header, so one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "kernels.h"

namespace fastdiff {

namespace py = pybind11;
using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }
inline const void* in(Address address) { return pointer<const void>(address); }
inline void* out(Address address) { return pointer<void>(address); }

// Adds a file's functions to the module when it is loaded; each cpu/<op>_binding.cpp defines one
// constant of this type, named like the file: setup.py compiles all these files as one unit.
struct Binding {
  using Define = void (*)(py::module_&);

  Define define;
  const Binding* next;

  explicit Binding(Define define) : define(define), next(first()) { first() = this; }

  static const Binding*& first() {
    static const Binding* head = nullptr;
    return head;
  }
};

}  // namespace fastdiff
