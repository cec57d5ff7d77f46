"""The log-probability of a step against torch's normal density, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.log_prob import step_log_prob
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import Slots
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import SAMPLER_NOISE, philox_normal

LINEAR = NoiseSchedule(ScheduleConfig())
CASES = [
    ("ddpm", {}),
    ("ddpm", {"variance": "learned"}),
    ("ddim", {"eta": 0.5, "clamp": 0.6}),
    ("dpmpp-2m-sde", {}),
    ("dpmpp-sde", {}),
    ("lcm", {}),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_taken_step_has_the_density_of_its_noise(name: str, options: dict) -> None:
    """log p(x') = log N(n; 0, 1) - log s for each number, with the noise n that was drawn."""
    table, seeds = build_table(name, LINEAR, 4, prediction="v", **options), torch.tensor([3, 8])
    channels = 4 if options.get("variance") == "learned" else 2
    slots = Slots(2, (2, 3, 3), dtype=torch.float64, log_probs=True)
    slots.put(slice(None), table, draw(2, 2, 3, 3, seed=0), seeds)
    for row in range(3):
        f, x, history = (
            draw(2, channels, 3, 3, seed=row + 1),
            slots.x.clone(),
            slots.history.clone(),
        )
        slots.step(f)
        found = step_log_prob(x, f, slots.x, table, row, history=history)
        noise = philox_normal(seeds, (2, 3, 3), step=row, stream=SAMPLER_NOISE).double()
        s = torch.full_like(noise, float(table.column("S")[row]))
        if channels == 4:
            low, high = (float(table.column(f"LOGVAR_{end}")[row]) for end in ("MIN", "MAX"))
            part = (f[:, 2:] + 1) / 2
            s = torch.exp((part * high + (1 - part) * low) / 2)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - s.log()
        for density in (found, slots.log_prob):  # afterwards, and in the pass that drew the noise
            torch.testing.assert_close(density, expected.flatten(1).sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [2, 4])
def test_gradients(channels: int) -> None:
    options = {"variance": "learned"} if channels == 4 else {}
    table = build_table("ddpm", LINEAR, 4, **options)
    given = [draw(2, c, 2, 2, seed=c + n).requires_grad_() for n, c in enumerate((2, channels, 2))]

    def log_prob(x: Tensor, f: Tensor, x_next: Tensor) -> Tensor:
        return step_log_prob(x, f, x_next, table, 1)

    assert torch.autograd.gradcheck(log_prob, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    table = build_table("ddpm", LINEAR, 50)
    given = [draw(1, 4, 64, 64, seed=n).to(dtype) for n in range(3)]
    found = step_log_prob(*given, table, 30)
    assert found.dtype == torch.float32
    expected = step_log_prob(*(x.double() for x in given), table, 30)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_arguments_that_do_not_fit() -> None:
    x, table = draw(2, 2, 3, 3, seed=0), build_table("dpmpp-2m-sde", LINEAR, 4)
    with pytest.raises(ValueError, match=r"prediction its channels .* and \(2, 2, 1, 1\)"):
        step_log_prob(x, x[:, :, :1, :1], x, table, 0)
    with pytest.raises(ValueError, match=r"history must have the shape \(3, 2, 2, 3, 3\), got "):
        step_log_prob(x, x, x, table, 1, history=torch.zeros(3))
    for row in (-2, 4):
        with pytest.raises(ValueError, match=f"row must be from 0 to 3, got {row}"):
            step_log_prob(x, x, x, table, row)


def test_what_has_no_density() -> None:
    x = draw(2, 2, 3, 3, seed=0)
    with pytest.raises(ValueError, match="row 3 of 'ddpm' adds no noise"):
        step_log_prob(x, x, x, build_table("ddpm", LINEAR, 4), 3)
    with pytest.raises(ValueError, match="reads the history; pass history="):
        step_log_prob(x, x, x, build_table("dpmpp-2m-sde", LINEAR, 4), 1)
    with pytest.raises(ValueError, match=r"x_next must have the shape of x, \(2, 2, 3, 3\)"):
        step_log_prob(x, x, x[:1], build_table("ddpm", LINEAR, 4), 0)
    assert math.isfinite(float(step_log_prob(x, x, x, build_table("ddpm", LINEAR, 4), 0).sum()))
