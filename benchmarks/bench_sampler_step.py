"""A guided sampler step: x in and out, both halves of the prediction in, one slot in and out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Work, compare
from fastdiff import kernels
from fastdiff.kernels import COLUMNS as C
from fastdiff.presets import UNETS

COEFFICIENTS = {C.U: 1.0, C.V: -0.5, C.A: 0.5, C.B: 0.4, C.C1: 0.1, C.P: 0.1, C.Q: 1.0, C.W: 3.0}
ROWS = {"deterministic": 0.0, "stochastic": 0.1}
"""The factor of the noise."""


def eager(x: Tensor, prediction: Tensor, history: Tensor, noise_factor: float) -> None:
    """The row as a scheduler writes it, with PyTorch's own noise."""
    c = COEFFICIENTS
    uncond, cond = prediction.chunk(2)
    guided = uncond + c[C.W] * (cond - uncond)
    denoised = c[C.U] * x + c[C.V] * guided
    new = c[C.A] * x + c[C.B] * denoised + c[C.C1] * history[0]
    if noise_factor:
        new = new + noise_factor * torch.randn_like(x)
    history[0] = c[C.P] * x + c[C.Q] * denoised
    x.copy_(new)


@pytest.mark.parametrize(("preset", "size", "batch"), [("digits", 8, 64), ("sd1", 64, 4)])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "copy"])
def test_sampler_step(
    benchmark: Any, provider: str, row: str, preset: str, size: int, batch: int
) -> None:
    shape = (batch, UNETS[preset].in_channels, size, size)
    x, history = torch.randn(shape), torch.zeros(3, *shape)
    prediction = torch.randn(2 * batch, *shape[1:])
    table = torch.zeros(1, len(C))
    extra = {C.SLOT: 0.0, C.CLAMP: math.inf, C.S: ROWS[row]}
    for column, value in {**COEFFICIENTS, **extra}.items():
        table[0, column] = value
    step, seeds = torch.tensor(0), torch.arange(batch)

    def reference(x: Tensor, prediction: Tensor, history: Tensor, _: float) -> None:
        kernels.sampler_step(x, prediction, history, table, step, seeds)

    compare(
        benchmark,
        provider,
        {"reference": reference, "eager": eager},
        (x, prediction, history, ROWS[row]),
        name="sampler_step",
        shape=f"{shape} {row}",
        work=Work(bytes=6 * x.nbytes),  # x 2, prediction 2, slot 2
    )
