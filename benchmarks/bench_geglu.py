"""GEGLU: 2D numbers in, D out."""

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

SHAPES = [("sd1", 64, 1)]


def eager(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


PROVIDERS: dict[str, Callable[..., Tensor]] = {"reference": kernels.geglu, "eager": eager}


@pytest.mark.parametrize(("preset", "size", "batch"), SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_geglu(benchmark: Any, provider: str, preset: str, size: int, batch: int) -> None:
    (shape,) = shapes.largest("geglu", preset, size, batch)
    x = torch.randn(shape)
    work = Work(bytes=x.nbytes * 3 // 2)
    with torch.inference_mode(), kernels.backend("reference"):
        measure(
            benchmark,
            lambda: PROVIDERS[provider](x),
            name="geglu",
            shape=f"{preset} {shape}",
            provider=provider,
            work=work,
        )
