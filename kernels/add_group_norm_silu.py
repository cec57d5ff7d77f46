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

from fastdiff.kernels._group_norm import memory_format_of
from fastdiff.kernels._group_norm_backward import keep_for_backward, norm_gradients
from fastdiff.kernels._triton import register
from fastdiff.kernels.dispatch import check_shape, compute_dtype, define_op
from fastdiff.kernels.group_norm_silu import (
    check_group_norm,
    group_norm_silu_on_triton,
    group_norm_silu_reference,
    norm_forward,
    why_not,
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


add_group_norm_silu_triton = torch.library.custom_op(
    "fastdiff::add_group_norm_silu_triton", norm_forward, mutates_args=()
)
"""(y, total, mean, rstd); at least one of channel_add and residual is a tensor."""


@add_group_norm_silu_triton.register_fake
def _add_group_norm_silu_fake(
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, channel_add, residual, scale_shift, _, activation = inputs
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    parameters = weight, bias, channel_add, scale_shift
    wider = torch.promote_types(*ctx.dtypes)
    keep_for_backward(ctx, output[1], num_groups, parameters, output[2:], activation, wider)


def _differentiate(
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


add_group_norm_silu_triton.register_autograd(_differentiate, setup_context=_keep)


def _on_triton(
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
        return group_norm_silu_on_triton(x, num_groups, *parameters, **options), x
    y, total, _, _ = add_group_norm_silu_triton(
        x, num_groups, *parameters, channel_add, residual, scale_shift, eps, activation
    )
    return y, total


_op = define_op("add_group_norm_silu", add_group_norm_silu_reference)
register(_op, _on_triton, why_not)


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
    check_group_norm(op, x, num_groups, weight, bias, scale_shift, activation)
    check_shape(op, "channel_add", channel_add, tuple(x.shape[:2]), (x.shape[1],))
    check_shape(op, "residual", residual, tuple(x.shape))
    result: tuple[Tensor, Tensor] = _op(
        x,
        num_groups,
        weight,
        bias,
        channel_add=channel_add,
        residual=residual,
        scale_shift=scale_shift,
        eps=eps,
        activation=activation,
    )
    return result
