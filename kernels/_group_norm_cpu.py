"""The native CPU kernels of `group_norm_silu` and `add_group_norm_silu`, in
csrc/group_norm_silu.cpp."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastdiff.kernels import extension
from fastdiff.kernels._group_norm import memory_format_of


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and True where its channels lie last (or there is one position only)."""
    if x.is_contiguous():
        return x, x.ndim == 2 or x.numel() == x.shape[0] * x.shape[1]
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
    stats = extension.room(n, num_groups, 3) if for_backward else None
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
    channels = partial(extension.room, zeros=not x.numel())
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
