"""Guidance by gradients: on a Gaussian mixture, whose denoisers and classifier are known exactly,
it equals the papers' algorithms and classifier-free guidance, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.gradients import (
    SHIFTS_MEAN,
    At,
    Guidance,
    Pull,
    by_gradients,
    classifier_guidance,
    clip_guidance,
    gradient_of,
    guided,
    loss_guidance,
    loss_pull,
    rows_of,
)
from fastdiff.diffusion.levels import CLEAN, levels_at
from fastdiff.diffusion.samplers import SAMPLERS, SamplerTable, build_table, table_of_levels
from fastdiff.diffusion.sampling import Predict, sample
from fastdiff.diffusion.schedules import FlowSchedule, NoiseSchedule, ScheduleConfig
from fastdiff.kernels import philox_normal
from fastdiff.kernels.philox_normal.streams import SAMPLER_NOISE
from tests.diffusion.mixture import (
    MEANS,
    STDS,
    WEIGHTS,
    along,
    denoise,
    exact_network,
    responsibilities,
)

SCHEDULE = NoiseSchedule(ScheduleConfig())
LABELS = [0, 1, 2, 1]
SEEDS = [3, 1, 4, 5]
SCORE = [name for name, sampler in SAMPLERS.items() if not sampler.ancestral]
Network = Callable[[Tensor, float], Tensor]


def start(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LABELS), 2, dtype=torch.float64, generator=generator)


def levels(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at each sample's t, (N, 1)."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    return alpha.to(x)[:, None], sigma.to(x)[:, None]


def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """log p(y | x_t), exactly."""
    alpha, sigma = levels(t, x)
    variance = STDS**2 + (sigma / alpha) ** 2  # (N, 3)
    distance = ((x / alpha)[:, None] - MEANS).square().sum(-1)
    logits = WEIGHTS.log() - variance.log() - distance / variance / 2
    return logits.log_softmax(1).gather(1, y[:, None])[:, 0]


def conditional_network(prediction: str) -> Network:
    """The exact denoiser of each sample's class, a single Gaussian."""
    mean, std = MEANS[LABELS], STDS[LABELS][:, None]

    def predict(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        ratio = (sigma / alpha) ** 2
        d = (mean * ratio + x / alpha * std**2) / (std**2 + ratio)
        eps_hat = (x - alpha * d) / sigma
        return {"x0": d, "eps": eps_hat, "v": alpha * eps_hat - sigma * d}[prediction]

    return predict


def both(prediction: str) -> Network:
    """[unconditional; conditional]."""
    networks = exact_network(SCHEDULE, prediction), conditional_network(prediction)
    return lambda x, t: torch.cat([network(x, t) for network in networks])


def table(name: str, prediction: str = "eps", scale: float = 1.0, **options: Any) -> SamplerTable:
    """At whole timesteps for every sampler, where the exact networks know the noise level."""
    return build_table(
        name,
        SCHEDULE,
        9,
        prediction=prediction,  # type: ignore[arg-type]
        guidance_scale=scale,
        spacing="trailing",
        **options,
    )


def run(network: Network, rows: SamplerTable, *guidance: Guidance) -> Tensor:
    return sample(along(rows, network), rows, start(), SEEDS, guidance=guidance)


def test_the_exact_classifier_is_the_mixtures_responsibility() -> None:
    x, t = start(), torch.tensor([100.0] * 4)
    alpha, sigma = levels(t, x)
    expected = responsibilities(x / alpha, float(sigma[0] / alpha[0])).log()
    found = [log_prob(x, t, torch.full((4,), y)) for y in range(3)]
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [*((name, "eps") for name in SCORE), ("dpmpp-2m-sde", "v"), ("heun", "x0")],
)
def test_a_classifier_of_scale_s_is_classifier_free_guidance_of_weight_s(
    name: str, prediction: str
) -> None:
    """Bayes: the gradient of log p(y | x) is the difference of the two scores."""
    s = 1.7
    by_classifier = run(
        exact_network(SCHEDULE, prediction),
        table(name, prediction),
        classifier_guidance(log_prob, LABELS, s),
    )
    by_weight = run(both(prediction), table(name, prediction, s))
    unguided = run(exact_network(SCHEDULE, prediction), table(name, prediction))
    assert (by_weight - unguided).abs().max() > 0.05
    torch.testing.assert_close(by_classifier, by_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m-sde", "euler-ancestral"])
def test_a_conditional_model_with_a_classifier_of_scale_s_has_weight_1_plus_s(name: str) -> None:
    s = 0.8
    by_classifier = run(
        conditional_network("eps"), table(name), classifier_guidance(log_prob, LABELS, s)
    )
    by_weight = run(both("eps"), table(name, scale=1 + s))
    torch.testing.assert_close(by_classifier, by_weight, rtol=1e-9, atol=1e-9)


def test_a_classifier_adds_to_classifier_free_guidance() -> None:
    """Weight w and a classifier of scale s: weight w + s."""
    by_both = run(both("v"), table("ddim", "v", 1.5), classifier_guidance(log_prob, LABELS, 0.75))
    by_weight = run(both("v"), table("ddim", "v", 2.25))
    torch.testing.assert_close(by_both, by_weight, rtol=1e-9, atol=1e-9)


def gradient(x: Tensor, t: float) -> Tensor:
    """The gradient of log p(y | x_t) in closed form: the difference of the two scores."""
    sigma = float(SCHEDULE.sigma(t))
    return (exact_network(SCHEDULE)(x, t) - conditional_network("eps")(x, t)) / sigma


def noise_of_step(row: int) -> Tensor:
    seeds = torch.tensor(SEEDS)
    return philox_normal(seeds, (2,), step=row, stream=SAMPLER_NOISE).double()


def with_variance(network: Network) -> Network:
    """A network that also interpolates the log variance (IDDPM), differently for each number."""

    def predict(x: Tensor, t: float) -> Tensor:
        return torch.cat([network(x, t), torch.tanh(x * 2 + t / 1000)], dim=1)

    return predict


@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_an_ancestral_step_is_algorithm_1(variance: str, clamp: float | None) -> None:
    """x' ~ N(mu + s Sigma grad log p(y | x), Sigma), written out from the betas of the steps."""
    scale = [2.0, 0.5, 1.0, 3.0]
    network = exact_network(SCHEDULE)
    network = with_variance(network) if variance == "learned" else network
    rows = table("ddpm", variance=variance, clamp=clamp)
    found = run(network, rows, classifier_guidance(log_prob, LABELS, scale))

    x, timesteps = start(), rows.timesteps.tolist()
    bars = [float(SCHEDULE.alpha(t)) ** 2 for t in timesteps] + [1.0]
    s = torch.tensor(scale, dtype=torch.float64)[:, None]
    for row, t in enumerate(timesteps):
        now, to = bars[row], bars[row + 1]
        beta = 1 - now / to
        output = network(x, t)
        x0 = (x - math.sqrt(1 - now) * output[:, :2]) / math.sqrt(now)
        x0 = x0 if clamp is None else x0.clamp(-clamp, clamp)
        mean = math.sqrt(to) * beta / (1 - now) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - to) / (1 - now) * x
        small = beta * (1 - to) / (1 - now)
        sigma = torch.tensor(beta if variance == "fixed_large" else small, dtype=torch.float64)
        if to == 1.0:
            x = mean  # algorithm 2 of DDPM, line 3: the last step is its mean
            continue
        if variance == "learned":
            fraction = (output[:, 2:] + 1) / 2
            sigma = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(small))
        x = mean + s * sigma * gradient(x, t) + sigma.sqrt() * noise_of_step(row)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clamp", [None, 0.6])
def test_a_ddim_step_is_algorithm_2(clamp: float | None) -> None:
    """eps_hat' = eps_hat - sqrt(1 - alpha_bar) grad log p(y | x), then the update of DDIM."""
    s, network, rows = 2.0, exact_network(SCHEDULE), table("ddim", clamp=clamp)
    found = run(network, rows, classifier_guidance(log_prob, LABELS, s))

    x, timesteps = start(), rows.timesteps.tolist()
    bars = [float(SCHEDULE.alpha(t)) ** 2 for t in timesteps] + [1.0]
    for row, t in enumerate(timesteps):
        now, to = bars[row], bars[row + 1]
        x0 = (x - math.sqrt(1 - now) * network(x, t)) / math.sqrt(now)
        x0 = x0 if clamp is None else x0.clamp(-clamp, clamp)
        eps_hat = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        eps_hat = eps_hat - s * math.sqrt(1 - now) * gradient(x, t)
        x0 = (x - math.sqrt(1 - now) * eps_hat) / math.sqrt(now)
        x = math.sqrt(to) * x0 + math.sqrt(1 - to) * eps_hat
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_mean_shift_is_the_score_form_times_a_factor_per_row(variance: str) -> None:
    rows = table("ddpm", variance=variance)
    known = rows_of(rows)
    x, none = torch.zeros(len(rows), 2), torch.zeros(len(rows), 0)
    mean = At(known).shift(x, none)
    known[:, SHIFTS_MEAN] = 0
    score = At(known).shift(x, none)
    alpha, sigma = (level(rows.timesteps).double() for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    after_alpha = torch.cat([alpha[1:], torch.ones(1)])
    after_sigma = torch.cat([sigma[1:], torch.zeros(1)])
    factor = alpha / after_alpha
    if variance == "fixed_small":
        factor = factor * (after_sigma / sigma) ** 2
    factor[-1] = 0  # the last step adds no noise
    torch.testing.assert_close(mean[:, 0] / score[:, 0], factor, rtol=1e-9, atol=0)


def test_guidance_by_a_loss_on_x0_has_its_closed_form() -> None:
    """For data N(0, s²) the denoiser is linear, D = k x, so the gradient of |D - c|² / 2 with
    respect to x is k (D - c), and eps_hat' = eps_hat + scale sigma k (D - c)."""
    target, std, scale = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.5, 1.3
    rows = table("ddim")

    def slope(t: float) -> float:
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2)

    def network(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        return (x - alpha * slope(t) * x) / sigma

    def loss(x0: Tensor) -> Tensor:
        return (x0 - target).square().sum(1) / 2

    predict: Predict = guided(along(rows, network), rows, [loss_guidance(loss, scale)])
    for row, t in enumerate(rows.timesteps.tolist()):
        x, k = start(row), slope(t)
        expected = network(x, t) + scale * float(SCHEDULE.sigma(t)) * k * (k * x - target)
        torch.testing.assert_close(predict(x, row), expected, rtol=1e-10, atol=1e-10)


def test_a_loss_on_x_is_a_classifier_with_that_density() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x - 0.4).square().sum(1)

    by_loss = run(exact_network(SCHEDULE), table("ddim"), loss_guidance(loss, 0.3, on="x"))
    as_density = run(
        exact_network(SCHEDULE),
        table("ddim"),
        classifier_guidance(lambda x, t, y: -loss(x), LABELS, 0.3),
    )
    assert torch.equal(by_loss, as_density)


def test_guidances_compose_in_any_order_and_add_up() -> None:
    rows, network = table("dpmpp-2m", "v"), exact_network(SCHEDULE, "v")

    def loss(x: Tensor) -> Tensor:
        return (x - 0.4).square().sum(1)

    first, second = classifier_guidance(log_prob, LABELS, 1.2), loss_guidance(loss, 0.3, on="x")
    together = by_gradients(
        [
            [Pull(objective=log_prob, scale=1.2, label=label), loss_pull(loss, 0.3, on="x")]
            for label in LABELS
        ]
    )
    one, other, at_once = (
        run(network, rows, *g) for g in ([first, second], [second, first], [together])
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one, at_once, rtol=1e-10, atol=1e-10)
    assert (one - run(network, rows, first)).abs().max() > 1e-3


def test_an_outer_guidance_differentiates_through_an_inner_one() -> None:
    """The inner shift is a constant to the outer gradient."""
    rows, network = table("ddim"), exact_network(SCHEDULE)
    calls = []

    def loss(x0: Tensor) -> Tensor:
        calls.append(x0.detach())
        return x0.square().sum(1)

    inner, outer = classifier_guidance(log_prob, LABELS, 1.2), loss_guidance(loss, 0.5)
    x, row = start(), 4
    predict = guided(along(rows, network), rows, [inner, outer])
    t = float(rows.timesteps[row])
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    shift = -sigma * 1.2 * gradient(x, t)
    leaf = x.clone().requires_grad_()
    x0 = (leaf - sigma * (network(leaf, t) + shift)) / alpha
    (slope,) = torch.autograd.grad(x0.square().sum(), leaf)
    expected = network(x, t) + shift + 0.5 * sigma * slope
    torch.testing.assert_close(predict(x, row), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(calls[0], x0.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}, {"clamp": 0.6}])
@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_without_a_pull_the_loop_is_the_same(name: str, options: dict[str, Any]) -> None:
    """Weight, rescale, clamp and learned variance, applied before `sampler_step` or by it."""
    network = with_variance(both("eps")) if name == "ddpm" else both("eps")
    if name == "ddpm":
        options = {**options, "variance": "learned"}
        network = lambda x, t: torch.cat(  # noqa: E731
            [both("eps")(x, t), torch.tanh(torch.cat([x, x]) + t / 1000)], dim=1
        )
    rows = table(name, scale=2.0, guidance_interval=(2, 7), **options)

    def predict(x: Tensor, row: int) -> Tensor:
        output = network(x, float(rows.timesteps[row]))
        return output if rows.guided[row] else output[len(x) :]

    plain = sample(predict, rows, start(), SEEDS)
    nothing = sample(
        predict, rows, start(), SEEDS, guidance=[classifier_guidance(log_prob, LABELS, 0.0)]
    )
    torch.testing.assert_close(nothing, plain, rtol=1e-10, atol=1e-10)


def test_a_pull_is_left_out_above_its_noise_level() -> None:
    rows, network = table("ddim"), exact_network(SCHEDULE)
    pulls = [
        [Pull(objective=log_prob, scale=2.0, label=label, max_sigma=float(rows.sigmas[3]))]
        for label in LABELS
    ]
    predict = guided(along(rows, network), rows, [by_gradients(pulls)])
    always = guided(along(rows, network), rows, [classifier_guidance(log_prob, LABELS, 2.0)])
    plain = along(rows, network)
    for row in range(len(rows)):
        expected = plain(start(), row) if row < 3 else always(start(), row)
        torch.testing.assert_close(predict(start(), row), expected, rtol=1e-12, atol=1e-12)


def test_it_works_in_inference_mode() -> None:
    guidance = (
        classifier_guidance(log_prob, LABELS, 1.0),
        loss_guidance(lambda x: x.square().sum(1)),
    )
    expected = run(exact_network(SCHEDULE), table("ddim"), *guidance)
    with torch.inference_mode():
        found = run(exact_network(SCHEDULE), table("ddim"), *guidance)
    assert torch.equal(found.clone(), expected)


def test_blocks_do_not_change_gradients() -> None:
    x = start()
    at = At(rows_of(table("ddim"))[[8, 5, 1, 7]])
    pulls = [
        [Pull(objective=log_prob, scale=scale, label=y)]
        for scale, y in zip((1.0, 2.0, 0.5, 4.0), LABELS, strict=True)
    ]
    results = [
        by_gradients(pulls, block=block)(lambda x, at: 0 * x)(x, at) for block in (None, 1, 3)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-12)


def test_the_strides_of_a_sample_do_not_matter() -> None:
    """The order of a sum follows strides, which differ between a batch of one and a larger one."""
    x = torch.randn(2, 3, 17, 19, generator=torch.Generator().manual_seed(0)).exp()

    def objective(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1).sum(1).square()

    def loose(x: Tensor) -> Tensor:
        return x.sum(dim=(1, 2, 3))

    other = x.contiguous(memory_format=torch.channels_last)
    assert not torch.equal(loose(x), loose(other)), "sums of this x depend on its strides"
    t = torch.zeros(2)
    for summed in (objective, lambda x, t, y: loose(x).square()):
        found = [gradient_of(summed, each, t, t.long()) for each in (x, other)]
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda x, t, y: x.detach().sum(1), "must be differentiable in the sample"),
        (lambda x, t, y: (x > 0).sum(1), "must be differentiable in the sample"),
        (lambda x, t, y: torch.zeros(len(x), requires_grad=True), "must be differentiable"),
        (lambda x, t, y: x.sum(), r"one number per sample, \(4,\), got \(\)"),
        (lambda x, t, y: 1.0, r"one number per sample, \(4,\), got float"),
    ],
)
def test_guidance_without_a_gradient_is_refused(objective: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_of(objective, start(), torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        run(exact_network(SCHEDULE), table("ddim"), classifier_guidance(objective, LABELS, 1.0))


def test_a_network_without_a_gradient_is_refused() -> None:
    network = exact_network(SCHEDULE)
    with pytest.raises(ValueError, match=r"needs the gradient of the network, got a prediction"):
        run(
            lambda x, t: torch.zeros_like(x),
            table("ddim", "x0"),
            loss_guidance(lambda x: x.square().sum(1)),
        )
    with pytest.raises(ValueError, match="a guided row needs 8 outputs"):
        run(network, table("ddim", scale=2.0), classifier_guidance(log_prob, LABELS, 1.0))


def test_a_level_without_signal_is_not_shifted() -> None:
    """Pure noise says nothing about the class."""
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    rows = build_table("ddim", schedule, 9, prediction="v")

    def network(x: Tensor, t: float) -> Tensor:
        return 0.1 * x

    predict = guided(along(rows, network), rows, [classifier_guidance(log_prob, LABELS, 1.0)])
    assert torch.equal(predict(start(), 0), network(start(), 0.0))
    assert (predict(start(), 1) - network(start(), 0.0)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.5})])
def test_the_shift_is_the_same_under_flow_matching(name: str, options: dict[str, Any]) -> None:
    """The samples are those of a variance-preserving table of the same levels, times the scale of
    x; so a gradient with respect to them is divided by it, and D' = D + m g stays."""
    flow = FlowSchedule(ScheduleConfig(kind="flow"))
    timesteps = [900.0, 750.0, 500.0, 300.0, 100.0]
    scaled = build_table(name, flow, 5, prediction="flow", spacing=timesteps, **options)
    levels = levels_at(flow, timesteps)
    plain = table_of_levels(name, [*levels, CLEAN], prediction="x0", **options)
    ones = torch.ones(5, 1, dtype=torch.float64)
    shifts = [At(rows_of(table)).shift(ones, ones[:, :0])[:, 0] for table in (scaled, plain)]
    assert shifts[1][:-1].min() > 0
    torch.testing.assert_close(shifts[0], shifts[1] * scaled.scales[:5], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun", "dpmpp-2m"])
def test_flow_matching_has_another_scale_of_x(name: str) -> None:
    """x = (1 - s) x0 + s n, whose squares do not add to 1; weight s again."""
    schedule, scale = FlowSchedule(ScheduleConfig(kind="flow")), 1.7
    mean, std = MEANS[LABELS], STDS[LABELS][:, None]

    def probability(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        share = (t / 1000).to(x)[:, None]
        variance = STDS**2 + (share / (1 - share)) ** 2
        distance = ((x / (1 - share))[:, None] - MEANS).square().sum(-1)
        logits = WEIGHTS.log() - variance.log() - distance / variance / 2
        return logits.log_softmax(1).gather(1, y[:, None])[:, 0]

    def network(x: Tensor, t: float) -> Tensor:
        share = t / 1000
        y, ratio = x / (1 - share), share / (1 - share)
        own = (mean * ratio**2 + y * std**2) / (std**2 + ratio**2)
        both = denoise(y, ratio), own
        return torch.cat([(x - d) / share for d in both])  # n - x0, from x

    def table_of(weight: float) -> SamplerTable:
        timesteps = [900.0, 750.0, 500.0, 300.0, 100.0]
        return build_table(
            name, schedule, 5, prediction="flow", spacing=timesteps, guidance_scale=weight
        )

    plain, weighted = table_of(1.0), table_of(scale)
    unconditional = along(plain, lambda x, t: network(x, t)[: len(x)])
    guidance = [classifier_guidance(probability, LABELS, scale)]
    by_classifier = sample(unconditional, plain, start(), SEEDS, guidance=guidance)
    by_weight = sample(along(weighted, network), weighted, start(), SEEDS)
    assert (by_weight - sample(unconditional, plain, start(), SEEDS)).abs().max() > 0.05
    torch.testing.assert_close(by_classifier, by_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.nan}, "the scale of a pull must be finite, got nan"),
        ({"max_sigma": 0.0}, "max_sigma must be positive, got 0"),
        ({"on": "z"}, "on must be x or x0, got 'z'"),
    ],
)
def test_bad_pulls_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pull(**{"objective": log_prob, "scale": 1.0, **change})


# --- CLIP guidance (Nichol et al. 2022, section 2.3) ----------------------------------------------

CLIP_SCALES = [0.0, 2.0, 0.7, -1.0]


def linear_tower(x: Tensor, t: Tensor) -> Tensor:
    """A linear image tower whose weights depend on the timestep: (n, 2) -> (n, 3)."""
    return (x @ IMAGE_TOWER.T) * (1 + t[:, None] / 500)


IMAGE_TOWER = torch.tensor([[0.4, -0.3], [0.1, 0.2], [-0.5, 0.6]], dtype=torch.float64)
TEXT_TOWER = torch.tensor([[0.3, 0.2], [-0.1, 0.4], [0.5, -0.2]], dtype=torch.float64)
CAPTIONS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -2]], dtype=torch.float64) @ TEXT_TOWER.T


def clip_gradient(t: float) -> Tensor:
    """Of f(x, t) . g(c) with linear towers, in closed form: W(t)' V c, one row per sample."""
    return (1 + t / 500) * CAPTIONS @ IMAGE_TOWER


def test_clip_guidance_of_linear_towers_shifts_the_mean_by_its_closed_form() -> None:
    """mu' = mu + s Sigma grad_x (f(x) . g(c)), written out from the betas of the steps."""
    network, rows = exact_network(SCHEDULE), table("ddpm", variance="fixed_large")
    found = run(network, rows, clip_guidance(linear_tower, CAPTIONS, CLIP_SCALES))
    x, timesteps = start(), rows.timesteps.tolist()
    bars = [float(SCHEDULE.alpha(t)) ** 2 for t in timesteps] + [1.0]
    s = torch.tensor(CLIP_SCALES, dtype=torch.float64)[:, None]
    for row, t in enumerate(timesteps):
        now, to = bars[row], bars[row + 1]
        beta = 1 - now / to
        x0 = (x - math.sqrt(1 - now) * network(x, t)) / math.sqrt(now)
        x = math.sqrt(1 - beta) * (1 - to) / (1 - now) * x + math.sqrt(to) * beta / (1 - now) * x0
        if to != 1.0:
            x = x + s * beta * clip_gradient(t) + math.sqrt(beta) * noise_of_step(row)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_clip_guidance_of_linear_towers_in_a_deterministic_sampler() -> None:
    """eps_hat' = eps_hat - s sigma grad_x (f(x) . g(c)); samples of scale 0 are not guided."""
    network, rows = exact_network(SCHEDULE), table("ddim")
    found = run(network, rows, clip_guidance(linear_tower, CAPTIONS, CLIP_SCALES))
    s = torch.tensor(CLIP_SCALES, dtype=torch.float64)[:, None]

    def shifted(x: Tensor, t: float) -> Tensor:
        return network(x, t) - s * float(SCHEDULE.sigma(t)) * clip_gradient(t)

    torch.testing.assert_close(found, run(shifted, rows), rtol=1e-9, atol=1e-9)
    assert (found - run(network, rows))[1:].abs().amin() > 0.01
    torch.testing.assert_close(found[0], run(network, rows)[0], rtol=1e-12, atol=1e-12)
