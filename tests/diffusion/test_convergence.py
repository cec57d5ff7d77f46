"""Samplers on a Gaussian mixture with its exact denoiser: order of convergence, and the right
distribution.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.levels import CLEAN, Level, levels_at, levels_of_sigmas
from fastdiff.diffusion.samplers import COLUMN, SAMPLERS, build_table, table_of_levels
from fastdiff.diffusion.sampling import Step, sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig, sigma_spacing
from tests.diffusion.mixture import (
    MEAN,
    MEANS,
    STDS,
    VARIANCE,
    WEIGHTS,
    along,
    exact_end,
    exact_network,
    responsibilities,
)

# sigma / alpha from 12 down to 0.14 only: at t = 0 of a usual schedule the error of the last
# steps would be too small to have a slope.
COARSE = NoiseSchedule(
    ScheduleConfig(kind="linear", beta_start=0.02, beta_end=0.05, num_timesteps=140)
)


def smooth_timesteps(kind: str, steps: int) -> list[float]:
    """steps descending timesteps from T - 1 that reach t = 0 with the next one, along a smooth
    curve.
    """
    last = COARSE.num_timesteps - 1
    if kind == "even":
        return [last * (1 - i / steps) for i in range(steps)]
    ends = (float(COARSE.sigma(t) / COARSE.alpha(t)) for t in (0, last))
    sigmas = torch.tensor(sigma_spacing(kind, steps + 1, *ends), dtype=torch.float64)
    return COARSE.timestep(sigmas).tolist()[:-1]


ORDERS = [
    ("euler", {}, "karras", 1),
    ("ddim", {}, "even", 1),
    ("heun", {}, "karras", 2),
    ("dpmpp-2m", {}, "exponential", 2),
    ("dpmpp-2m", {"lower_order_final": False}, "karras", 2),
    # Its weights are Adams and Bashforth's for even steps in sigma / alpha; on other steps
    # only order 2 is left.
    ("plms", {}, "karras", 2),
]
MORE_ORDERS = [
    ("flow-euler", {}, "even", 1),
    ("flow-heun", {}, "even", 2),
    ("ipndm", {}, "karras", 2),
    ("dpmpp-2m", {"lower_order_final": False, "solver_type": "heun"}, "karras", 2),
    # The code that its authors published has half of the third-order term.
    ("dpmpp-3m", {}, "exponential", 2),
    # The corrector is worth one order, and a last step of order 1 costs it.
    ("unipc", {}, "karras", 2),
    ("unipc", {"lower_order_final": False}, "karras", 3),
    ("unipc", {"lower_order_final": False, "solver_type": "bh1"}, "karras", 3),
    ("unipc", {"lower_order_final": False, "solver_order": 3}, "karras", 4),
    ("dpm-solver-2", {}, "karras", 2),
    ("dpm-solver-3", {}, "exponential", 3),
    ("dpmpp-2s", {}, "karras", 2),
    ("dpm-singlestep", {}, "karras", 2),
    (
        "dpm-singlestep",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        "karras",
        3,
    ),
    (
        "dpm-singlestep",
        {"solver_order": 3, "estimate": "eps", "lower_order_final": False},
        "karras",
        3,
    ),
]


@pytest.fixture(scope="module")
def ode() -> tuple[Tensor, Tensor]:
    """Noise, and the solution of the ODE for it from T - 1 to t = 0, as in every table below."""
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, exact_end(x, build_table("euler", COARSE, 2, spacing="karras", final="sigma_min"))


@pytest.mark.parametrize(
    ("name", "options", "kind", "order", "prediction"),
    [
        *((*case, prediction) for prediction in ("eps", "v") for case in ORDERS),
        *((*case, "eps") for case in MORE_ORDERS),
    ],
)
def test_order(
    name: str, options: dict, kind: str, order: int, prediction: str, ode: tuple[Tensor, Tensor]
) -> None:
    x, exact = ode
    network = exact_network(COARSE, prediction)
    counts, errors = [64, 91, 128, 181], []
    if (name, options, kind, order) in MORE_ORDERS:
        counts = [66, 132]  # groups of 2 and 3 leave nothing over
    for steps in counts:
        table = build_table(
            name,
            COARSE,
            steps,
            prediction=prediction,
            spacing=smooth_timesteps(kind, steps),
            final="sigma_min",
            **options,
        )
        result = sample(along(table, network), table, x, range(64))
        errors.append(float((result - exact).square().mean().sqrt()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, f"order {slope:.3f}, expected {order}; errors {errors}"


def test_the_stated_order_of_every_sampler_is_tested() -> None:
    tested = {name: order for name, _, _, order in reversed([*ORDERS, *MORE_ORDERS])}
    tested |= {name: order for name, options, order in STOCHASTIC if not options}
    tested |= dict.fromkeys(STARTED_BY_EULER, 2)
    for name, same in (("fastdpm", "ddim"), ("kdpm2", "dpm-solver-2")):
        options = {"eta": 1.0} if same == "ddim" else {}
        tables = [build_table(n, COARSE, 7, spacing="trailing", **options) for n in (name, same)]
        assert torch.equal(tables[0].columns, tables[1].columns)
        tested[name] = tested[same]
    stated = {name: sampler.order for name, sampler in SAMPLERS.items()}
    assert stated == {**tested, "lcm": None, "tcd": None}


@pytest.mark.parametrize(
    ("name", "order"), [("lms", 1), ("lms", 2), ("lms", 3), ("lms", 4), ("deis", 2), ("deis", 3)]
)
def test_order_of_a_step_with_its_whole_history(name: str, order: int) -> None:
    """From exact slopes, the error of one step falls with the power order + 1 of its length.

    The start of these samplers has lower orders, which decide how all steps together converge.
    """
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network, lengths, errors = exact_network(COARSE), [0.2, 0.1, 0.05], []
    for length in lengths:
        sigmas = [2.0 * math.exp(-length * place) for place in range(order + 1)]
        table = table_of_levels(name, levels_of_sigmas(COARSE, sigmas), solver_order=order)
        exact = [
            exact_end(x, SimpleNamespace(sigmas=[2.0], final_sigma=sigma)) if place else x
            for place, sigma in enumerate(sigmas)
        ]

        def put_right(step: Step, exact: list[Tensor] = exact) -> None:
            if step.done < step.total:
                step.x.copy_(exact[step.done])

        result = sample(along(table, network), table, x, range(64), on_step=put_right)
        errors.append(float((result - exact[-1]).square().mean().sqrt()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(slopes[-1] - order - 1) < 0.35, f"powers {slopes}, expected {order + 1}; {errors}"
    assert abs(slopes[-1] - order - 1) < abs(slopes[0] - order - 1) + 0.05


STARTED_BY_EULER = ("lms", "deis")


@pytest.mark.parametrize("name", STARTED_BY_EULER)
def test_an_euler_step_at_the_start_limits_the_order_to_2(name: str) -> None:
    """On an interval where the slope changes from the start; from pure noise it hardly shows."""
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact, errors = exact_end(x, SimpleNamespace(sigmas=[0.6], final_sigma=0.15)), []
    for steps in (24, 48):
        sigmas = [0.6 * (0.15 / 0.6) ** (place / steps) for place in range(steps + 1)]
        table = table_of_levels(name, levels_of_sigmas(COARSE, sigmas))
        result = sample(along(table, exact_network(COARSE)), table, x, range(64))
        errors.append(float((result - exact).square().mean().sqrt()))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1


def test_ddim_upwards_encodes() -> None:
    """Samples of N(0, std²): the ODE keeps their quantile, x_T / x_0 = sd(x_T) / sd(x_0), and the
    error of a solver of order 1 halves with twice the steps."""
    std, errors = 0.6, []

    def level(t: float) -> Level:
        return Level(t, float(COARSE.alpha(t)), float(COARSE.sigma(t)))

    def sd(at: Level) -> float:
        return math.hypot(at.alpha * std, at.sigma)

    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for steps in (200, 400):
        last = COARSE.num_timesteps - 1
        levels = [level(last * i / steps) for i in range(steps + 1)]
        table = table_of_levels("ddim", levels, prediction="x0")

        def predict(x: Tensor, row: int, levels: list[Level] = levels) -> Tensor:
            at = levels[row]
            return at.alpha * std**2 / sd(at) ** 2 * x

        encoded = sample(predict, table, x, range(16))
        exact = x * sd(levels[-1]) / sd(levels[0])
        errors.append(float((encoded - exact).norm() / exact.norm()))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    with pytest.raises(ValueError, match=r"eta must be 0 for ascending levels .* got 1\.0"):
        table_of_levels("ddim", levels, eta=1.0)
    with pytest.raises(ValueError, match="begin at t = 0"):
        table_of_levels("ddim", [CLEAN, *levels])


def test_encoding_and_decoding_return_at_order_1() -> None:
    """Points of the mixture, up the ODE and down again: the error halves with twice the steps, and
    the encoded noise is where the exact ODE comes from."""
    network = exact_network(COARSE)
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(32, 2, dtype=torch.float64, generator=generator)
    whole = build_table("euler", COARSE, 2, spacing="karras", final="sigma_min")
    x0 = exact_end(start, whole)  # at t = 0, from known noise
    errors, codes = [], []
    for steps in (50, 100, 200):
        last = COARSE.num_timesteps - 1
        levels = levels_at(COARSE, [last * i / steps for i in range(steps + 1)])
        up, down = (table_of_levels("ddim", path) for path in (levels, levels[::-1]))
        code = sample(along(up, network), up, x0, range(32))
        back = sample(along(down, network), down, code, range(32))
        errors.append(float((back - x0).norm() / x0.norm()))
        codes.append(float((code - start).norm() / start.norm()))
    for found in (errors, codes):
        assert found[0] / found[1] == pytest.approx(2, rel=0.15)
        assert found[1] / found[2] == pytest.approx(2, rel=0.15)


STOCHASTIC = [
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler-ancestral", {}, 1),
    ("dpmpp-2m-sde", {}, 2),
    ("dpmpp-2m-sde", {"eta": 0.5}, 2),
    ("dpmpp-2m-sde", {"solver_type": "heun"}, 2),
    ("dpmpp-3m-sde", {}, 2),
    ("kdpm2-ancestral", {}, 2),
    ("dpmpp-2s-ancestral", {}, 2),
    ("dpmpp-sde", {}, 2),
    ("dpmpp-sde", {"eta": 0.5}, 2),
    ("euler", {"s_churn": 4.0}, 1),
    ("heun", {"s_churn": 10.0}, 2),
    ("heun", {"s_churn": 10.0, "s_tmin": 0.5, "s_tmax": 5.0}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), STOCHASTIC, ids=str)
def test_distribution(name: str, options: dict, order: int) -> None:
    """From the mixture's own marginal at T - 1 to that at t = 0: mean, variance and weights of
    the parts.

    Within 5 standard errors, which 42 such numbers pass by chance all but once in 40,000 (and
    the samples are the same each time). test_variance_of_a_gaussian gives the bias of the steps:
    half a standard error.
    """
    n, steps = 3000, 300
    generator = torch.Generator().manual_seed(2)
    part = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    noise = torch.randn(2, n, 2, dtype=torch.float64, generator=generator)
    x0 = MEANS[part] + STDS[part, None] * noise[0]
    x = COARSE.add_noise(x0, noise[1], COARSE.num_timesteps - 1)
    spacing = smooth_timesteps("exponential", steps)
    table = build_table(name, COARSE, steps, spacing=spacing, final="sigma_min", **options)
    x = sample(along(table, exact_network(COARSE)), table, x, range(n))
    alpha, sigma = COARSE.alpha(0), COARSE.sigma(0)
    for what, values, expected in (
        ("mean", x, alpha * MEAN),
        ("variance", (x - alpha * MEAN).square(), alpha**2 * VARIANCE + sigma**2),
        ("weights", responsibilities(x / alpha, float(sigma / alpha)), WEIGHTS),
    ):
        z = (values.mean(0) - expected) / (values.std(0) / n**0.5)
        assert z.abs().max() < 5, f"{what}: {values.mean(0)}, expected {expected}; z = {z}"


@pytest.mark.parametrize(("name", "options", "order"), STOCHASTIC, ids=str)
def test_variance_of_a_gaussian(name: str, options: dict, order: int) -> None:
    """On Gaussian data D is linear in x, so the samples' variance follows from the table without
    sampling.

    It must tend to the data's with the sampler's weak order.
    """
    data = 0.3**2
    counts, errors = [128, 256, 512], []
    for steps in counts:
        spacing = smooth_timesteps("exponential", steps)
        table = build_table(name, COARSE, steps, spacing=spacing, final="sigma_min", **options)
        alphas, sigmas = (f(table.timesteps) for f in (COARSE.alpha, COARSE.sigma))
        shrink = alphas * data / (alphas**2 * data + sigmas**2)  # D = shrink * x
        covariance = torch.zeros(4, 4, dtype=torch.float64)  # of x and three history slots
        covariance[0, 0] = alphas[0] ** 2 * data + sigmas[0] ** 2
        for row, k in enumerate(shrink):
            at = {name: float(table.column(name)[row]) for name in COLUMN}
            step = torch.eye(4, dtype=torch.float64)
            step[0] = torch.tensor([at["A"] + at["B"] * k, at["C1"], at["C2"], at["C3"]])
            if at["SLOT"] >= 0:
                step[1 + int(at["SLOT"])] = torch.tensor([at["P"] + at["Q"] * k, 0, 0, 0])
            covariance = step @ covariance @ step.T
            covariance[0, 0] += at["S"] ** 2
        expected = float(COARSE.alpha(0) ** 2 * data + COARSE.sigma(0) ** 2)
        errors.append(float(covariance[0, 0]) / expected - 1)
    slope = -np.polyfit(np.log(counts), np.log(np.abs(errors)), 1)[0]
    assert abs(slope - order) < 0.15, f"order {slope:.3f}; relative errors of the variance {errors}"


@pytest.mark.parametrize("name", ["heun", "plms"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [4, 12, 50])
def test_a_first_step_out_of_noise_alone(name: str, kind: str, steps: int) -> None:
    """A cosine schedule begins at sigma / alpha 20,000 and its first step goes to 10: the slope
    there, weighted with the whole length of the step, would drown the image.
    """
    schedule = NoiseSchedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network, seeds = exact_network(schedule, "v"), torch.arange(64)
    exact = exact_end(x, build_table("euler", schedule, steps, final="sigma_min"))
    errors = {}
    for sampler in (name, "euler"):
        table = build_table(sampler, schedule, steps, prediction="v")
        result = sample(along(table, network), table, x, seeds)
        errors[sampler] = float((result - exact).square().mean().sqrt())
    assert errors[name] < errors["euler"]
