// Python bindings of the CPU kernels of `attention`.
#include "bindings.h"
#include "attention.h"

using namespace fastdiff;

namespace {

// A tensor of heads: its address, and its strides over samples, rows and heads.
using Strided = std::array<int64_t, 4>;
Heads heads(const Strided& x) { return {in(Address(x[0])), x[1], x[2], x[3]}; }

// q, k, v, extra_k, extra_v; mask: its address, whether it is bytes, and four strides; sizes: n, length,
// heads, keys, extra_keys, d, threads.
Attention attention_call(int dtype, const std::array<Strided, 5>& x, const std::array<int64_t, 6>& mask,
                         Address result, Address sums, const std::array<int64_t, 7>& sizes, double scale) {
  return {Dtype(dtype), heads(x[0]), heads(x[1]), heads(x[2]), heads(x[3]), heads(x[4]),
          {in(Address(mask[0])), mask[1] != 0, mask[2], mask[3], mask[4], mask[5]},
          out(result), pointer<float>(sums), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
          sizes[6], scale};
}

void attention(int dtype, const std::array<Strided, 5>& x, const std::array<int64_t, 6>& mask,
               Address result, Address sums, const std::array<int64_t, 7>& sizes, double scale) {
  run(attention_call(dtype, x, mask, result, sums, sizes, scale));
}

// gradients: of q, k, v, extra_k, extra_v.
void attention_backward(int dtype, const std::array<Strided, 5>& x, const std::array<int64_t, 6>& mask,
                        Address result, Address sums, const std::array<int64_t, 7>& sizes, double scale,
                        const Strided& dout, const std::array<Address, 5>& gradients, Address dscores) {
  run(AttentionBackward{attention_call(dtype, x, mask, result, sums, sizes, scale), heads(dout),
                        out(gradients[0]), out(gradients[1]), out(gradients[2]), out(gradients[3]),
                        out(gradients[4]), pointer<float>(dscores)});
}

const Binding attention_binding([](py::module_& m) {
  m.def("attention", &attention, Release());
  m.def("attention_backward", &attention_backward, Release());
});

}  // namespace
