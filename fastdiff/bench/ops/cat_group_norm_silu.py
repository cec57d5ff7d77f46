"""The norm of two inputs: x, a residual and skip in, the sum and y out; SD 1.5's decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.ops import group_norm_silu
from fastdiff.bench.providers import LATER, Arguments, Make, Subject
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job

BLOCKS = ((1280, 1280, 8), (1280, 640, 4), (1280, 640, 2), (640, 320, 1), (320, 320, 1))
"""Channels of x and of skip, and the latent's side over theirs, for 5 of 12 blocks. In the 2nd to
the 4th, one group has channels of both."""


def eager(
    x: Tensor, skip: Tensor, groups: int, weight: Tensor, bias: Tensor, *, residual: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return group_norm_silu.eager(torch.cat([total, skip], 1), groups, weight, bias), total


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Images are channels_last; weights are contiguous."""
    x, skip, *parameters = call.tensors
    options: dict[str, Any] = {name: make.channels_last(*shape) for name, shape in call.options}
    images = make.channels_last(*x), make.channels_last(*skip)
    return (*images, job.norm_groups, *(make(*p) for p in parameters)), options


SUBJECT = Subject(op="cat_group_norm_silu", arguments=arguments, eager=eager, norm=True)


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """The U-Nets that are timed still concatenate; these are the shapes of their concatenations."""
    found = []
    for batch in batches:
        for left, right, part in BLOCKS:
            x, skip = ((batch, c, size // part, size // part) for c in (left, right))
            parameter = (left + right,)
            call = Call("cat_group_norm_silu", (x, skip, parameter, parameter), (("residual", x),))
            job = Job(network="unet", preset="sd1", size=size, batch=batch)
            found.append(
                Case(subject=SUBJECT, job_name="", job=job, call=call, providers=LATER, priority=1)
            )
    return found
