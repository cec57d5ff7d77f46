"""Convolution bias, time embedding and residual added up, then GroupNorm and SiLU.

    total = x + channel_add + residual          rounded to the dtype of x
    y     = group_norm_silu(total, ...)

The convolution's bias and the time embedding are both constant over space, so the caller adds them
up first (N * C numbers) and passes one `channel_add`. The sum comes back since the next residual
adds to it.

Bytes that must move: x and residual in, total and y out, 4 * N * C * H * W * itemsize (3 without
residual). Eager moves 2 or 3 per addition on top of the norm. The kernels are those of
`group_norm_silu`: in its large regime total is read once more (5 trips, 4 without residual). The
backward pass reads total, dy and dtotal and writes one gradient for x and residual, 4 trips when
small and 6 when large (7 where channel_add wants its gradient, for the sum of dtotal).

y is the norm of the *rounded* total: that is the tensor the backward pass has, so both see the same
numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import _cuda, _triton, extension
from fastdiff.kernels._group_norm import memory_format_of
from fastdiff.kernels._group_norm_backward import keep_for_backward, norm_gradients
from fastdiff.kernels._group_norm_cpu import (
    as_dtype_of,
    dense_like,
    norm_backward_cpu,
    run_native,
)
from fastdiff.kernels._group_norm_cuda import (
    norm_backward_cuda_op,
    norm_cuda,
    parameter_gradients,
    why_not_cuda,
)
from fastdiff.kernels._group_norm_forward import norm_forward
from fastdiff.kernels.dispatch import check_shape, compute_dtype, define_op
from fastdiff.kernels.group_norm_silu import (
    check_group_norm,
    group_norm_silu,
    group_norm_silu_reference,
    plain_triton,
    why_not_triton,
)


def add_group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `add_group_norm_silu`."""
    dtype = compute_dtype(x)
    total = x.to(dtype)
    if channel_add is not None:
        total = total + channel_add.to(dtype).reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    if residual is not None:
        total = total + residual.to(dtype)
    total = total.to(x.dtype)
    y = group_norm_silu_reference(
        total, num_groups, weight, bias, scale_shift=scale_shift, eps=eps, activation=activation
    )
    return y, total


# The CUDA kernels, whose launchers are in csrc/group_norm_silu.cu


@torch.library.custom_op("fastdiff::add_group_norm_silu_cuda", mutates_args=())
def _add_group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (weight, bias, scale_shift)
    return norm_cuda(
        x, num_groups, parameters, eps, silu, channel_add=channel_add, residual=residual, add=True
    )


@_add_group_norm_silu_cuda.register_fake
def _add_group_norm_silu_cuda_fake(
    x: Tensor, num_groups: int, *rest: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, total = (torch.empty_like(x, memory_format=memory_format_of(x)) for _ in range(2))
    return y, total, x.new_empty(len(x), num_groups, 3, dtype=torch.float32)


def _keep_cuda(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, bias, scale_shift, channel_add, residual, _, ctx.silu = inputs
    _, total, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.channel_add = None if channel_add is None else (channel_add.ndim, channel_add.dtype)
    ctx.residual = None if residual is None else residual.dtype
    ctx.save_for_backward(total, stats, weight, bias, scale_shift)


def _backward_cuda(ctx: Any, dy: Tensor, dtotal: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    total, stats, *parameters = ctx.saved_tensors
    dx, *gradients = norm_backward_cuda_op(dy, total, stats, *parameters, dtotal, ctx.silu)
    dchannel_add = None
    if ctx.channel_add is not None:
        ndim, dtype = ctx.channel_add
        over = [*([] if ndim == 2 else [0]), *range(2, dx.ndim)]
        dchannel_add = dx.sum(over, dtype=torch.float32).to(dtype) if over else dx.to(dtype)
    dresidual = None if ctx.residual is None else dx.to(ctx.residual)
    filled = parameter_gradients(tuple(parameters), tuple(gradients))
    return dx, None, *filled, dchannel_add, dresidual, None, None


_add_group_norm_silu_cuda.register_autograd(_backward_cuda, setup_context=_keep_cuda)


def add_group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The op on the CUDA kernels, as PyTorch knows it; see `add_group_norm_silu`."""
    silu = activation == "silu"
    y, total, _ = _add_group_norm_silu_cuda(
        x, num_groups, weight, bias, scale_shift, channel_add, residual, eps, silu
    )
    return y, total


def _plain_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    **addends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parameters, silu = (weight, bias, scale_shift), activation == "silu"
    return norm_cuda(x, num_groups, parameters, eps, silu, add=True, **addends)[:2]


# The Triton kernels, which are those of group_norm_silu

add_group_norm_silu_triton = torch.library.custom_op(
    "fastdiff::add_group_norm_silu_triton", norm_forward, mutates_args=()
)
"""(y, total, mean, rstd); at least one of channel_add and residual is a tensor."""


@add_group_norm_silu_triton.register_fake
def _add_group_norm_silu_triton_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total = (torch.empty_like(x, memory_format=memory_format_of(x)) for _ in range(2))
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return y, total, mean, rstd


def _keep_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, channel_add, residual, scale_shift, _, activation = inputs
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    parameters = weight, bias, channel_add, scale_shift
    wider = torch.promote_types(*ctx.dtypes)
    keep_for_backward(ctx, output[1], num_groups, parameters, output[2:], activation, wider)


def _backward_triton(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[i] for i in (2, 3, 6, 4)]
    gradients = norm_gradients(ctx, dy, dtotal, wanted)
    passed, dweight, dbias, dscale_shift, dchannel_add = gradients
    dx, dresidual = (
        passed.to(dtype) if need and passed is not None else None
        for dtype, need in zip(ctx.dtypes, (needs[0], needs[5]), strict=True)
    )
    return dx, None, dweight, dbias, dchannel_add, dresidual, dscale_shift, None, None


add_group_norm_silu_triton.register_autograd(_backward_triton, setup_context=_keep_triton)


def _add_on_triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    parameters = weight, bias
    if channel_add is None and residual is None:
        options: dict[str, Any] = {"scale_shift": scale_shift, "eps": eps, "activation": activation}
        return plain_triton(x, num_groups, *parameters, **options), x
    y, total, _, _ = add_group_norm_silu_triton(
        x, num_groups, *parameters, channel_add, residual, scale_shift, eps, activation
    )
    return y, total


_op = define_op("add_group_norm_silu", add_group_norm_silu_reference)
_cuda.register(_op, _plain_cuda, add_group_norm_silu_cuda, why_not_cuda)
_triton.register(_op, _add_on_triton, why_not_triton)


# CPU: the kernel of group_norm_silu, which takes addends


@torch.library.custom_op("fastdiff::add_group_norm_silu_cpu", mutates_args=(), device_types="cpu")
def _add_norm_cpu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, stats = run_native(
        *(x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, silu),
        for_backward=True,
    )
    assert stats is not None
    return y, total, stats


@_add_norm_cpu.register_fake
def _(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = torch.empty(x.shape[0], num_groups, 3, dtype=torch.float32, device=x.device)
    return dense_like(x), dense_like(x), stats


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, channel_add, residual, scale_shift, ctx.eps, ctx.silu = inputs
    _, total, stats = output
    ctx.added = channel_add is not None
    ctx.residual_dtype = None if residual is None else residual.dtype
    kept = channel_add if channel_add is not None else x[:0]
    ctx.save_for_backward(total, weight, bias, scale_shift, stats, kept)


def _gradient(ctx: Any, dy: Tensor, dtotal: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, bias, scale_shift, stats, channel_add = ctx.saved_tensors
    added = ctx.added
    if torch.is_grad_enabled():

        def reference(total: Tensor, w: Any, b: Any, s: Any) -> Tensor:
            activation = "silu" if ctx.silu else "none"
            return group_norm_silu_reference(
                total, ctx.num_groups, w, b, scale_shift=s, eps=ctx.eps, activation=activation
            )

        found = extension.reference_gradients(reference, (total, weight, bias, scale_shift), (dy,))
        assert found[0] is not None
        dx = found[0] + dtotal
        dchannel = dx.flatten(2).sum(2) if dx.ndim > 2 else dx
        parameters = found[1:]
    else:
        dx, dweight, dbias, dscale_shift, dchannel = norm_backward_cpu(
            dy, dtotal, total, weight, bias, scale_shift, stats, ctx.silu, added
        )
        parameters = (
            as_dtype_of(dweight, weight),
            as_dtype_of(dbias, bias),
            as_dtype_of(dscale_shift, scale_shift),
        )
    dweight, dbias, dscale_shift = parameters
    dadd = None
    if added:
        dadd = (dchannel.sum(0) if channel_add.ndim == 1 else dchannel).to(channel_add.dtype)
    dresidual = None if ctx.residual_dtype is None else dx.to(ctx.residual_dtype)
    return dx, None, dweight, dbias, dadd, dresidual, dscale_shift, None, None


_add_norm_cpu.register_autograd(_gradient, setup_context=_keep)


def _native(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    silu = activation == "silu"
    return run_native(x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, silu)[
        :2
    ]


def _registered(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    if channel_add is None and residual is None:  # an op must not return its input
        y = group_norm_silu(
            *(x, num_groups, weight, bias),
            scale_shift=scale_shift, eps=eps, activation=activation,
        )  # fmt: skip
        return y, x
    silu = activation == "silu"
    y, total, _ = _add_norm_cpu(
        x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, silu
    )
    return y, total


extension.register(_op, _native, _registered)


def add_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Add, then norm: ``total = x + channel_add + residual``, ``y = group_norm_silu(total, ...)``.

    Args:
        x: (N, C, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last in gives channels_last
            out.
        num_groups, weight, bias, scale_shift, eps, activation: as in `group_norm_silu`.
        channel_add: (N, C) or (C,), added to every position, or None.
        residual: the shape of x, or None.

    Returns:
        (y, total), both (N, C, *spatial) in the dtype of x; the sum is taken in fp32 and rounded
        once. With nothing to add `total` may be x itself. Differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or option that does not fit.
    """
    op = "add_group_norm_silu"
    check_group_norm(op, x, num_groups, weight, bias, scale_shift, activation, eps)
    check_shape(op, "channel_add", channel_add, tuple(x.shape[:2]), (x.shape[1],))
    check_shape(op, "residual", residual, tuple(x.shape))
    options = {
        "channel_add": channel_add,
        "residual": residual,
        "scale_shift": scale_shift,
        "eps": eps,
        "activation": activation,
    }
    result: tuple[Tensor, Tensor] = _op.run((x, num_groups, weight, bias), options)
    return result
