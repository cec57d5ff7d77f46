"""A backend's LayerNorm kernels, which take an addend, as those of the op with and without it.

A backend has two functions for both ops:

    norm_forward(x, residual, weight, bias, eps) -> (y, total)
    norm_backward(dy, dtotal, total, weight, bias, eps, needs) -> (dtotal, dweight, dbias)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from torch import Tensor


class Functions(TypedDict):
    """What a `Backend` is made of."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def without_residual(
    norm_forward: Callable[..., Any], norm_backward: Callable[..., Any]
) -> Functions:
    """``forward`` and ``backward`` of `layer_norm`."""

    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Tensor, None]:
        return norm_forward(x, None, weight, bias, eps)[0], None

    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        needs: Sequence[bool],
    ) -> Any:
        return norm_backward(dy, None, x, weight, bias, eps, needs[1:])

    return {"forward": forward, "backward": backward}


def with_residual(norm_forward: Callable[..., Any], norm_backward: Callable[..., Any]) -> Functions:
    """``forward`` and ``backward`` of `add_layer_norm`; the latter has total in x's place."""

    def forward(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> tuple[tuple[Tensor, Tensor], None]:
        return norm_forward(x, residual, weight, bias, eps), None

    def backward(
        dy: Tensor,
        dtotal: Tensor | None,
        total: Tensor,
        residual: None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        needs: Sequence[bool],
    ) -> Any:
        return norm_backward(dy, dtotal, total, weight, bias, eps, needs[1:])

    return {"forward": forward, "backward": backward}
