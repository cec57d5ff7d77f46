"""GroupNorm, optional scale and shift (FiLM), SiLU: the norm of every residual block.

    m, v   = mean and biased variance of x over the C/G channels of a group and all of space
    n      = (x - m) / sqrt(v + eps) * weight + bias          Wu & He 2018, eq. 1-2 and 7
    f      = n * (1 + scale) + shift                          Dhariwal & Nichol 2021, section 3.1
    y      = f * sigmoid(f)                                   or f with activation "none"

Bytes that must move: x once in, y once out, so 2 * N * C * H * W * itemsize; weight, bias,
scale_shift and statistics are N * C numbers. The Triton implementation has two regimes, by bytes:

    small   some groups of one sample fit in a program's registers: one launch, 2 trips
    large   moments per (n, chunk of space, c) -> finalize to one scale and shift per (n, c) ->
            apply: 3 trips, of which the second read finds the L2 where a sample fits there

The CUDA kernels go 2 trips where a group fits into the shared memory of a block or, on sm_90, of a
cluster of up to 16, else 3 (csrc/norm_plan.h); backward 3 or 5.

The backward pass keeps x and the statistics (2 * N * G numbers) and computes the rest anew: x and
dy in, dx out, 3 trips when small and 5 when large. To a large tensor's trips come the partial sums,
20 (backward 16) bytes per channel and chunk of 128 or more positions, and the table of each
channel's scale, shift and mean, 12 (backward 20) bytes per channel and tile of the last kernel, 64
(32) positions; these are reads and writes of the caches.

Statistics are fp32 (fp64 for fp64 input), whatever the dtype of x. The reference goes through a
contiguous copy: PyTorch's CPU kernel for channels_last takes the variance as E[x^2] - E[x]^2 (at
mean 100 and std 0.01 the result is wrong by 20, where the right one lies within 5), and its
backward pass crashes the process when x needs no gradient (torch 2.13).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import _cuda, _triton, extension
from fastdiff.kernels._group_norm import memory_format_of
from fastdiff.kernels._group_norm_backward import keep_for_backward, norm_gradients
from fastdiff.kernels._group_norm_forward import norm_forward
from fastdiff.kernels.dispatch import check_floating, check_shape, compute_dtype, define_op

ACTIVATIONS = ("silu", "none")


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The op in plain PyTorch; see `group_norm_silu`."""
    if x.numel() == 0:
        return x.clone()
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    centered = _subtract_mean(x.to(dtype).contiguous(), num_groups)
    y = torch.group_norm(centered, num_groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = (_over_space(half, x) for half in scale_shift.to(dtype).chunk(2, dim=1))
        y = torch.addcmul(shift, y, 1 + scale)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _subtract_mean(x: Tensor, num_groups: int) -> Tensor:
    """Subtract from every group its mean.

    GroupNorm and its gradient do not change when a group is shifted, so the shift is a constant to
    autograd. It keeps the digits where the mean is large: the mean has an error of its own, and
    PyTorch's dweight is a difference of two sums that grow with it.
    """
    size = x.shape[1] // num_groups
    mean = x.detach().reshape(len(x), num_groups, -1).mean(2)  # (N, G)
    return x - _over_space(mean.repeat_interleave(size, dim=1), x)


def _over_space(numbers: Tensor, x: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, 1, ...), to broadcast over the space of x."""
    return numbers.reshape(*numbers.shape, *[1] * (x.ndim - 2))


def check_group_norm(
    op: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    activation: str,
) -> None:
    """The checks shared by `group_norm_silu` and `add_group_norm_silu`. Raises ValueError."""
    check_floating(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    n, c = x.shape[:2]
    if num_groups < 1 or c % num_groups:
        raise ValueError(
            f"{op}: num_groups must divide the {c} channels of x, got {num_groups}; "
            "choose a divisor of the channel count"
        )
    check_shape(op, "weight", weight, (c,))
    check_shape(op, "bias", bias, (c,))
    check_shape(op, "scale_shift", scale_shift, (n, 2 * c))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


# The CUDA kernels, whose launchers are in csrc/group_norm_silu.cu

_cuda.declare("group_norm_plan", "iiiqiqiiqiip")
_cuda.declare("group_norm_backward_plan", "iiiqiqiiqiip")
_cuda.declare("group_norm_silu", "ipiiqiqippppppipipipiqppfi")
_cuda.declare("group_norm_silu_backward", "ipiiqiqippppppppipipipppi")

ON_CHIP: int | None = None
"""Bytes of shared memory that a block of the CUDA kernel may fill; None: what the device has."""
CLUSTER: int | None = None
"""Blocks that share a sample's groups through a cluster's shared memory; None: as planned."""


@dataclass(frozen=True)
class _CudaLayout:
    """x as the CUDA kernels take it: dense, (N, S, C) with channels_last, else (N, C, S)."""

    x: Tensor
    n: int
    c: int
    s: int
    channels_last: bool

    def dense(self, t: Tensor) -> Tensor:
        """A tensor of x's shape in its layout and dtype."""
        return t.to(self.x.dtype).contiguous(memory_format=memory_format_of(self.x))

    def like(self, t: Tensor | None) -> Tensor | None:
        """`dense` of a tensor that may be None."""
        return None if t is None else self.dense(t)

    def plan(self, groups: int, *tensors: Tensor | None, backward: bool = False) -> Any:
        """How the kernels cut it up, by ON_CHIP and CLUSTER (NCHW has no clusters backward)."""
        limit = -1 if ON_CHIP is None else ON_CHIP
        cluster = 0 if CLUSTER is None or (backward and not self.channels_last) else CLUSTER
        device, dtype = self.x.device.index or 0, _cuda.DTYPES[self.x.dtype]
        sizes = self.n, self.c, self.s, groups, _cuda.aligned(self.x, *tensors)
        name = "group_norm_backward_plan" if backward else "group_norm_plan"
        return cuda_plan(
            name, device, dtype, self.channels_last, *sizes, limit, cluster, cluster > 0
        )


@lru_cache(4096)
def cuda_plan(name: str, *arguments: int) -> Any:
    """The fields of csrc/norm_plan.h's NormPlan, by "group_norm_plan" or the backward pass's.

    arguments: the device, a code of DTYPES, channels_last, N, C, S, the groups, whether all is
    aligned, and limits: see csrc/group_norm_silu.cu.

    Raises:
        RuntimeError: a cluster of the size asked for does not hold a group.
    """
    fields = (ctypes.c_int64 * 10)()
    error = _cuda.ask(name, *arguments, ctypes.addressof(fields))
    if error is not None:
        raise RuntimeError(f"{name}{arguments}: {error}")
    return fields


def _cuda_layout(x: Tensor) -> _CudaLayout:
    form = memory_format_of(x)
    x = x.contiguous(memory_format=form)
    n, c = x.shape[:2]
    s = math.prod(x.shape[2:])
    return _CudaLayout(x, n, c, s, form != torch.contiguous_format or s == 1)


def _dense(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else p.contiguous() for p in parameters)


def norm_cuda(
    x: Tensor,
    num_groups: int,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    silu: bool,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the total (x itself without `add`) and the statistics (N, G, 3).

    parameters: weight, bias, scale_shift.
    """
    weight, bias, scale_shift = parameters
    _cuda.check_devices(
        *("add_group_norm_silu" if add else "group_norm_silu", x),
        weight=weight, bias=bias, scale_shift=scale_shift,
        channel_add=channel_add, residual=residual,
    )  # fmt: skip
    layout = _cuda_layout(x)
    x = layout.x
    y = torch.empty_like(x)
    total = torch.empty_like(x) if add else x
    stats = torch.empty(layout.n, num_groups, 3, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, total, stats
    weight, bias, scale_shift, channel_add = _dense(*parameters, channel_add)
    residual = layout.like(residual)
    plan = layout.plan(num_groups, y, total, residual)
    workspace = torch.empty(plan[8], dtype=torch.float32, device=x.device)
    _cuda.launch(
        "group_norm_silu", x, _cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, layout.c, layout.s, num_groups, ctypes.addressof(plan),
        x.data_ptr(), y.data_ptr(), stats.data_ptr(), workspace.data_ptr(),
        *_cuda.parameter(weight), *_cuda.parameter(bias), *_cuda.parameter(scale_shift),
        *_cuda.parameter(channel_add),
        layout.c if channel_add is not None and channel_add.ndim == 2 else 0,
        _cuda.address(residual), total.data_ptr() if add else None, eps, silu,
    )  # fmt: skip
    return y, total, stats


def norm_backward_cuda(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    silu: bool,
    *,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (with dtotal added), and fp32 dweight (C,), dbias (C,), dscale_shift (N, 2C).

    dscale_shift is (0,) where there is no scale_shift.
    """
    layout = _cuda_layout(x)
    x, c, groups = layout.x, layout.c, stats.shape[1]
    dx = torch.empty_like(x)
    dweight, dbias = (torch.zeros(c, dtype=torch.float32, device=x.device) for _ in range(2))
    weight, bias, scale_shift = _dense(*parameters)
    film = 0 if scale_shift is None else scale_shift.numel()
    dscale_shift = torch.zeros(film, dtype=torch.float32, device=x.device)
    if scale_shift is not None:
        dscale_shift = dscale_shift.view(scale_shift.shape)
    if x.numel() == 0:
        return dx, dweight, dbias, dscale_shift
    dy, dtotal = layout.dense(dy), layout.like(dtotal)
    plan = layout.plan(groups, dy, dtotal, dx, backward=True)
    numbers = plan[8] + 2 * layout.n * (c + groups)
    workspace = torch.empty(numbers, dtype=torch.float32, device=x.device)
    _cuda.launch(
        "group_norm_silu_backward", x, _cuda.DTYPES[x.dtype], layout.channels_last,
        layout.n, c, layout.s, groups, ctypes.addressof(plan),
        dy.data_ptr(), x.data_ptr(), _cuda.address(dtotal), dx.data_ptr(), stats.data_ptr(),
        workspace.data_ptr(), *_cuda.parameter(weight), *_cuda.parameter(bias),
        *_cuda.parameter(scale_shift), dweight.data_ptr(), dbias.data_ptr(),
        dscale_shift.data_ptr() if film else None, silu,
    )  # fmt: skip
    return dx, dweight, dbias, dscale_shift


@torch.library.custom_op("fastdiff::group_norm_silu_cuda", mutates_args=())
def _group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, _, stats = norm_cuda(x, num_groups, (weight, bias, scale_shift), eps, silu)
    return y, stats


@_group_norm_silu_cuda.register_fake
def _group_norm_silu_cuda_fake(
    x: Tensor, num_groups: int, *rest: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    return y, x.new_empty(len(x), num_groups, 3, dtype=torch.float32)


@torch.library.custom_op("fastdiff::group_norm_silu_backward_cuda", mutates_args=())
def norm_backward_cuda_op(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    dtotal: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_backward_cuda` as PyTorch knows it."""
    parameters = (weight, bias, scale_shift)
    return norm_backward_cuda(dy, x, stats, parameters, silu, dtotal=dtotal)


@norm_backward_cuda_op.register_fake
def _norm_backward_cuda_fake(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    dtotal: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format_of(x))
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    film = (0,) if scale_shift is None else scale_shift.shape
    return dx, dweight, dbias, x.new_empty(film, dtype=torch.float32)


def parameter_gradients(
    parameters: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Each gradient in its parameter's dtype; None where there is no parameter."""
    return tuple(
        None if p is None else g.to(p.dtype) for p, g in zip(parameters, gradients, strict=True)
    )


def _keep_cuda(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, bias, scale_shift, _, ctx.silu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, bias, scale_shift)


def _backward_cuda(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, stats, *parameters = ctx.saved_tensors
    dx, *gradients = norm_backward_cuda_op(dy, x, stats, *parameters, None, ctx.silu)
    return dx, None, *parameter_gradients(tuple(parameters), tuple(gradients)), None, None


_group_norm_silu_cuda.register_autograd(_backward_cuda, setup_context=_keep_cuda)


def _plain_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    return norm_cuda(x, num_groups, (weight, bias, scale_shift), eps, activation == "silu")[0]


def group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The op on the CUDA kernels, as PyTorch knows it; see `group_norm_silu`."""
    silu = activation == "silu"
    y: Tensor = _group_norm_silu_cuda(x, num_groups, weight, bias, scale_shift, eps, silu)[0]
    return y


# The Triton kernels, which are in _group_norm_forward.py and _group_norm_backward.py


def _group_norm_silu_triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_forward(
        x, num_groups, weight, bias, None, None, scale_shift, eps, activation
    )
    return y, mean, rstd


group_norm_silu_triton = torch.library.custom_op(
    "fastdiff::group_norm_silu_triton", _group_norm_silu_triton, mutates_args=()
)


@group_norm_silu_triton.register_fake
def _group_norm_silu_triton_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format_of(x)), mean, rstd


def _keep_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, scale_shift, _, activation = inputs
    parameters = weight, bias, None, scale_shift
    keep_for_backward(ctx, x, num_groups, parameters, output[1:], activation, x.dtype)


def _backward_triton(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [*(ctx.needs_input_grad[i] for i in (2, 3, 4)), False]
    dx, dweight, dbias, dscale_shift, _none = norm_gradients(ctx, dy, None, wanted)
    return dx, None, dweight, dbias, dscale_shift, None, None


group_norm_silu_triton.register_autograd(_backward_triton, setup_context=_keep_triton)


def plain_triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """`group_norm_silu` by the Triton kernels."""
    y: Tensor = group_norm_silu_triton(x, num_groups, weight, bias, scale_shift, eps, activation)[0]
    return y


def why_not_triton(
    x: Tensor,
    num_groups: int,
    *parameters: Tensor | None,
    **options: Any,
) -> str | None:
    """What stands against the Triton kernels of both norms, or None."""
    tensors = (t for t in options.values() if isinstance(t, Tensor))
    return _triton.why_not(x, *parameters, *tensors)


_op = define_op("group_norm_silu", group_norm_silu_reference)
_cuda.register(_op, _plain_cuda, group_norm_silu_cuda)
_triton.register(_op, plain_triton, why_not_triton)


# CPU


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and True where its channels lie last (or there is one position only)."""
    if x.is_contiguous():
        return x, x.ndim == 2 or x.shape[2:].numel() == 1
    if memory_format_of(x) is torch.contiguous_format:
        return x.contiguous(), False
    return x, True


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of a dense x."""
    return t.contiguous(memory_format=memory_format_of(x))


def run_native(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
    *,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, total, stats): total is x where there is nothing to add; stats are for the backward
    pass, (N, G, 3) fp32."""
    x, channels_last = dense(x)
    n, c = x.shape[:2]
    y = torch.empty_like(x)
    adds = channel_add is not None or residual is not None
    total = torch.empty_like(x) if adds else x
    stats = torch.empty(n, num_groups, 3) if for_backward else None
    if x.numel() == 0:
        return y, total, stats
    if residual is not None:
        residual = laid_out_like(extension.as_dtype_or_float(residual, x.dtype), x)
    as_float, address = extension.as_float, extension.address
    weight, bias, scale_shift = as_float(weight), as_float(bias), as_float(scale_shift)
    channel_add = as_float(channel_add)
    extension.native.group_norm_silu(
        extension.DTYPES[x.dtype],
        channels_last,
        silu,
        residual is not None and residual.dtype is not x.dtype,
        x.data_ptr(),
        address(residual),
        address(channel_add),
        c if channel_add is not None and channel_add.ndim == 2 else 0,
        total.data_ptr() if adds else 0,
        y.data_ptr(),
        address(weight),
        address(bias),
        address(scale_shift),
        address(stats),
        n,
        c,
        num_groups,
        x.numel() // (n * c),
        eps,
    )
    return y, total, stats


def run_native_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    stats: Tensor,
    silu: bool,
    wants_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dscale_shift, dchannel) of the total x; all but dx fp32, and empty where
    not wanted."""
    x, channels_last = dense(x)
    n, c = x.shape[:2]
    dx = torch.empty_like(x)
    channels = torch.empty if x.numel() else torch.zeros
    dweight = channels(0 if weight is None else c)
    dbias = channels(0 if bias is None else c)
    dscale_shift = channels(0 if scale_shift is None else n, 2 * c)
    dchannel = channels(n if wants_channels else 0, c)
    if x.numel() == 0:
        return dx, dweight, dbias, dscale_shift, dchannel
    dy, dtotal = laid_out_like(dy, x), None if dtotal is None else laid_out_like(dtotal, x)
    weight, bias, scale_shift = map(extension.as_float, (weight, bias, scale_shift))
    address = extension.address
    extension.native.group_norm_silu_backward(
        extension.DTYPES[x.dtype],
        channels_last,
        silu,
        dy.data_ptr(),
        address(dtotal),
        x.data_ptr(),
        dx.data_ptr(),
        address(weight),
        address(bias),
        address(scale_shift),
        stats.data_ptr(),
        address(dweight),
        address(dbias),
        address(dscale_shift),
        address(dchannel),
        n,
        c,
        stats.shape[1],
        x.numel() // (n * c),
    )
    return dx, dweight, dbias, dscale_shift, dchannel


def dense_like(x: Tensor) -> Tensor:
    """What `run_native` allocates for y."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


@torch.library.custom_op("fastdiff::group_norm_silu_cpu", mutates_args=(), device_types="cpu")
def _norm_cpu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, _, stats = run_native(
        x, num_groups, weight, bias, None, None, scale_shift, eps, silu, for_backward=True
    )
    assert stats is not None
    return y, stats


@_norm_cpu.register_fake
def _(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    stats = torch.empty(x.shape[0], num_groups, 3, dtype=torch.float32, device=x.device)
    return dense_like(x), stats


@torch.library.custom_op(
    "fastdiff::group_norm_silu_backward_cpu", mutates_args=(), device_types="cpu"
)
def norm_backward_cpu(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    stats: Tensor,
    silu: bool,
    wants_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return run_native_backward(
        dy, dtotal, x, weight, bias, scale_shift, stats, silu, wants_channels
    )


@norm_backward_cpu.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    stats: Tensor,
    silu: bool,
    wants_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c = x.shape[:2]
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    return (
        dense_like(x),
        empty(0 if weight is None else c),
        empty(0 if bias is None else c),
        empty(0 if scale_shift is None else n, 2 * c),
        empty(n if wants_channels else 0, c),
    )


def as_dtype_of(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A parameter's fp32 gradient as its own dtype; None without a parameter."""
    return None if parameter is None else gradient.to(parameter.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, scale_shift, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale_shift, output[1])


def _gradient(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale_shift, stats = ctx.saved_tensors
    if torch.is_grad_enabled():

        def reference(x: Tensor, w: Any, b: Any, s: Any) -> Tensor:
            activation = "silu" if ctx.silu else "none"
            return group_norm_silu_reference(
                x, ctx.num_groups, w, b, scale_shift=s, eps=ctx.eps, activation=activation
            )

        found = extension.reference_gradients(reference, (x, weight, bias, scale_shift), (dy,))
    else:
        dx, dweight, dbias, dscale_shift, _ = norm_backward_cpu(
            dy, None, x, weight, bias, scale_shift, stats, ctx.silu, False
        )
        found = (
            dx,
            as_dtype_of(dweight, weight),
            as_dtype_of(dbias, bias),
            as_dtype_of(dscale_shift, scale_shift),
        )
    return found[0], None, *found[1:], None, None


_norm_cpu.register_autograd(_gradient, setup_context=_keep)


def _native(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    silu = activation == "silu"
    return run_native(x, num_groups, weight, bias, None, None, scale_shift, eps, silu)[0]


def _registered(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    y: Tensor = _norm_cpu(x, num_groups, weight, bias, scale_shift, eps, activation == "silu")[0]
    return y


extension.register(_op, _native, _registered)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """GroupNorm with optional scale and shift, then SiLU: ``silu(GN(x) * (1 + scale) + shift)``.

    Args:
        x: (N, C, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last in gives channels_last
            out.
        num_groups: G, a divisor of C.
        weight, bias: (C,), any float dtype, or None for 1 and 0.
        scale_shift: (N, 2C) = [scale | shift], the FiLM projection as it comes out, or None.
        eps: added to the variance.
        activation: "silu" or "none".

    Returns:
        (N, C, *spatial) in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or option that does not fit.

    Wu & He 2018 (Group Normalization), eq. 1-2; scale and shift: Dhariwal & Nichol 2021, section
    3.1.
    """
    check_group_norm("group_norm_silu", x, num_groups, weight, bias, scale_shift, activation)
    result: Tensor = _op(
        x, num_groups, weight, bias, scale_shift=scale_shift, eps=eps, activation=activation
    )
    return result
