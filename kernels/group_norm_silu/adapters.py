"""A backend's GroupNorm kernels, which take addends, as those of the op with and without them.

A backend has two functions for both ops:

    norm_forward(x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, activation,
                 keep) -> (y, total, statistics)
    norm_backward(dy, dtotal, total, num_groups, weight, bias, channel_add, scale_shift, activation,
                  statistics, needs) -> gradients of total, weight, bias, channel_add, scale_shift
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from torch import Tensor


class Functions(TypedDict):
    """What a `Backend` is made of."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def without_addends(
    norm_forward: Callable[..., Any], norm_backward: Callable[..., Any]
) -> Functions:
    """``forward`` and ``backward`` of `group_norm_silu`."""

    def forward(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale_shift: Tensor | None,
        eps: float,
        activation: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        y, _, statistics = norm_forward(
            x, num_groups, weight, bias, None, None, scale_shift, eps, activation, keep
        )
        return y, statistics

    def backward(
        dy: Tensor,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale_shift: Tensor | None,
        eps: float,
        activation: str,
        statistics: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias, _, dscale_shift = norm_backward(
            *(dy, None, x, num_groups, weight, bias, None, scale_shift, activation, statistics),
            (*needs[:3], False, needs[3]),
        )
        return dx, dweight, dbias, dscale_shift

    return {"forward": forward, "backward": backward}


def with_addends(norm_forward: Callable[..., Any], norm_backward: Callable[..., Any]) -> Functions:
    """``forward`` and ``backward`` of `add_group_norm_silu`; the latter has total in x's place."""

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
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        y, total, statistics = norm_forward(
            x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, activation, keep
        )
        return (y, total), statistics

    def backward(
        dy: Tensor,
        dtotal: Tensor | None,
        total: Tensor,
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
    ) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = norm_backward(
            *(dy, dtotal, total, num_groups, weight, bias, channel_add, scale_shift, activation),
            *(statistics, needs),
        )
        return found

    return {"forward": forward, "backward": backward}
