"""GEGLU: 2D numbers in, D out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.gpu import Arguments, Make, Subject
from benchmarks.harness import Work, compare
from benchmarks.shapes import Call, Job
from fastdiff import kernels


def eager(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    return (make(*call.tensors[0]),), {}


SUBJECT = Subject(
    op="geglu",
    arguments=arguments,
    eager=eager,
    work=lambda call, size: Work(bytes=torch.Size(call.tensors[0]).numel() * size * 3 // 2),
    backward_work=lambda call, size: Work(
        bytes=torch.Size(call.tensors[0]).numel() * size * 5 // 2
    ),
)


@pytest.mark.parametrize("job", shapes.jobs_with("geglu"))
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "copy"])
def test_geglu(benchmark: Any, provider: str, job: str) -> None:
    (shape,) = shapes.JOBS[job].largest("geglu").tensors
    x = torch.randn(shape)
    compare(
        benchmark,
        provider,
        {"reference": kernels.geglu, "eager": eager},
        (x,),
        name="geglu",
        job=job,
        shape=str(shape),
        work=Work(bytes=x.nbytes * 3 // 2),
    )
