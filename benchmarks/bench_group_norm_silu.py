"""GroupNorm and SiLU: x once in, y once out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Work, channels_last, compare
from fastdiff import kernels


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


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
