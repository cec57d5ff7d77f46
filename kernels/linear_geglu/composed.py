"""`linear_geglu` as PyTorch's product and the kernel of `geglu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..checks import without_autocast


def forward_by(activation: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass with a backend's forward pass of `geglu`."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, None]:
        """Return y, contiguous."""
        with without_autocast(x.device.type):
            return activation(F.linear(x, weight, bias), False)[0], None

    return forward


def backward_by(activation: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass with a backend's backward pass of `geglu`."""

    def backward(
        dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return dx, dweight, dbias."""
        with without_autocast(x.device.type):
            (dh,) = activation(dy, F.linear(x, weight, bias), (True,))
            flat, flat_dh = x.reshape(-1, x.shape[-1]), dh.view(-1, dh.shape[-1])
            return (
                dh @ weight if needs[0] else None,
                flat_dh.mT @ flat if needs[1] else None,
                flat_dh.sum(0) if bias is not None and needs[2] else None,
            )

    return backward
