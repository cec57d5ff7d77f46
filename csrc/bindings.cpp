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
  info["without_cuda"] = build_info.without_cuda;
  info["sanitizers"] = build_info.sanitizers;
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

// A tensor of heads: its address and strides from sample to sample, row to row, head to head.
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

void geglu(int dtype, Address x, Address y, int64_t rows, int64_t d, int64_t x_stride) {
  run(Geglu{Dtype(dtype), in(x), out(y), rows, d, x_stride});
}

void geglu_backward(int dtype, Address dy, Address x, Address dx, int64_t rows, int64_t d,
                    int64_t dy_stride, int64_t x_stride) {
  run(GegluBackward{Dtype(dtype), in(dy), in(x), out(dx), rows, d, dy_stride, x_stride});
}

void group_norm_silu(int dtype, bool channels_last, bool silu, bool wide_residual, Address x,
                     Address residual, Address channel_add, int64_t channel_add_stride, Address total, Address y,
                     Address weight, Address bias, Address scale_shift, Address stats, int64_t n,
                     int64_t c, int64_t groups, int64_t space, double eps) {
  run(GroupNorm{Dtype(dtype), channels_last, silu, wide_residual, in(x), in(residual),
                pointer<const float>(channel_add), channel_add_stride, out(total), out(y),
                pointer<const float>(weight), pointer<const float>(bias),
                pointer<const float>(scale_shift), pointer<float>(stats), n, c, groups, space, eps});
}

void group_norm_silu_backward(int dtype, bool channels_last, bool silu, Address dy, Address dtotal,
                              Address x, Address dx, Address weight, Address bias,
                              Address scale_shift, Address stats, Address dweight, Address dbias,
                              Address dscale_shift, Address dchannel, int64_t n, int64_t c,
                              int64_t groups, int64_t space) {
  run(GroupNormBackward{Dtype(dtype), channels_last, silu, in(dy), in(dtotal), in(x), out(dx),
                        pointer<const float>(weight), pointer<const float>(bias),
                        pointer<const float>(scale_shift), pointer<const float>(stats),
                        pointer<float>(dweight), pointer<float>(dbias),
                        pointer<float>(dscale_shift), pointer<float>(dchannel), n, c, groups,
                        space});
}

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

void philox_normal(Address seeds, Address out, int64_t n, int64_t elements, uint32_t step,
                   uint32_t stream) {
  run(PhiloxNormal{pointer<const int64_t>(seeds), pointer<float>(out), n, elements, step, stream});
}

// Returns the first sample whose row or indices are out of range, or whose row rescales against
// `rescale`; -1 where there is none, and only then anything is computed.
int64_t sampler_step(int dtype, bool learned, bool rescale, Address x, Address prediction,
                     Address history, Address table, Address rows, Address seeds, Address cond,
                     Address uncond, Address denoised, Address finite, int64_t n,
                     int64_t table_rows, int64_t images, int64_t runs, int64_t length,
                     int64_t image_stride, int64_t run_stride, int64_t stride,
                     int64_t variance_offset, uint32_t stream) {
  const SamplerStep a{Dtype(dtype), learned, pointer<float>(x), in(prediction),
                      pointer<float>(history), pointer<const float>(table),
                      pointer<const int64_t>(rows), pointer<const int64_t>(seeds),
                      pointer<const int64_t>(cond), pointer<const int64_t>(uncond),
                      pointer<float>(denoised), pointer<bool>(finite), n, runs, length,
                      image_stride, run_stride, stride, variance_offset, stream};
  for (int64_t i = 0; i < n; ++i) {
    if (a.rows[i] == -1) continue;
    const int64_t other = a.uncond ? a.uncond[i] : -1, own = a.cond ? a.cond[i] : i;
    if (a.rows[i] < 0 || a.rows[i] >= table_rows || own < 0 || own >= images || other < -1 ||
        other >= images)
      return i;
    if (!rescale && other >= 0 && a.table[a.rows[i] * columns::COUNT + columns::RESCALE] != 0) return i;
  }
  run(a);
  return -1;
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
  m.def("attention", &attention, Release());
  m.def("attention_backward", &attention_backward, Release());
  m.def("geglu", &geglu, Release());
  m.def("geglu_backward", &geglu_backward, Release());
  m.def("group_norm_silu", &group_norm_silu, Release());
  m.def("group_norm_silu_backward", &group_norm_silu_backward, Release());
  m.def("layer_norm", &layer_norm, Release());
  m.def("layer_norm_backward", &layer_norm_backward, Release());
  m.def("philox_normal", &philox_normal, Release());
  m.def("sampler_step", &sampler_step, Release());
}
