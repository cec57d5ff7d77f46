"""GroupNorm and SiLU: x once in, y once out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Work, measure
from fastdiff import kernels

SHAPES = [("digits", 8, 8), ("sd1", 64, 1)]


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "reference": kernels.group_norm_silu,
    "eager": eager,
}


@pytest.mark.parametrize(("preset", "size", "batch"), SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_group_norm_silu(benchmark: Any, provider: str, preset: str, size: int, batch: int) -> None:
    shape = shapes.largest("group_norm_silu", preset, size, batch)[0]
    x, weight, bias = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    work = Work(bytes=2 * x.nbytes)
    with torch.inference_mode(), kernels.backend("reference"):
        measure(
            benchmark,
            lambda: PROVIDERS[provider](x, 8 if preset == "digits" else 32, weight, bias),
            name="group_norm_silu",
            shape=f"{preset} {shape}",
            provider=provider,
            work=work,
        )
