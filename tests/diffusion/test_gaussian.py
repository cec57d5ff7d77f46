"""Data N(0, s²): everything has a closed form (docs/gaussian-data.md), and is reproduced to 1e-6.

The best denoiser is linear, so a table's rows act on mean and variance exactly, and every term of
the bound is the expectation of a quadratic, which three quadrature points per variable give
exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.bound import bound
from fastdiff.diffusion.levels import Level
from fastdiff.diffusion.losses import learned_log_variance
from fastdiff.diffusion.samplers import COLUMN, SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

LINEAR = NoiseSchedule(ScheduleConfig())
COSINE = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=200))
STD, MEAN = 0.3, 0.2


def shrink(alpha: float, sigma: float, std: float = STD) -> float:
    """k with E[x0 | x] = k x."""
    return alpha * std**2 / (alpha**2 * std**2 + sigma**2)


def levels_of(table: SamplerTable) -> list[Level]:
    ratios = table.sigmas.tolist()
    return [
        Level(t, 1 / math.hypot(1, r), r / math.hypot(1, r))
        for t, r in zip(table.timesteps.tolist(), ratios, strict=True)
    ]


def pushed(table: SamplerTable, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of x after all rows with the best denoiser, through the rows' own numbers:
    the state is x and three history slots."""
    state = torch.tensor([mean, 0, 0, 0], dtype=torch.float64)
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    covariance[0, 0] = variance
    for row, level in enumerate(levels_of(table)):
        at = {name: float(table.column(name)[row]) for name in COLUMN}
        k = shrink(level.alpha, level.sigma)
        f = (k - at["U"]) / at["V"]  # the prediction, F = f x, that this D belongs to
        d = at["U"] + at["V"] * f
        step = torch.eye(4, dtype=torch.float64)
        step[0] = step.new_tensor([at["A"] + at["B"] * d, at["C1"], at["C2"], at["C3"]])
        if at["SLOT"] >= 0:
            step[1 + int(at["SLOT"])] = step.new_tensor([at["P"] + at["Q"] * d, 0, 0, 0])
        state, covariance = step @ state, step @ covariance @ step.T
        covariance[0, 0] += at["S"] ** 2
    return float(state[0]), float(covariance[0, 0])


def ddim_std(levels: list[Level]) -> float:
    """Closed form: x' = x (alpha' alpha s² + sigma' sigma) / (alpha² s² + sigma²), from N(0, 1)."""
    factor = 1.0
    for now, to in pairwise(levels):
        cross = to.alpha * now.alpha * STD**2 + to.sigma * now.sigma
        factor *= cross / (now.alpha**2 * STD**2 + now.sigma**2)
    return factor


def ancestral_variance(levels: list[Level], *, large: bool, kappa: float = 1.0) -> float:
    """Closed form of the recursion v' = g² v + s² from v = 1.

    g x is the mean of q(x' | x, k x) with the share kappa of the posterior's noise: alpha' k x +
    sqrt(sigma'² - s²) (1 - alpha k) x / sigma.
    """
    variance = 1.0
    for now, to in pairwise(levels):
        beta = 1 - (now.alpha / to.alpha) ** 2
        small = beta * (to.sigma / now.sigma) ** 2
        k = shrink(now.alpha, now.sigma)
        noise = kappa**2 * small
        g = to.alpha * k + math.sqrt(to.sigma**2 - noise) * (1 - now.alpha * k) / now.sigma
        if large and to.sigma:
            noise = beta
        variance = g**2 * variance + noise
    return variance


CLEAN = Level(-1, 1, 0)
CASES = [
    ("ddpm", {"variance": "fixed_small"}, "trailing", 50),
    ("ddpm", {"variance": "fixed_large"}, "trailing", 50),
    ("ddpm", {"variance": "fixed_small"}, "leading", 1000),
    ("ddpm", {"variance": "fixed_large"}, "leading", 1000),
    ("ddpm", {}, "10,15,20", 45),
    *(("ddim", {}, "trailing", steps) for steps in (10, 50, 100)),
    ("ddim", {}, "leading", 1000),
    ("ddim", {"eta": 0.5}, "trailing", 50),
    ("fastdpm", {"eta": 0.0}, "var-linear", 20),
    ("fastdpm", {"eta": 1.0}, "var-linear", 20),
    ("fastdpm", {"eta": 0.5}, "var-quadratic", 20),
    ("fastdpm", {"eta": 1.0}, "step-linear", 20),
    ("fastdpm", {"eta": 0.0}, "step-quadratic", 20),
]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("name", "options", "spacing", "steps"), CASES, ids=str)
def test_the_deviation_of_samples(
    name: str, options: dict, spacing: str, steps: int, prediction: str
) -> None:
    table = build_table(name, LINEAR, steps, spacing=spacing, prediction=prediction, **options)
    levels = [*levels_of(table), CLEAN]
    if name == "ddim" and not options:
        expected = ddim_std(levels)
    else:
        large = options.get("variance") == "fixed_large"
        kappa = options.get("eta", 1.0)
        expected = math.sqrt(ancestral_variance(levels, large=large, kappa=kappa))
    mean, variance = pushed(table, 0.0, 1.0)
    assert mean == 0
    assert math.sqrt(variance) == pytest.approx(expected, rel=1e-9)


def test_the_deviation_tends_to_the_datas() -> None:
    """DDIM is a solver of order 1: ten times the steps, a tenth of the error."""
    errors = []
    for steps in (50, 100, 1000):
        spacing = "leading" if steps == 1000 else "trailing"
        _, variance = pushed(build_table("ddim", LINEAR, steps, spacing=spacing), 0.0, 1.0)
        errors.append(1 - math.sqrt(variance) / STD)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_the_rows_do_what_was_pushed_through_them() -> None:
    """The sampling loop itself, applied to a mean and without noise."""
    table = build_table("dpmpp-2m", LINEAR, 12, prediction="x0")
    levels = levels_of(table)
    x = torch.full((1, 1), MEAN, dtype=torch.float64)
    ends = sample(lambda x, row: shrink(levels[row].alpha, levels[row].sigma) * x, table, x, [0])
    # An x0 prediction has V = 1 and U = 0, so `pushed` reads off the same D.
    assert float(ends) == pytest.approx(pushed(table, MEAN, 0.0)[0], rel=1e-12)


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """x0 and noise at nine points, and their weights: exact for polynomials of degree 5."""
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.tensor([[STD * a, b] for a in points for b in points], dtype=torch.float64)
    weight = torch.tensor([a * b for a in weights for b in weights]).double() / (2 * math.pi)
    return grid[:, :1], grid[:, 1:], weight


def expected_terms(schedule: NoiseSchedule, log_variance: Tensor, bin_width: float) -> list[float]:
    """docs/gaussian-data.md: each term in bits, index t."""
    terms = []
    for t in range(schedule.num_timesteps):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        error = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # E (x0 - D)²
        p = math.exp(log_variance[t])
        if t == 0:
            nats = 0.5 * (math.log(2 * math.pi * p) + error / p) - math.log(bin_width)
        else:
            before, beta = float(schedule.alphas_cumprod[t - 1]), float(schedule.betas[t])
            q = beta * (1 - before) / sigma**2
            c = math.sqrt(before) * beta / sigma**2
            nats = 0.5 * (math.log(p / q) - 1 + q / p + c**2 * error / p)
        terms.append(nats / math.log(2))
    return terms


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("timesteps", [None, range(0, 200, 8)], ids=["all", "respaced"])
def test_the_bound(prediction: str, variance: str, timesteps: range | None) -> None:
    x0, noise, weight = quadrature()
    process = COSINE if timesteps is None else COSINE.respaced(timesteps)
    width, said = 1e-6, 0.3

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
        d = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
        eps_hat = (x - alpha * d) / sigma
        f = {"x0": d, "eps": eps_hat, "v": alpha * eps_hat - sigma * d}[prediction]
        return torch.cat([f, torch.full_like(f, said)], 1)

    result = bound(
        network,
        COSINE,
        x0,
        lambda index: noise,
        prediction=prediction,  # type: ignore[arg-type]
        variance=variance,  # type: ignore[arg-type]
        bin_width=width,
        timesteps=timesteps,
    )
    t = torch.arange(process.num_timesteps)
    small = process.posterior_log_variance_clipped
    log_variance = {
        "fixed_small": small,
        "fixed_large": torch.cat([small[:1], process.betas[1:].log()]),
        "learned": learned_log_variance(
            process, torch.full((len(t), 1), said, dtype=torch.float64), t
        )[:, 0],
    }[variance]
    ours = (weight[:, None] * result.terms).sum(0).tolist()
    assert ours == pytest.approx(expected_terms(process, log_variance, width), rel=1e-6, abs=1e-9)
    last = float(process.alphas_cumprod[-1])
    prior = 0.5 * ((1 - last) + last * STD**2 - 1 - math.log(1 - last)) / math.log(2)
    assert float((weight * result.prior).sum()) == pytest.approx(prior, rel=1e-6)
    assert result.timesteps == tuple(range(200) if timesteps is None else timesteps)
    # A bound: never below the entropy of the data in bins of this width.
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) - math.log2(width)
    assert float((weight * result.total).sum()) > entropy


@pytest.mark.parametrize("total", [3, 10, 200])
def test_the_bound_of_the_exact_reverse_process_is_tight(total: int) -> None:
    """On Gaussian data p(x_{t-1} | x_t) is Gaussian, and its variance lies between beta-tilde and
    beta. A network that says so has the entropy as its bound, at any number of steps, but for the
    noise that x starts as: KL(q(x_T) || N(0, 1))."""
    schedule = NoiseSchedule(ScheduleConfig(num_timesteps=total, beta_end=0.2))
    x0, noise, weight = quadrature()
    width = 1e-6

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        d = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
        error = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        beta = schedule.betas[t][:, None]
        before = torch.cat([torch.ones(1).double(), schedule.alphas_cumprod])[t][:, None]
        exact = beta * (1 - before) / sigma**2 + before * (beta / sigma**2) ** 2 * error
        low = schedule.posterior_log_variance_clipped[t][:, None]
        said = 2 * (exact.log() - low) / (beta.log() - low) - 1
        return torch.cat([d, said], 1)

    result = bound(
        network,
        schedule,
        x0,
        lambda index: noise,
        prediction="x0",
        variance="learned",
        bin_width=width,
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) - math.log2(width)
    last = float(schedule.alphas_cumprod[-1])
    end = last * STD**2 + 1 - last
    start = 0.5 * (end - 1 - math.log(end)) / math.log(2)
    assert float((weight * result.total).sum()) == pytest.approx(entropy + start, rel=1e-6)


def test_bad_bounds() -> None:
    x0 = torch.zeros(2, 1)
    common = {"prediction": "x0", "bin_width": 0.1, "timesteps": [0, 5]}
    with pytest.raises(ValueError, match="unknown variance 'big'; expected one of fixed_small"):
        bound(lambda x, t: x, COSINE, x0, lambda i: x0, variance="big", **common)  # type: ignore
    with pytest.raises(ValueError, match="returned 1 channels for 1, expected 2"):
        bound(lambda x, t: x, COSINE, x0, lambda i: x0, variance="learned", **common)
    with pytest.raises(ValueError, match="returned 3 channels for 1, expected 1"):
        bound(
            lambda x, t: x.expand(2, 3), COSINE, x0, lambda i: x0, variance="fixed_small", **common
        )
