"""The Triton backends of `group_norm_silu`, `add_group_norm_silu` and `cat_group_norm_silu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..choose import without
from ..triton import triton_backend
from ..views import memory_format_of
from .joined import of_two_inputs
from .triton_backward import backward
from .triton_forward import forward


def _cat_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    *options: Any,
    skip: Tensor,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The concatenation by PyTorch, then the norm: these kernels read one tensor."""
    total = _total(x, channel_add, residual)
    norm = _cat(total, skip), num_groups, weight, bias, None, None, *options
    (y, _), statistics = forward(*norm)
    return (y, total), statistics


def _total(x: Tensor, channel_add: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + channel_add + residual, rounded once, in the memory format of x."""
    if channel_add is None and residual is None:
        return x
    dtype, total = compute_dtype(x), x
    if channel_add is not None:
        channel_add = channel_add.to(dtype).reshape(*channel_add.shape, *[1] * (x.ndim - 2))
        total = total.to(dtype) + channel_add
    if residual is not None:
        total = total + residual.to(dtype if channel_add is not None else residual.dtype)
    return total.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _cat(x: Tensor, skip: Tensor) -> Tensor:
    form = memory_format_of(x)
    return torch.cat([x.contiguous(memory_format=form), skip.to(x.dtype)], dim=1).contiguous(
        memory_format=form
    )


def _cat_gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    *options: Any,
    skip: Tensor,
) -> tuple[Tensor | None, ...]:
    *others, needs = options
    wanted: Sequence[bool] = (True, *needs[1:3], False, False)
    given: tuple[Any, ...] = num_groups, weight, bias, None, *others, wanted
    joined, dweight, dbias, *_ = backward(dy, None, _cat(x, skip), *given)
    assert joined is not None
    dx, dskip = joined.split([x.shape[1], skip.shape[1]], dim=1)
    dx = _total(dx.contiguous(memory_format=memory_format_of(x)), None, dtotal)
    dchannel_add = None
    if needs[3] and channel_add is not None:
        over = [*([] if channel_add.ndim == 2 else [0]), *range(2, dx.ndim)]
        dchannel_add = dx.sum(over, dtype=torch.float32) if over else dx.clone()
        dchannel_add = dchannel_add.to(channel_add.dtype)
    return dx, dweight, dbias, dchannel_add, None, dskip


_forward, _backward = of_two_inputs(_cat_forward, _cat_gradients)
CAT = triton_backend(forward=_forward, backward=_backward)
"""The backend of `cat_group_norm_silu`."""
ADDING = triton_backend(forward=forward, backward=backward)
"""The backend of `add_group_norm_silu`."""
BACKEND = without(ADDING, slice(4, 6), gradients=slice(3, 4))
