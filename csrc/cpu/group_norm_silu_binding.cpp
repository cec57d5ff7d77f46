// Python bindings of the CPU kernels of GroupNorm.
#include "bindings.h"
#include "group_norm_silu.h"

using namespace fastdiff;

namespace {

void group_norm_silu(int dtype, bool channels_last, bool silu, bool wide_residual, Address x,
                     Address skip, Address residual, Address channel_add, int64_t channel_add_stride, Address total, Address y,
                     Address weight, Address bias, Address scale_shift, Address stats, int64_t n,
                     int64_t c, int64_t split, int64_t groups, int64_t space, double eps) {
  run(GroupNorm{Dtype(dtype), channels_last, silu, wide_residual, in(x), in(skip), in(residual),
                pointer<const float>(channel_add), channel_add_stride, out(total), out(y),
                pointer<const float>(weight), pointer<const float>(bias),
                pointer<const float>(scale_shift), pointer<float>(stats), n, c, split, groups, space,
                eps});
}

void group_norm_silu_backward(int dtype, bool channels_last, bool silu, Address dy, Address dtotal,
                              Address x, Address skip, Address dx, Address dskip, Address weight, Address bias,
                              Address scale_shift, Address stats, Address dweight, Address dbias,
                              Address dscale_shift, Address dchannel, int64_t n, int64_t c,
                              int64_t split, int64_t groups, int64_t space) {
  run(GroupNormBackward{Dtype(dtype), channels_last, silu, in(dy), in(dtotal), in(x), in(skip), out(dx),
                        out(dskip),
                        pointer<const float>(weight), pointer<const float>(bias),
                        pointer<const float>(scale_shift), pointer<const float>(stats),
                        pointer<float>(dweight), pointer<float>(dbias),
                        pointer<float>(dscale_shift), pointer<float>(dchannel), n, c, split, groups,
                        space});
}

const Binding group_norm_silu_binding([](py::module_& m) {
  m.def("group_norm_silu", &group_norm_silu, Release());
  m.def("group_norm_silu_backward", &group_norm_silu_backward, Release());
});

}  // namespace
