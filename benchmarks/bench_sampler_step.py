"""A guided sampler step: x in and out, both halves of the prediction in, one slot in and out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fastdiff import kernels
from fastdiff.bench.ops.sampler_step import ROWS, eager, halves, row_of
from fastdiff.kernels import Work
from fastdiff.models.presets import UNETS


@pytest.mark.parametrize(("preset", "size", "batch"), [("digits", 8, 64), ("sd1", 64, 4)])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "copy"])
def test_sampler_step(
    benchmark: Any, provider: str, row: str, preset: str, size: int, batch: int
) -> None:
    shape = (batch, UNETS[preset].in_channels, size, size)
    x, history = torch.randn(shape), torch.zeros(3, *shape)
    prediction = torch.randn(2 * batch, *shape[1:])
    table = row_of(row, x.device)
    seeds = torch.arange(batch)
    rows = torch.zeros_like(seeds)

    def reference(x: Tensor, prediction: Tensor, history: Tensor, _: float) -> None:
        kernels.sampler_step(x, prediction, history, table, rows, seeds, **halves(seeds))

    compare(
        benchmark,
        provider,
        {"reference": reference, "eager": eager},
        (x, prediction, history, ROWS[row]),
        name="sampler_step",
        shape=f"{shape} {row}",
        work=Work(bytes=6 * x.nbytes),  # x 2, prediction 2, slot 2
    )
