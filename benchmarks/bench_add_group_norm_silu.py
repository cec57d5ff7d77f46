"""The residual sum, then GroupNorm and SiLU: x and residual in, total and y out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Work, channels_last, compare
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
