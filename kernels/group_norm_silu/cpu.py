"""The CPU kernels of `group_norm_silu`, `add_group_norm_silu` and `cat_group_norm_silu`, in
csrc/cpu/group_norm_silu.cpp and csrc/cpu/group_norm_silu_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..choose import without
from ..cpu import DTYPES, address, as_dtype_or_float, as_float, cpu_backend, room
from ..views import memory_format_of
from .joined import joined_like, of_two_inputs


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and whether channels are its innermost dimension (or space has size 1)."""
    if x.is_contiguous():
        return x, x.ndim == 2 or x.numel() == x.shape[0] * x.shape[1]
    if memory_format_of(x) is torch.contiguous_format:
        return x.contiguous(), False
    return x, True


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of a dense x."""
    return t.contiguous(memory_format=memory_format_of(x))


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    keep: bool,
    *,
    skip: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return ((y, total), statistics) for x + channel_add + residual; without addends total is x.
    The norm is that of the total followed by the channels of skip.

    statistics: (N, G, 3) fp32, the mean in two parts and 1 / sqrt(v + eps); None unless `keep`.
    """
    x, channels_last = dense(x)
    y = torch.empty_like(x) if skip is None else joined_like(x, skip)
    (n, split), c = x.shape[:2], y.shape[1]
    skip = None if skip is None else laid_out_like(skip.to(x.dtype), x)
    adds = channel_add is not None or residual is not None
    total = torch.empty_like(x) if adds else x
    statistics = room(n, num_groups, 3) if keep else None
    if y.numel() == 0:
        return (y, total), statistics
    if residual is not None:
        residual = laid_out_like(as_dtype_or_float(residual, x.dtype), x)
    weight, bias, scale_shift = as_float(weight), as_float(bias), as_float(scale_shift)
    channel_add = as_float(channel_add)
    compiled.native.group_norm_silu(
        DTYPES[x.dtype], channels_last, activation == "silu",
        residual is not None and residual.dtype is not x.dtype,
        x.data_ptr(), address(skip), address(residual), address(channel_add),
        split if channel_add is not None and channel_add.ndim == 2 else 0,
        total.data_ptr() if adds else 0, y.data_ptr(),
        address(weight), address(bias), address(scale_shift), address(statistics),
        n, c, split, num_groups, y.numel() // (n * c), eps,
    )  # fmt: skip
    return (y, total), statistics


def gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    statistics: Tensor,
    needs: Sequence[bool],
    *,
    skip: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x (the total), weight, bias, channel_add, scale_shift and skip."""
    x, channels_last = dense(x)
    skip = None if skip is None else laid_out_like(skip.to(x.dtype), x)
    n, c = dy.shape[:2]
    dx, dskip = torch.empty_like(x), None if skip is None else torch.empty_like(skip)
    sums = partial(room, zeros=not dy.numel())
    dweight = None if weight is None else sums(c)
    dbias = None if bias is None else sums(c)
    dscale_shift = None if scale_shift is None else sums(n, 2 * c)
    dchannel = sums(n, c) if needs[3] else None
    if dy.numel():
        _run_backward(
            (dy, dtotal, x, skip, dx, dskip), channels_last, activation,
            (weight, bias, scale_shift), statistics, (dweight, dbias, dscale_shift, dchannel),
        )  # fmt: skip
    if dchannel is not None:
        dchannel = dchannel[:, : x.shape[1]]
    if dchannel is not None and channel_add is not None and channel_add.ndim == 1:
        dchannel = dchannel.sum(0)
    found = (dweight, weight), (dbias, bias), (dchannel, channel_add), (dscale_shift, scale_shift)
    return dx, *(None if g is None or p is None else g.to(p.dtype) for g, p in found), dskip


def backward(*args: Any) -> tuple[Tensor | None, ...]:
    """`gradients` without that of skip."""
    return gradients(*args)[:-1]


def _run_backward(
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None],
    channels_last: bool,
    activation: str,
    parameters: tuple[Tensor | None, ...],
    statistics: Tensor,
    sums: tuple[Tensor | None, ...],
) -> None:
    """Fill dx and dskip, the last of the tensors (dy, dtotal, x, skip, dx, dskip), and those fp32
    sums that are given."""
    dy, dtotal, x, skip, dx, dskip = tensors
    n, c = dy.shape[:2]
    dy, dtotal = laid_out_like(dy, x), None if dtotal is None else laid_out_like(dtotal, x)
    filled = [as_float(p) for p in parameters]
    compiled.native.group_norm_silu_backward(
        DTYPES[x.dtype], channels_last, activation == "silu",
        dy.data_ptr(), address(dtotal), x.data_ptr(), address(skip), dx.data_ptr(), address(dskip),
        *map(address, filled), statistics.data_ptr(), *map(address, sums),
        n, c, x.shape[1], statistics.shape[1], dy.numel() // (n * c),
    )  # fmt: skip


_cat_forward, _cat_backward = of_two_inputs(forward, gradients)
CAT = cpu_backend(forward=_cat_forward, backward=_cat_backward)
"""The backend of `cat_group_norm_silu`."""
ADDING = cpu_backend(forward=forward, backward=backward)
"""The backend of `add_group_norm_silu`."""
BACKEND = without(ADDING, slice(4, 6), gradients=slice(3, 4))
