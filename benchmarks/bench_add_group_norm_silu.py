"""The residual sum, then GroupNorm and SiLU: x and residual in, total and y out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_group_norm_silu, shapes
from benchmarks.bench_group_norm_silu import arguments
from benchmarks.gpu import Subject
from benchmarks.harness import Work, channels_last, compare
from benchmarks.shapes import Call
from fastdiff import kernels


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    return kernels.add_group_norm_silu(x, groups, weight, bias, residual=residual)


def eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.silu(F.group_norm(total, groups, weight, bias)), total


def eager_with_options(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = x if channel_add is None else x + channel_add[:, :, None, None]
    total = total if residual is None else total + residual
    norm = bench_group_norm_silu.eager
    return norm(total, groups, weight, bias, scale_shift=scale_shift), total


def work(call: Call, size: int) -> Work:
    """x in, total and y out, and the residual in where there is one."""
    passes = 4 if "residual" in dict(call.options) else 3
    return Work(bytes=passes * torch.Size(call.tensors[0]).numel() * size)


SUBJECT = Subject(
    op="add_group_norm_silu",
    arguments=arguments,
    eager=eager_with_options,
    work=work,
    backward_work=lambda call, size: Work(bytes=4 * torch.Size(call.tensors[0]).numel() * size),
    norm=True,
)


@pytest.mark.parametrize("job", shapes.jobs_with("add_group_norm_silu"))
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "copy"])
def test_add_group_norm_silu(benchmark: Any, provider: str, job: str) -> None:
    call = shapes.JOBS[job].largest("add_group_norm_silu")
    shape = call.tensors[0]
    assert [name for name, _ in call.options] == ["residual"]
    x, residual = channels_last(*shape), channels_last(*shape)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    compare(
        benchmark,
        provider,
        {"reference": reference, "eager": eager},
        (x, shapes.JOBS[job].norm_groups, weight, bias, residual),
        name="add_group_norm_silu",
        job=job,
        shape=str(shape),
        work=Work(bytes=4 * x.nbytes),
    )
