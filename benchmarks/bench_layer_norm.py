"""LayerNorm: x once in, y once out."""

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


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


PROVIDERS: dict[str, Callable[..., Tensor]] = {"reference": kernels.layer_norm, "eager": eager}


@pytest.mark.parametrize(("preset", "size", "batch"), SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_layer_norm(benchmark: Any, provider: str, preset: str, size: int, batch: int) -> None:
    shape = shapes.largest("layer_norm", preset, size, batch)[0]
    x, weight, bias = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    work = Work(bytes=2 * x.nbytes)
    with torch.inference_mode(), kernels.backend("reference"):
        measure(
            benchmark,
            lambda: PROVIDERS[provider](x, weight, bias),
            name="layer_norm",
            shape=f"{preset} {shape}",
            provider=provider,
            work=work,
        )
