"""Noise: nothing in, one fp32 number per element out; latents of 64 digits, and of 4 SD images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import compare
from fastdiff import kernels
from fastdiff.kernels import Work
from fastdiff.models.presets import UNETS


@pytest.mark.parametrize(("preset", "size", "batch"), [("digits", 8, 64), ("sd1", 64, 4)])
@pytest.mark.parametrize("provider", ["reference", "eager"])
def test_philox_normal(benchmark: Any, provider: str, preset: str, size: int, batch: int) -> None:
    shape = (UNETS[preset].in_channels, size, size)
    seeds = torch.arange(batch)
    generator = torch.Generator().manual_seed(0)
    compare(
        benchmark,
        provider,
        {
            "reference": lambda: kernels.philox_normal(seeds, shape),
            "eager": lambda: torch.randn(batch, *shape, generator=generator),
        },
        (),
        name="philox_normal",
        shape=str((batch, *shape)),
        work=Work(bytes=4 * batch * torch.Size(shape).numel()),
    )
