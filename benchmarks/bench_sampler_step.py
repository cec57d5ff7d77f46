"""A guided sampler step: x in and out, both halves of the prediction in, one slot in and out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.harness import Work, measure
from fastdiff import kernels
from fastdiff.kernels import COLUMNS as C
from fastdiff.presets import UNETS

ROWS = {
    "deterministic": {C.C1: 0.1, C.P: 0.1, C.Q: 1.0, C.SLOT: 0},
    "stochastic": {C.C1: 0.1, C.P: 0.1, C.Q: 1.0, C.SLOT: 0, C.S: 0.1},
}


@pytest.mark.parametrize(("preset", "size", "batch"), [("digits", 8, 64), ("sd1", 64, 4)])
@pytest.mark.parametrize("row", ROWS)
def test_sampler_step(benchmark: Any, row: str, preset: str, size: int, batch: int) -> None:
    shape = (batch, UNETS[preset].in_channels, size, size)
    x, history = torch.randn(shape), torch.zeros(3, *shape)
    prediction = torch.randn(2 * batch, *shape[1:])
    table = torch.zeros(1, len(C))
    coefficients = {C.U: 1.0, C.V: -0.5, C.A: 0.5, C.B: 0.4, C.W: 3.0, C.CLAMP: math.inf}
    for column, value in {**coefficients, **ROWS[row]}.items():
        table[0, column] = value
    step, seeds = torch.tensor(0), torch.arange(batch)
    work = Work(bytes=6 * x.nbytes)  # x 2, prediction 2, slot 2
    with kernels.backend("reference"):
        measure(
            benchmark,
            lambda: kernels.sampler_step(x, prediction, history, table, step, seeds),
            name="sampler_step",
            shape=f"{preset} {shape} {row}",
            provider="reference",
            work=work,
        )
