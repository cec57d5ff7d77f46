"""A residual addition, then GroupNorm and SiLU: x and residual in, total and y out."""

from __future__ import annotations

from torch import Tensor

from fastdiff.bench.ops import group_norm_silu
from fastdiff.bench.ops.group_norm_silu import arguments
from fastdiff.bench.providers import Subject


def eager(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = x if channel_add is None else x + channel_add[..., None, None]
    total = total if residual is None else total + residual
    return group_norm_silu.eager(total, groups, weight, bias, scale_shift=scale_shift), total


SUBJECTS = (
    Subject(
        op="add_group_norm_silu",
        operands=lambda x: (x, x[1:2], x[1:2]),
        arguments=arguments,
        eager=eager,
        norm=True,
    ),
)
