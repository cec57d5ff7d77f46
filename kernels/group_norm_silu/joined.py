"""What the backends of `cat_group_norm_silu` share: they are those of `add_group_norm_silu`, which
take the second input as ``skip``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..views import memory_format_of


def joined_like(x: Tensor, skip: Tensor) -> Tensor:
    """An empty tensor for the channels of both, in the dtype and memory format of x."""
    shape = x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def of_sum(dtotal: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient of `total`; None if nothing was added and the op returned an empty tensor."""
    return None if dtotal is None or dtotal.ndim != x.ndim else dtotal


def of_two_inputs(
    forward: Callable[..., Any], gradients: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of a backend of `cat_group_norm_silu`.

    Args:
        forward: of `add_group_norm_silu`'s backend, with a keyword ``skip``.
        gradients: its backward pass, with a keyword ``skip``; returns the gradient of skip last.
    """

    def cat_forward(
        x: Tensor,
        skip: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_add: Tensor | None,
        residual: Tensor | None,
        eps: float,
        keep: bool,
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        options = None, eps, "silu", keep
        (y, total), statistics = forward(
            x, num_groups, weight, bias, channel_add, residual, *options, skip=skip
        )
        adds = channel_add is not None or residual is not None
        return (y, total if adds else x.new_empty(0)), statistics

    def cat_backward(
        dy: Tensor,
        dtotal: Tensor | None,
        x: Tensor,
        skip: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_add: Tensor | None,
        residual: None,
        eps: float,
        statistics: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        norm = x, num_groups, weight, bias, channel_add, None, None, eps, "silu", statistics
        dx, dweight, dbias, dchannel_add, _, dskip = gradients(
            dy, of_sum(dtotal, x), *norm, (needs[0], *needs[2:], False), skip=skip
        )
        if dskip is not None:
            dskip = dskip.to(skip.dtype).contiguous(memory_format=memory_format_of(skip))
        return dx, dskip, dweight, dbias, dchannel_add

    return cat_forward, cat_backward
