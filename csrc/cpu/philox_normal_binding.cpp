// Python bindings of the CPU kernel of `philox_normal`.
#include "bindings.h"
#include "philox_normal.h"
#include "philox.h"

using namespace fastdiff;

namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  const Words words = philox4x32({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
  return {words.w[0], words.w[1], words.w[2], words.w[3]};
}

void philox_normal(Address seeds, Address out, int64_t n, int64_t elements, uint32_t step,
                   uint32_t stream) {
  run(PhiloxNormal{pointer<const int64_t>(seeds), pointer<float>(out), n, elements, step, stream});
}

const Binding philox_normal_binding([](py::module_& m) {
  m.def("philox4x32", &philox, "Ten rounds of Philox on four words, with a key of two words.");
  m.def("philox_normal", &philox_normal, Release());
});

}  // namespace
