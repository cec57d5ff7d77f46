"""LayerNorm: x once in, y once out; with the residual x and residual in, total and y out."""

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

PROVIDERS = ["reference", "eager", "compile", "copy"]


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    return tuple(make(*shape) for shape in call.tensors), {}


SUBJECT = Subject(
    op="layer_norm",
    arguments=arguments,
    eager=eager,
    work=lambda call, size: Work(bytes=2 * torch.Size(call.tensors[0]).numel() * size),
    backward_work=lambda call, size: Work(bytes=3 * torch.Size(call.tensors[0]).numel() * size),
)
ADD_SUBJECT = Subject(
    op="add_layer_norm",
    arguments=arguments,
    eager=add_eager,
    work=lambda call, size: Work(bytes=4 * torch.Size(call.tensors[0]).numel() * size),
    backward_work=lambda call, size: Work(bytes=4 * torch.Size(call.tensors[0]).numel() * size),
)


@pytest.mark.parametrize("job", shapes.jobs_with("layer_norm"))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_layer_norm(benchmark: Any, provider: str, job: str) -> None:
    shape = shapes.JOBS[job].largest("layer_norm").tensors[0]
    x, weight, bias = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    compare(
        benchmark,
        provider,
        {"reference": kernels.layer_norm, "eager": eager},
        (x, weight, bias),
        name="layer_norm",
        job=job,
        shape=str(shape),
        work=Work(bytes=2 * x.nbytes),
    )


@pytest.mark.parametrize("job", shapes.jobs_with("add_layer_norm"))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_add_layer_norm(benchmark: Any, provider: str, job: str) -> None:
    shape = shapes.JOBS[job].largest("add_layer_norm").tensors[0]
    x, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    compare(
        benchmark,
        provider,
        {"reference": kernels.add_layer_norm, "eager": add_eager},
        (x, residual, weight, bias),
        name="add_layer_norm",
        job=job,
        shape=str(shape),
        work=Work(bytes=4 * x.nbytes),
    )
