"""GroupNorm and SiLU: x once in, y once out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.gpu import Arguments, Make, Subject
from benchmarks.harness import Work, channels_last, compare
from benchmarks.shapes import Call, Job
from fastdiff import kernels


def eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, scale_shift: Tensor | None = None
) -> Tensor:
    y = F.group_norm(x, groups, weight, bias)
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Images in channels_last; weights, scales and shifts as they are."""
    x, *parameters = call.tensors
    options = {
        name: make.channels_last(*shape) if len(shape) == 4 else make(*shape)
        for name, shape in call.options
    }
    return (make.channels_last(*x), job.norm_groups, *(make(*p) for p in parameters)), options


SUBJECT = Subject(
    op="group_norm_silu",
    arguments=arguments,
    eager=eager,
    work=lambda call, size: Work(bytes=2 * torch.Size(call.tensors[0]).numel() * size),
    backward_work=lambda call, size: Work(bytes=3 * torch.Size(call.tensors[0]).numel() * size),
    gradients_first=True,
    norm=True,
)


@pytest.mark.parametrize("job", shapes.jobs_with("group_norm_silu"))
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "copy"])
def test_group_norm_silu(benchmark: Any, provider: str, job: str) -> None:
    shape = shapes.JOBS[job].largest("group_norm_silu").tensors[0]
    x, weight, bias = channels_last(*shape), torch.randn(shape[1]), torch.randn(shape[1])
    compare(
        benchmark,
        provider,
        {"reference": kernels.group_norm_silu, "eager": eager},
        (x, shapes.JOBS[job].norm_groups, weight, bias),
        name="group_norm_silu",
        job=job,
        shape=str(shape),
        work=Work(bytes=2 * x.nbytes),
    )
