"""Flow matching: the change of variables, samplers, training and diffusers' schedulers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.checkpoint.scheduler import SamplerSettings, read_scheduler, scheduler_config
from fastdiff.diffusion.flow import for_pixels, shifted
from fastdiff.diffusion.levels import CLEAN, levels_at
from fastdiff.diffusion.losses import min_snr_weight
from fastdiff.diffusion.predictions import input_scale, target, to_denoised
from fastdiff.diffusion.samplers import SAMPLERS, SamplerTable, build_table, table_of_levels
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import (
    FlowSchedule,
    NoiseSchedule,
    ScheduleConfig,
    check_flow,
    noise_schedule,
)
from fastdiff.runtime.engine import _levels_after
from fastdiff.training.objective import DenoiserLossConfig, Objective
from tests.diffusion.mixture import denoise, exact_end
from tests.support.peers import import_diffusers

FLOW = FlowSchedule(ScheduleConfig(kind="flow"))
SD3 = FlowSchedule(ScheduleConfig(kind="flow", shift=3.0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shares(table: SamplerTable) -> list[float]:
    return [t / 1000 for t in table.timesteps.tolist()]


# --- the change of variables ---


def test_the_straight_path_in_variance_preserving_terms() -> None:
    """x_s = (1 - s) x0 + s n is (alpha x0 + sigma n) / (alpha + sigma), and D follows from F."""
    t = torch.linspace(0, 1000, 11, dtype=torch.float64)
    alpha, sigma, s = FLOW.alpha(t), FLOW.sigma(t), t / 1000
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(11).double(), rtol=1e-15, atol=0)
    torch.testing.assert_close(sigma / (alpha + sigma), s, rtol=1e-15, atol=0)
    x0, n = noise(11), noise(11, seed=1)
    seen = FLOW.add_noise(x0, n, t)
    torch.testing.assert_close(seen, (1 - s) * x0 + s * n, rtol=1e-14, atol=0)
    for i in range(11):
        a, b = float(alpha[i]), float(sigma[i])
        x = a * x0[i] + b * n[i]
        assert float(x) * input_scale(a, b, "flow") == pytest.approx(float(seen[i]), rel=1e-14)
        u, v = to_denoised(a, b, "flow")
        f = target("flow", x0[i], n[i], alpha[i], sigma[i])
        assert float(u * x + v * f) == pytest.approx(float(x0[i]), rel=1e-12)
    assert float(FLOW.alpha(300.3)) == pytest.approx(0.6997 / math.hypot(0.6997, 0.3003), rel=1e-15)
    torch.testing.assert_close(FLOW.timestep(sigma[1:] / alpha[1:]), t[1:], rtol=1e-12, atol=0)


def test_levels_and_errors_of_the_schedule() -> None:
    for t in (-1e-9, 1000.001):
        with pytest.raises(ValueError, match=r"timesteps must be in \[0, 1000\]"):
            FLOW.alpha(t)
    with pytest.raises(ValueError, match="no betas"):
        FLOW.posterior(noise(1), noise(1), torch.tensor([3]))
    with pytest.raises(ValueError, match="cannot be respaced"):
        FLOW.respaced([1, 2])
    with pytest.raises(ValueError, match="'flow' has no betas; make it with"):
        NoiseSchedule(ScheduleConfig(kind="flow"))
    with pytest.raises(ValueError, match="shift is for schedule 'flow', got 3"):
        ScheduleConfig(shift=3.0)
    with pytest.raises(ValueError, match="shift must be positive and finite, got 0"):
        ScheduleConfig(kind="flow", shift=0.0)
    with pytest.raises(ValueError, match="zero_terminal_snr must be False"):
        ScheduleConfig(kind="flow", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="spacing must be trailing or linspace"):
        build_table("flow-euler", FLOW, 5, prediction="flow", spacing="karras")
    with pytest.raises(ValueError, match="steps_offset must be 0 with flow matching"):
        build_table("flow-euler", FLOW, 5, prediction="flow", steps_offset=1)
    with pytest.raises(ValueError, match="belong together, got prediction 'eps' and schedule 'fl"):
        build_table("flow-euler", FLOW, 5)
    with pytest.raises(ValueError, match="belong together, got prediction 'flow' and schedule 'of"):
        build_table("ddim", NoiseSchedule(ScheduleConfig()), 5, prediction="flow")
    for kind, prediction in (("flow", "eps"), ("linear", "flow")):
        with pytest.raises(ValueError, match="belong together"):
            check_flow(kind, prediction)
    assert type(noise_schedule(ScheduleConfig())) is NoiseSchedule


def test_shifts() -> None:
    """Esser et al. 2024, eq. 23: the log-odds of s move by log(shift), so shifts multiply."""
    s = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(
        torch.logit(shifted(s[1:-1], 3.0)), torch.logit(s[1:-1]) + math.log(3), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(shifted(shifted(s, 2.0), 1.5), shifted(s, 3.0))
    ends = shifted(s, 3.0)
    assert (float(ends[0]), float(ends[-1])) == (0.0, 1.0)
    config = ScheduleConfig(kind="flow", shift=3.0)
    assert for_pixels(config, 512**2, trained=1024**2).shift == pytest.approx(1.5)
    assert for_pixels(config, 1024**2, trained=1024**2) == config
    with pytest.raises(ValueError, match="kind 'flow' and positive numbers"):
        for_pixels(ScheduleConfig(), 1, 1)


# --- samplers ---


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_ends_on_a_point_that_the_network_knows(name: str, spacing: str) -> None:
    """Started from pure noise, where alpha is 0, noise in the steps or not."""
    if name == "lcm":
        return  # its boundary conditions mix some of x into the last estimate
    if SAMPLERS[name].needs_signal:
        with pytest.raises(ValueError, match="level of flow matching; use 'flow-heun'"):
            build_table(name, SD3, 6, prediction="flow", spacing=spacing)
        return
    point = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)
    table = build_table(
        name, SD3, 6, prediction="flow", spacing=spacing if name != "fastdpm" else "trailing"
    )
    s = shares(table)
    assert s[0] == 1

    def predict(x: Tensor, row: int) -> Tensor:
        return (x - point) / s[row]

    result = sample(predict, table, noise(3, 2, 4), [5, 6, 7])
    torch.testing.assert_close(result, point.expand(3, 2, 4), rtol=1e-9, atol=1e-9)
    drawn = table.column("S") > 0  # rows that bring their own noise say so to a learned variance
    log_s = 2 * table.column("S")[drawn].log()
    torch.testing.assert_close(table.column("LOGVAR_MIN")[drawn], log_s, rtol=1e-12, atol=1e-12)


def test_flow_euler_is_ddim_and_euler() -> None:
    tables = [
        build_table(n, SD3, 9, prediction="flow").columns for n in ("flow-euler", "ddim", "euler")
    ]
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tables[0], tables[2], rtol=1e-12, atol=1e-12)


ORDERS = [("flow-euler", 1), ("flow-heun", 2), ("heun", 2), ("dpmpp-2m", 2), ("dpm-solver-2", 2)]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_order(name: str, order: int) -> None:
    """On a Gaussian mixture with its exact network, from s = 0.92 to s = 0.1."""
    x, errors = noise(64, 2), []
    counts = [64, 128]
    for steps in counts:
        s = torch.linspace(0.92, 0.1, steps + 1, dtype=torch.float64)
        levels = levels_at(FLOW, (1000 * s).tolist())
        table = table_of_levels(name, levels, schedule=FLOW, prediction="flow")
        at = shares(table)

        def predict(x: Tensor, row: int, at: list[float] = at) -> Tensor:
            s = at[row]
            return (x - denoise(x / (1 - s), s / (1 - s))) / s

        result = sample(predict, table, x * table.scales[0], list(range(64)))
        errors.append(float((result / table.scales[-1] - exact_end(x, table)).abs().max()))
    measured = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
    assert abs(measured - order) < 0.15, (measured, errors)


def test_masks_and_image_to_image_start_on_the_straight_path() -> None:
    table = build_table("flow-heun", SD3, 8, prediction="flow", start=3)
    s = shares(table)
    level = table.initial_level
    assert (level.alpha, level.sigma) == pytest.approx((1 - s[0], s[0]))
    after = _levels_after(table)
    expected = torch.tensor([[1 - q, q] for q in [*s[1:], 0.0]], dtype=torch.float64)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
    # tables of other predictions are as they were
    plain = build_table("heun", NoiseSchedule(ScheduleConfig()), 8, start=3)
    assert (plain.scales == 1).all()
    assert _levels_after(plain)[0].square().sum() == pytest.approx(1)


# --- diffusers ---


def network(x: Tensor, s: float) -> Tensor:
    """A smooth function of both that no solver integrates exactly."""
    return torch.tanh(1.3 * x + 0.4 * s) - 0.6 * torch.cos(2 * x) * s


def theirs(scheduler: Any, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 10, 28])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),  # Stable Diffusion 3
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0.5, "num_train_timesteps": 500}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
def test_diffusers_trajectories(name: str, options: dict[str, Any], steps: int) -> None:
    """Their scheduler_config.json, read as ours, gives their timesteps and their samples."""
    scheduler = getattr(import_diffusers(name), name)(**options)
    read = read_scheduler(json.loads(scheduler.to_json_string()))
    assert read.prediction == "flow"
    assert read.sampler is not None
    schedule = noise_schedule(read.schedule)
    total = schedule.num_timesteps
    arguments = read.sampler.arguments(schedule, steps)
    table = build_table(read.sampler.sampler, schedule, steps, prediction="flow", **arguments)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.double()
    torch.testing.assert_close(table.timesteps, expected, rtol=1e-6, atol=1e-5)
    x = noise(3, 2, 4, 5)

    def predict(x: Tensor, row: int) -> Tensor:
        return network(x, float(table.timesteps[row]) / total)

    ours = sample(predict, table, x, [1, 2, 3])
    peer = x
    for t in scheduler.timesteps:
        peer = scheduler.step(network(peer, float(t) / total), t, peer, return_dict=False)[0]
    assert (ours - peer).abs().max() <= 1e-5 * peer.abs().max()


def test_sigmas_that_a_pipeline_passes_are_our_trailing() -> None:
    """Flux and others pass evenly spaced sigmas from 1 to 1 / steps."""
    name = "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(import_diffusers(name), name)(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12))
    table = build_table("flow-euler", SD3, 12, prediction="flow")
    torch.testing.assert_close(table.timesteps, scheduler.timesteps.double(), rtol=1e-6, atol=1e-5)
    x = noise(3, 2, 4, 5)
    s = shares(table)
    ours = sample(lambda x, row: network(x, s[row]), table, x, [1, 2, 3])
    peer = theirs(scheduler, x)
    assert (ours - peer).abs().max() <= 1e-5 * peer.abs().max()


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_another_solver_of_theirs_in_flow_space() -> None:
    """DPM-Solver++ 2M on their flow sigmas: the same table as for any prediction."""
    name = "DPMSolverMultistepScheduler"
    scheduler = getattr(import_diffusers(name), name)(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(16)
    sigmas = scheduler.sigmas.double()[:-1].tolist()
    timesteps = [1000 * s for s in sigmas]
    table = build_table("dpmpp-2m", SD3, 16, prediction="flow", spacing=timesteps)
    x = noise(3, 2, 4, 5)
    ours = sample(lambda x, row: network(x, sigmas[row]), table, x, [1, 2, 3])
    peer = x
    for s, t in zip(sigmas, scheduler.timesteps, strict=True):
        peer = scheduler.step(network(peer, s), t, peer, return_dict=False)[0]
    assert (ours - peer).abs().max() <= 1e-5 * peer.abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dynamic_shifting": True}, "with use_dynamic_shifting"),
        ({"shift_terminal": 0.1}, "with shift_terminal"),
        ({"use_karras_sigmas": True}, "with use_karras_sigmas"),
        ({"stochastic_sampling": True}, "with stochastic_sampling"),
        ({"magic": 3}, "with magic"),
    ],
)
def test_settings_without_a_table_are_said_and_the_model_is_read(
    options: dict[str, Any], reason: str
) -> None:
    data = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, **options}
    read = read_scheduler(data)
    assert (read.schedule.kind, read.prediction, read.sampler) == ("flow", "flow", None)
    assert reason in read.no_sampler
    # dynamic shifting replaces the fixed shift
    assert read.schedule.shift == (1.0 if "use_dynamic_shifting" in options else 3.0)


@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun"])
def test_a_scheduler_is_written_as_it_is_read(sampler: str) -> None:
    schedule = ScheduleConfig(kind="flow", shift=3.0, num_timesteps=500)
    settings = SamplerSettings(sampler=sampler, spacing="linspace")
    data = scheduler_config(schedule, "flow", settings)
    read = read_scheduler(json.loads(json.dumps(data)))
    assert (read.schedule, read.prediction, read.sampler) == (schedule, "flow", settings)
    peer = getattr(import_diffusers(data["_class_name"]), data["_class_name"]).from_config(data)
    assert (peer.config.shift, peer.config.num_train_timesteps) == (3.0, 500)
    with pytest.raises(ValueError, match="no scheduler of flow matching"):
        scheduler_config(schedule, "flow", SamplerSettings(sampler="heun"))


# --- training ---


def objective(schedule: NoiseSchedule = SD3, **options: Any) -> Objective:
    config = DenoiserLossConfig(**options)
    return Objective(config=config, schedule=schedule, prediction="flow")


def test_logit_normal_timesteps_are_normal_in_log_odds() -> None:
    """Esser et al. 2024, section 3.1, shifted: logit(s) ~ N(mean + log(shift), std²)."""
    count = 20_000
    drawn = objective(timesteps="logit-normal", logit_mean=-0.3, logit_std=0.8)
    t = drawn.timesteps(count, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    odds = torch.logit(t / 1000)
    assert float(odds.mean()) == pytest.approx(-0.3 + math.log(3), abs=4 * 0.8 / count**0.5)
    assert float(odds.std()) == pytest.approx(0.8, abs=4 * 0.8 / (2 * count) ** 0.5)


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_uniform_timesteps_reach_noise_and_never_the_clean_sample(kind: str) -> None:
    count = 4096
    t = objective(timesteps=kind).timesteps(count, torch.Generator().manual_seed(0))
    before = shifted(t / 1000, 1 / 3)  # takes the shift back
    assert float(before.min()) > 0
    assert float(before.max()) <= 1
    edges = torch.linspace(0, 1, 9, dtype=torch.float64)
    share = torch.histogram(before, edges).hist / count
    spread = 4 * math.sqrt(1 / 8 * 7 / 8 / count) if kind == "uniform" else 2 / count
    assert (share - 1 / 8).abs().max() <= spread


def test_the_best_linear_network_of_gaussian_data() -> None:
    """For x0 ~ N(0, c²), E[n - x0 | x_s] = x_s (s - (1 - s) c²) / (s² + (1 - s)² c²)."""
    count, c, s = 200_000, 0.7, 0.35
    x0, n = c * noise(count), noise(count, seed=1)
    t = torch.full((count,), 1000 * s, dtype=torch.float64)
    x = SD3.add_noise(x0, n, t)
    best = (s - (1 - s) * c**2) / (s**2 + (1 - s) ** 2 * c**2)

    def loss(slope: float) -> float:
        given = x[:, None]
        return float(objective().loss(slope * given, given, x0[:, None], n[:, None], t))

    lowest = loss(best)
    # the loss is a parabola of curvature E[x_s²] about the best slope
    power = s**2 + (1 - s) ** 2 * c**2
    for off in (-0.1, 0.1):
        assert loss(best + off) - lowest == pytest.approx(power * off**2, rel=0.1)
    variance = 1 + c**2 - best**2 * power
    assert lowest == pytest.approx(variance, rel=0.02)


def test_min_snr_weights_of_a_loss_on_the_flow() -> None:
    """|F - F_hat|² = (sqrt(SNR) + 1)² |x0 - D|² at the same x."""
    t = torch.tensor([50.0, 400.0, 990.0]).double()
    x0, d, n = noise(3), noise(3, seed=1), noise(3, seed=2)
    x = SD3.add_noise(x0, n, t)
    s = t / 1000
    flow, flow_hat = (x - x0) / s, (x - d) / s
    snr = SD3.snr(t)
    ratio = (flow - flow_hat).square() / (x0 - d).square()
    torch.testing.assert_close(ratio, (snr.sqrt() + 1).square(), rtol=1e-10, atol=0)
    weighted = min_snr_weight(snr, "flow") * ratio
    torch.testing.assert_close(weighted, snr.clamp(max=5.0), rtol=1e-10, atol=0)


def test_the_end_of_a_table_is_clean() -> None:
    table = build_table("flow-heun", FLOW, 4, prediction="flow")
    assert table.final_sigma == CLEAN.ve_sigma == 0
    assert float(table.scales[-1]) == float(table.scales[0]) == 1


def test_a_spacing_that_flow_matching_lacks_is_not_a_default() -> None:
    """fastdpm's own is of a schedule of betas."""
    schedule = FlowSchedule(ScheduleConfig(kind="flow"))
    default, trailing = (
        build_table("fastdpm", schedule, 5, prediction="flow", spacing=spacing)
        for spacing in (None, "trailing")
    )
    assert torch.equal(default.columns, trailing.columns)
    with pytest.raises(ValueError, match="trailing or linspace"):
        build_table("fastdpm", schedule, 5, prediction="flow", spacing="var-linear")
