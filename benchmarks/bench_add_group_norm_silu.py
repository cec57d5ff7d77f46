"""Bias and time embedding, then GroupNorm and SiLU: x in, total and y out."""

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


def eager(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, channel_add: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + channel_add[:, :, None, None]
    return F.silu(F.group_norm(total, groups, weight, bias)), total


PROVIDERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": kernels.add_group_norm_silu,
    "eager": eager,
}


@pytest.mark.parametrize(("preset", "size", "batch"), SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_add_group_norm_silu(
    benchmark: Any, provider: str, preset: str, size: int, batch: int
) -> None:
    shape = shapes.largest("add_group_norm_silu", preset, size, batch)[0]
    x, weight, bias = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    channel_add = torch.randn(shape[:2])
    work = Work(bytes=3 * x.nbytes)
    with torch.inference_mode(), kernels.backend("reference"):
        measure(
            benchmark,
            lambda: PROVIDERS[provider](
                x, 8 if preset == "digits" else 32, weight, bias, channel_add=channel_add
            ),
            name="add_group_norm_silu",
            shape=f"{preset} {shape}",
            provider=provider,
            work=work,
        )
