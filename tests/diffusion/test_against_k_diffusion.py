"""Trajectories of our tables against k-diffusion's samplers, with the same denoiser and noise."""

from __future__ import annotations

import inspect
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from tests.diffusion.test_samplers import LINEAR, noise, smooth
from tests.support.peers import K_DIFFUSION, k_diffusion_sampling

pytestmark = pytest.mark.skipif(
    not K_DIFFUSION.exists(), reason=f"{K_DIFFUSION} is missing; make venv installs it"
)
SEEDS = torch.tensor([3, 2**40 + 5])
SHAPE = (3, 4)
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("euler", "euler", {}, {}),
    ("euler-ancestral", "euler_ancestral", {}, {}),
    ("euler-ancestral", "euler_ancestral", {"eta": 0.6}, {"eta": 0.6}),
    ("heun", "heun", {}, {}),
    ("kdpm2", "dpm_2", {}, {}),
    ("kdpm2-ancestral", "dpm_2_ancestral", {}, {}),
    ("lms", "lms", {}, {}),
    ("lms", "lms", {"solver_order": 2}, {"order": 2}),
    ("dpmpp-2s-ancestral", "dpmpp_2s_ancestral", {}, {}),
    ("dpmpp-2s-ancestral", "dpmpp_2s_ancestral", {"eta": 0.5}, {"eta": 0.5}),
    ("dpmpp-2m", "dpmpp_2m", {"lower_order_final": False}, {}),
    ("dpmpp-2m-sde", "dpmpp_2m_sde", {"lower_order_final": False}, {}),
    (
        "dpmpp-2m-sde",
        "dpmpp_2m_sde",
        {"lower_order_final": False, "solver_type": "heun", "eta": 0.7},
        {"solver_type": "heun", "eta": 0.7},
    ),
    ("dpmpp-3m-sde", "dpmpp_3m_sde", {}, {}),
    ("dpmpp-3m-sde", "dpmpp_3m_sde", {"eta": 0.0}, {"eta": 0.0}),
]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return k_diffusion_sampling()


class Drawn:
    """k-diffusion's noise sampler: the noise of our rows that draw some, in their order."""

    def __init__(self, table: SamplerTable) -> None:
        self.rows = torch.nonzero(table.column("S")).flatten().tolist()

    def __call__(self, sigma: Tensor, to: Tensor) -> Tensor:
        step = self.rows.pop(0)
        return philox_normal(SEEDS, SHAPE, step=step, stream=SAMPLER_NOISE).double()


@pytest.mark.parametrize("spacing", ["karras", "exponential", "trailing"])
@pytest.mark.parametrize(
    ("name", "function", "options", "their_options", "steps"),
    [
        (*case, steps)
        for case in CASES
        for steps in (1, 5, 15)
        # k-diffusion's 2M SDE and 3M SDE read the length of a step before, without one
        if steps > 1 or not case[1].endswith("m_sde")
    ],
    ids=str,
)
def test_trajectories(
    theirs: ModuleType,
    name: str,
    function: str,
    options: dict[str, Any],
    their_options: dict[str, Any],
    steps: int,
    spacing: str,
) -> None:
    """x at the start of every step and at the end, in k-diffusion's variance-exploding space.

    With fewer steps than five, ours begin with an Euler step out of nearly pure noise.
    """
    table = build_table(name, LINEAR, steps, prediction="x0", spacing=spacing, **options)
    first = [table.steps.tolist().index(step) for step in range(steps)]
    sigmas = torch.cat([table.sigmas[first], table.sigmas.new_tensor([table.final_sigma])])
    start = noise(2, *SHAPE) * float(sigmas[0])

    found: list[Tensor] = []
    growth = (1 + table.sigmas.square()).sqrt().tolist()

    def denoised(x: Tensor, row: int) -> Tensor:
        if row in first:
            found.append(x * growth[row])
        return smooth(x * growth[row], float(table.sigmas[row]))

    end = sample(denoised, table, start / growth[0], SEEDS)
    found.append(end * math.hypot(1, table.final_sigma))

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,)
        return smooth(x, float(sigma[0]))

    expected: list[Tensor] = []
    drawn = Drawn(table)
    takes = "noise_sampler" in inspect.signature(getattr(theirs, f"sample_{function}")).parameters
    last = getattr(theirs, f"sample_{function}")(
        model,
        start.clone(),
        sigmas,
        disable=True,
        callback=lambda at: expected.append(at["x"].clone()),
        **their_options,
        **({"noise_sampler": drawn} if takes else {}),
    )
    expected.append(last)
    assert len(found) == len(expected) == steps + 1
    for wanted, x in zip(expected, found, strict=True):
        torch.testing.assert_close(x, wanted, rtol=1e-9, atol=1e-9)
    assert not drawn.rows
