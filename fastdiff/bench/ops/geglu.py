"""GEGLU: 2D numbers in, D out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.shapes import Call, Job


def eager(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    return (make(*call.tensors[0]),), {}


SUBJECTS = (
    Subject(
        op="geglu",
        operands=lambda x: (x,),
        arguments=arguments,
        eager=eager,
    ),
)
