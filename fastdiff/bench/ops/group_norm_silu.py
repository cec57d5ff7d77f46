"""GroupNorm and SiLU: x once in, y once out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.shapes import Call, Job


def eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, scale_shift: Tensor | None = None
) -> Tensor:
    y = F.group_norm(x, groups, weight, bias)
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Images are channels_last; weights, scales and shifts are contiguous."""
    x, *parameters = call.tensors
    options = {
        name: make.channels_last(*shape) if len(shape) == 4 else make(*shape)
        for name, shape in call.options
    }
    return (make.channels_last(*x), job.norm_groups, *(make(*p) for p in parameters)), options


SUBJECTS = (
    Subject(
        op="group_norm_silu",
        operands=lambda x: (x, x[1:2], x[1:2]),
        arguments=arguments,
        eager=eager,
        gradients_first=True,
        norm=True,
    ),
)
