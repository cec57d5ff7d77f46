"""Restart sampling: algorithm 1 of the paper, and what it does to Gaussian data, exactly."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastdiff.diffusion.levels import final_level, spaced_levels
from fastdiff.diffusion.restart import Restart, restart_table
from fastdiff.diffusion.samplers import COLUMN, SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import (
    NoiseSchedule,
    ScheduleConfig,
    noise_schedule,
    sigma_spacing,
)
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from tests.diffusion.mixture import along, denoise, exact_network

SCHEDULE = NoiseSchedule(ScheduleConfig())
FIFTH = spaced_levels(SCHEDULE, 8, "karras")[4].ve_sigma
TWO = [Restart(low=0.3, high=1.2, times=2, steps=3), Restart(low=2.0, high=5.0, times=1, steps=2)]


def test_algorithm_1_with_the_same_noise() -> None:
    """Written out in y = x / alpha with Euler steps; the noise of a jump is that of its row."""
    steps = 8
    table = restart_table(SCHEDULE, steps, TWO, sampler="euler")
    seeds = torch.arange(5)
    start = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sample(along(table, exact_network(SCHEDULE)), table, start, seeds)

    levels = [*spaced_levels(SCHEDULE, steps, "karras"), final_level(SCHEDULE, "zero")]
    sigmas = [level.ve_sigma for level in levels]
    inside = sigmas[1:-1]
    begin = {min(inside, key=lambda s: abs(math.log(s / r.low))): r for r in TWO}
    y, row = start / levels[0].alpha, 0

    def euler(y: torch.Tensor, now: float, to: float) -> torch.Tensor:
        nonlocal row
        row += 1
        return y + (to - now) * (y - denoise(y, now)) / now

    for now, to in pairwise(sigmas):
        y = euler(y, now, to)
        if (restart := begin.get(to)) is None:
            continue
        for _ in range(restart.times):
            noise = philox_normal(seeds, (2,), step=row - 1, stream=SAMPLER_NOISE).double()
            y = y + math.sqrt(restart.high**2 - to**2) * noise
            inner = sigma_spacing("karras", restart.steps + 1, to, restart.high)
            for a, b in pairwise(inner):
                y = euler(y, a, b)
    assert row == len(table) == 8 + 2 * 3 + 2
    torch.testing.assert_close(found, y, atol=2e-6, rtol=0)  # timesteps are real numbers


def variance(table: SamplerTable, std: float) -> float:
    """Of the samples for data N(0, std²), whose best denoiser is linear: pushed through the rows.

    The state is x and the first slot of the history."""
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    covariance[0, 0] = 1.0
    for row, sigma in zip(table.columns, table.sigmas.tolist(), strict=True):
        value = {name: float(row[place]) for name, place in COLUMN.items()}
        alpha = 1 / math.hypot(1, sigma)
        gain = alpha * std**2 / ((alpha * std) ** 2 + (alpha * sigma) ** 2)
        step = torch.eye(2, dtype=torch.float64)
        step[0] = torch.tensor([value["A"] + value["B"] * gain, value["C1"]])
        if value["SLOT"] == 0:
            step[1] = torch.tensor([value["P"] + value["Q"] * gain, 0.0])
        covariance = step @ covariance @ step.T
        covariance[0, 0] += value["S"] ** 2
    return float(covariance[0, 0])


def test_a_gaussian_keeps_its_variance() -> None:
    """The error of Heun's method remains, which falls at order 2; the paper's reason for restarts
    shows too: the error made before a jump shrinks."""
    std, errors = 0.5, []
    for factor in (1, 2, 4):
        restarts = [Restart(low=0.3, high=1.5, times=2, steps=6 * factor)]
        table = restart_table(SCHEDULE, 18 * factor, restarts)
        errors.append(abs(variance(table, std) - std**2))
        plain = build_table("heun", SCHEDULE, 18 * factor, spacing="karras")
        assert errors[-1] < abs(variance(plain, std) - std**2) / 3
    assert errors[-1] < 2e-3 * std**2
    assert 3 < errors[0] / errors[1] < 6
    assert 3 < errors[1] / errors[2] < 6


def test_without_restarts_it_is_the_plain_table() -> None:
    table = restart_table(SCHEDULE, 6, [], prediction="v", clamp=1.0)
    plain = build_table("heun", SCHEDULE, 6, prediction="v", spacing="karras", clamp=1.0)
    assert torch.equal(table.columns, plain.columns)
    assert torch.equal(table.steps, plain.steps)


def test_rows_have_their_own_noise_and_steps_count_up() -> None:
    table = restart_table(SCHEDULE, 8, TWO)
    assert table.column("NOISE_STEP").tolist() == list(range(len(table)))
    assert (table.column("S") > 0).sum() == 3
    assert (table.steps.diff() >= 0).all()
    assert int(table.steps.max()) + 1 == 8 + 2 * 3 + 2
    half = table.column("S") > 0
    bounds = table.column("LOGVAR_MIN")[half]
    torch.testing.assert_close(bounds, 2 * table.column("S")[half].log())
    assert torch.equal(bounds, table.column("LOGVAR_MAX")[half])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "euler-ancestral"}, "adds noise in every step; use 'heun'"),
        ({"sampler": "dpmpp-2m"}, "forgets earlier steps, got 'dpmpp-2m'; use 'heun'"),
        ({"sampler": "none"}, "unknown sampler 'none'; expected one of ddpm"),
        ({"restarts": [TWO[0], TWO[0]]}, "two restarts begin at the level"),
        ({"restarts": [Restart(low=0.3, high=1e4)]}, "high must be at most 157"),
        ({"steps": 1}, "restarts need at least 2 steps, got 1"),
        ({"restarts": [Restart(low=0.9 * FIFTH, high=0.95 * FIFTH)]}, "above high=.* take more"),
        ({"schedule": noise_schedule(ScheduleConfig(kind="flow"))}, "got flow matching; build"),
    ],
)
def test_what_cannot_restart(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"schedule": SCHEDULE, "steps": 8, "restarts": TWO, **change}
    with pytest.raises(ValueError, match=message):
        restart_table(options.pop("schedule"), options.pop("steps"), **options)


@pytest.mark.parametrize(
    "change", [{"low": 0.0}, {"low": 2.0}, {"high": math.inf}, {"times": 0}, {"steps": 0}]
)
def test_bad_intervals(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"0 < low < high|at least 1, got"):
        Restart(**{"low": 0.3, "high": 1.0, **change})
