"""Noise schedules against the papers' formulas, diffusers' betas, and their own definitions at
real t.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.diffusion.schedules import (
    NoiseSchedule,
    ScheduleConfig,
    sigma_spacing,
    timestep_spacing,
    zero_terminal_snr,
)
from tests.support.peers import import_diffusers

KINDS = ("linear", "scaled_linear", "cosine", "sigmoid")
SCHEDULES = {
    (kind, zero): NoiseSchedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero))
    for kind in KINDS
    for zero in (False, True)
}


def same(a, b, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        *(torch.as_tensor(value, dtype=torch.float64) for value in (a, b)),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_betas_are_diffusers(kind: str, theirs: str, zero: bool) -> None:
    scheduler = import_diffusers("DDPMScheduler").DDPMScheduler(
        beta_schedule=theirs, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero
    )
    ours = NoiseSchedule(
        ScheduleConfig(kind=kind, beta_start=0.00085, beta_end=0.012, zero_terminal_snr=zero)
    )
    same(ours.betas, scheduler.betas, 2e-5 if zero else 1e-7)  # theirs are fp32, rescaled in fp32
    same(ours.alphas_cumprod, scheduler.alphas_cumprod, 1e-5)


def test_betas_closed_forms() -> None:
    i = np.arange(200)
    config = {"num_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.02}
    linear = ScheduleConfig(kind="linear", **config)
    same(NoiseSchedule(linear).betas, 1e-4 + i / 199 * (0.02 - 1e-4))
    # OpenAI's "linear": the ends times 1000 / T, so that 200 timesteps hold as much noise as 1000
    openai = NoiseSchedule(ScheduleConfig(kind="linear", rescale_ends=True, **config))
    same(openai.betas, 5e-4 + i / 199 * (0.1 - 5e-4))
    scaled = NoiseSchedule(ScheduleConfig(kind="scaled_linear", **config))
    same(scaled.betas, (0.01 + i / 199 * (0.02**0.5 - 0.01)) ** 2)
    # IDDPM eq. 17 where no beta is clipped
    cosine = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=200))
    u = (i[:190] + 1) / 200
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    same(cosine.alphas_cumprod[:190], f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    assert cosine.betas.max() == 0.999


def test_zero_terminal_snr() -> None:
    """Lin et al. 2023, algorithm 1: no signal at the end, the start as it was, affine between."""
    for kind in KINDS:
        before, after = SCHEDULES[kind, False], SCHEDULES[kind, True]
        t = torch.arange(1000)
        a, b = before.alpha(t), after.alpha(t)
        assert b[-1] == 0
        assert after.sigma(999) == 1
        assert after.snr(999) == 0
        same(b[0], a[0])
        same((b[1:] - b[:-1]) / (a[1:] - a[:-1]), (a[0] / (a[0] - a[-1])).expand(999), 1e-7)
    same(zero_terminal_snr(SCHEDULES["linear", False].betas), SCHEDULES["linear", True].betas)


@pytest.mark.parametrize("key", SCHEDULES, ids=str)
def test_alpha_and_sigma(key: tuple[str, bool]) -> None:
    schedule = SCHEDULES[key]
    t = torch.arange(1000)
    for value in (t, t.double(), t.to(torch.int32)):
        same(schedule.alpha(value), schedule.alphas_cumprod.sqrt())
        same(schedule.sigma(value), (1 - schedule.alphas_cumprod).sqrt())
    real = torch.linspace(0, 999, 3333, dtype=torch.float64)
    same(schedule.alpha(real).square() + schedule.sigma(real).square(), torch.ones(3333))
    assert (schedule.snr(real).diff() < 0).all(), (
        "less signal at every later t, between timesteps too"
    )
    # log-SNR linear between two timesteps
    same(schedule.log_snr(417.25), 0.75 * schedule.log_snr(417) + 0.25 * schedule.log_snr(418))
    assert schedule.alpha(torch.tensor(3.0)).dtype == torch.float64
    third = 1000 / 3  # no fp32 number: a Python float is not rounded to one
    same(schedule.alpha(third), schedule.alpha(torch.tensor(third, dtype=torch.float64)))
    if key[1]:  # before the timestep without signal alpha / sigma is linear instead
        ratio = schedule.snr(torch.tensor([998.0, 998.25])).sqrt()
        same(ratio[1], 0.75 * ratio[0])
        same(schedule.timestep(1 / ratio), [998.0, 998.25], 1e-9)


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 999))
def test_timestep_inverts_sigma(key: tuple[str, bool], t: float) -> None:
    schedule = SCHEDULES[key]
    alpha = float(schedule.alpha(t))
    if alpha > 0:
        found = float(schedule.timestep(schedule.sigma(t) / alpha))
        assert abs(found - t) < 1e-9 * max(t, 1), (found, t)


@pytest.mark.parametrize("t", [-1, 1000, 999.5, float("nan"), torch.tensor([3, 1000])])
def test_timesteps_outside(t: float) -> None:
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 999\], got"):
        SCHEDULES["linear", False].alpha(t)


def test_add_noise_and_velocity() -> None:
    schedule = SCHEDULES["cosine", False]
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    x, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    for i, cumprod in enumerate(schedule.alphas_cumprod[t].tolist()):
        same(x[i], cumprod**0.5 * x0[i] + (1 - cumprod) ** 0.5 * noise[i])  # DDPM eq. 4
        same(v[i], cumprod**0.5 * noise[i] - (1 - cumprod) ** 0.5 * x0[i])
    same(schedule.add_noise(x0, noise, 400)[1], x[1])
    half = schedule.add_noise(x0.half(), noise.half(), t)
    assert half.dtype == torch.float16
    # eq. 4 is eq. 2 applied t + 1 times: with x0 = 1 and no noise the shares of the signal multiply
    steps = (1 - schedule.betas[:401]).sqrt().prod()
    same(schedule.add_noise(torch.ones(()), torch.zeros(()), 400), steps, 1e-6)


def test_posterior_is_bayes() -> None:
    """q(x_{t-1} | x_t, x0) from the two normal densities it is made of (DDPM eq. 6-7)."""
    schedule = SCHEDULES["linear", False]
    x, x0 = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([1, 500, 999])
    mean, variance, log_variance = schedule.posterior(x, x0, t)
    for i, k in enumerate(t.tolist()):
        beta, before = float(schedule.betas[k]), float(schedule.alphas_cumprod[k - 1])
        # prior N(sqrt(before) x0, 1 - before), likelihood of x_t given x_{t-1}: N(sqrt(1 - beta)
        # x_{t-1}, beta)
        precision = 1 / (1 - before) + (1 - beta) / beta
        same(variance[i, 0], 1 / precision)
        same(log_variance[i, 0], -math.log(precision))
        weighted = before**0.5 * x0[i] / (1 - before) + (1 - beta) ** 0.5 * x[i] / beta
        same(mean[i], weighted / precision, 1e-10)
    mean, variance, log_variance = schedule.posterior(x, x0, torch.zeros(3, dtype=torch.int64))
    same(mean, x0)
    assert (variance == 0).all()
    same(log_variance, schedule.posterior_variance[1].log().expand(3, 1))


def test_respaced() -> None:
    """IDDPM section 4: the kept timesteps hold the same noise as before."""
    schedule = SCHEDULES["cosine", False]
    kept = timestep_spacing("linspace", 25, 1000)
    short = schedule.respaced(kept)
    assert short.num_timesteps == 25
    same(short.alphas_cumprod, schedule.alphas_cumprod[kept[::-1]])
    with pytest.raises(ValueError, match="timesteps must be at least 2 different integers"):
        schedule.respaced([5, 5])


def test_timestep_spacings() -> None:
    """Lin et al. 2023, table 2, which spaces 10 of 1000 timesteps (and counts them from 1)."""
    assert timestep_spacing("leading", 10, 1000, offset=1) == [901 - 100 * i for i in range(10)]
    assert timestep_spacing("trailing", 10, 1000) == [999 - 100 * i for i in range(10)]
    linspace = [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
    assert timestep_spacing("linspace", 10, 1000) == [t - 1 for t in reversed(linspace)]
    assert timestep_spacing("simple", 3, 1000) == [999, 666, 333]


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@given(steps=st.integers(1, 1000))
def test_timestep_spacings_are_diffusers(kind: str, steps: int) -> None:
    scheduler = import_diffusers("DDIMScheduler").DDIMScheduler(
        timestep_spacing=kind, steps_offset=0
    )
    if kind == "linspace" and steps == 1:
        return  # numpy's linspace of one point is its start, t = 0, which makes no image
    ours = timestep_spacing(kind, steps, 1000)
    assert all(a > b for a, b in pairwise(ours))
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.tolist()
    # np.arange with a stride that is not exact may give them one timestep too many, below the last
    assert ours == theirs[:steps]


def test_sigma_spacings() -> None:
    sigmas = torch.tensor(sigma_spacing("karras", 5, 0.002, 80.0), dtype=torch.float64)
    ramp = torch.arange(5) / 4
    expected = (
        80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    ) ** 7  # Karras et al. eq. 5
    same(sigmas, expected, 1e-5)
    sigmas = torch.tensor(sigma_spacing("exponential", 6, 0.01, 1000.0), dtype=torch.float64)
    same(sigmas, [1e3, 1e2, 1e1, 1, 1e-1, 1e-2])
    assert sigma_spacing("karras", 1, 0.1, 3.0) == [pytest.approx(3.0)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"kind": "quadratic"}, "unknown schedule kind 'quadratic'; expected one of linear"),
        ({"num_timesteps": 1}, "num_timesteps must be at least 2, got 1"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1, got 0.0 and 0.02"),
        ({"beta_start": 0.5}, "0 < beta_start <= beta_end < 1, got 0.5 and 0.02"),
        ({"rescale_ends": True, "num_timesteps": 10}, "must be less than 1, got 2"),
        ({"max_beta": 1.0}, "0 < max_beta < 1"),
    ],
)
def test_bad_config(broken: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ScheduleConfig(**broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.0, 0.1])), "only the last beta may be 1"),
        (lambda: NoiseSchedule(torch.tensor([0.1, -0.1])), "0 < beta <= 1, got -0.1 to 0.1"),
        (lambda: timestep_spacing("trailing", 0, 1000), "steps must be 1 to 1000 .* got 0"),
        (lambda: timestep_spacing("trailing", 1001, 1000), "steps must be 1 to 1000 .* got 1001"),
        (
            lambda: timestep_spacing("leading", 1000, 1000, offset=1),
            "must be at most 999, got 1000",
        ),
        (
            lambda: timestep_spacing("trailing", 10, 1000, offset=1),
            "it is for spacing 'leading'",
        ),
        (
            lambda: timestep_spacing("odd", 10, 1000),
            "unknown timestep spacing 'odd'; expected one of",
        ),
        (lambda: sigma_spacing("karras", 5, 0.1, math.inf), "zero-terminal-SNR .*use spacing"),
        (lambda: sigma_spacing("odd", 5, 0.1, 1), "unknown sigma spacing 'odd'; expected one of"),
        (lambda: sigma_spacing("karras", 0, 0.1, 1), "steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
