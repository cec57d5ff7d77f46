"""Losses against the papers' formulas and torch.distributions; predictions against each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from fastdiff.diffusion.losses import (
    learned_log_variance,
    min_snr_weight,
    simple_loss,
    variational_bound,
)
from fastdiff.diffusion.predictions import target, to_denoised
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=100))


def test_simple_loss() -> None:
    prediction = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    goal = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    assert simple_loss(prediction, goal) == pytest.approx((2.5 + 2) / 2)
    weighted = simple_loss(prediction, goal, torch.tensor([0.2, 3.0]))
    assert weighted == pytest.approx((0.2 * 2.5 + 3 * 2) / 2)
    # 300² overflows in fp16: the loss must not be computed there
    half = simple_loss(torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half())
    assert half.dtype == torch.float32
    assert half == 90000
    with pytest.raises(ValueError, match=r"shape \(1, 4\), expected the target's \(1, 2\)"):
        simple_loss(torch.zeros(1, 4), torch.zeros(1, 2))


@given(st.floats(1e-4, 1e4), st.floats(0.5, 20))
def test_min_snr_weight(snr: float, gamma: float) -> None:
    """Hang et al. 2023: min(SNR, gamma) on x0, over SNR on eps, over SNR + 1 on v."""
    ratio = torch.tensor(snr, dtype=torch.float64)
    expected = {
        "x0": min(snr, gamma),
        "eps": min(snr, gamma) / snr,
        "v": min(snr, gamma) / (snr + 1),
    }
    for prediction, weight in expected.items():
        ours = float(min_snr_weight(ratio, prediction, gamma=gamma))
        assert ours == pytest.approx(weight, rel=1e-12)


def test_min_snr_weights_weigh_the_same_loss() -> None:
    """With one and the same wrong D, the weighted losses of eps, v and x0 are equal."""
    t = torch.tensor([3, 50, 90])
    x0, noise, error = torch.randn(3, 3, 2, 4, dtype=torch.float64)
    alpha, sigma = (c[:, None, None] for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    x = alpha * x0 + sigma * noise
    wrong = x0 + error
    implied_noise = (x - alpha * wrong) / sigma
    losses = []
    for prediction in ("eps", "v", "x0"):
        right = target(prediction, x0, noise, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
        output = {"eps": implied_noise, "x0": wrong, "v": alpha * implied_noise - sigma * wrong}
        weight = min_snr_weight(SCHEDULE.snr(t), prediction)
        losses.append(float(simple_loss(output[prediction], right, weight)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] == pytest.approx(losses[0], rel=1e-12)


def test_min_snr_without_signal() -> None:
    zero = torch.tensor(0.0)
    assert [float(min_snr_weight(zero, p)) for p in ("eps", "v", "x0")] == [1, 0, 0]
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        min_snr_weight(zero, "eps", gamma=0)
    with pytest.raises(
        ValueError, match="unknown prediction 'foo'; expected one of eps, v, x0, fl"
    ):
        min_snr_weight(zero, "foo")


@given(st.floats(0, math.pi / 2 - 1e-3), st.sampled_from(["eps", "v", "x0"]))
def test_denoised_of_the_target_is_x0(angle: float, prediction: str) -> None:
    alpha, sigma = math.cos(angle), math.sin(angle)
    x0, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    x = alpha * x0 + sigma * noise
    shares = torch.tensor([alpha, sigma], dtype=torch.float64)
    f = target(prediction, x0, noise, shares[0], shares[1].expand(3))
    u, v = to_denoised(alpha, sigma, prediction)
    torch.testing.assert_close(u * x + v * f, x0, rtol=1e-9, atol=1e-9)


def test_predictions_without_signal() -> None:
    with pytest.raises(
        ValueError, match=r"'eps' contains no information about x0 at alpha = 0.* use"
    ):
        to_denoised(0.0, 1.0, "eps")
    assert to_denoised(0.0, 1.0, "v") == (0.0, -1.0)
    with pytest.raises(
        ValueError, match="unknown prediction 'foo'; expected one of eps, v, x0, fl"
    ):
        to_denoised(0.5, 0.5, "foo")


def test_variational_bound_is_the_divergence() -> None:
    """IDDPM eq. 6 and 15 with torch's normal distributions, in bits per dimension."""
    t = torch.tensor([1, 40, 99])
    x0, noise, d = torch.randn(3, 3, 2, 4, dtype=torch.float64)
    variance = torch.rand(3, 2, 4, dtype=torch.float64) * 2 - 1
    x = SCHEDULE.add_noise(x0, noise, t)
    ours = variational_bound(SCHEDULE, x0, x, d, variance, t, bin_width=0.1)
    for i, k in enumerate(t.tolist()):
        beta, total = float(SCHEDULE.betas[k]), float(SCHEDULE.alphas_cumprod[k])
        before = float(SCHEDULE.alphas_cumprod[k - 1])
        small = beta * (1 - before) / (1 - total)
        f = (variance[i] + 1) / 2
        std = (0.5 * (f * math.log(beta) + (1 - f) * math.log(small))).exp()  # eq. 15

        def mean(estimate, i=i, beta=beta, total=total, before=before):
            of_x = (1 - beta) ** 0.5 * (1 - before) / (1 - total)
            return before**0.5 * beta / (1 - total) * estimate + of_x * x[i]

        kl = kl_divergence(Normal(mean(x0[i]), small**0.5), Normal(mean(d[i]), std))
        assert float(ours[i]) == pytest.approx(float(kl.mean()) / math.log(2), rel=1e-9)
    log_variance = learned_log_variance(SCHEDULE, variance, t)
    torch.testing.assert_close((0.5 * log_variance[2]).exp(), std)


@pytest.mark.parametrize("estimate", [0.123, 1.0, -1.0])  # at the ends their open bins count
@pytest.mark.parametrize("levels", [17, 256])
def test_variational_bound_of_the_last_step(levels: int, estimate: float) -> None:
    """DDPM eq. 13: the probabilities of all grey levels sum to 1, and each is that of its bin."""
    width = 2 / (levels - 1)
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64).reshape(levels, 1)
    t, d = torch.zeros(levels, dtype=torch.int64), torch.full_like(grey, estimate)
    variance = torch.full_like(grey, 0.4)
    bits = variational_bound(SCHEDULE, grey, grey, d, variance, t, bin_width=width)
    # the posterior mean at t = 0 is D, and its variance that of t = 1 (clipped) up to beta_0
    low, high = SCHEDULE.posterior_variance[1].log(), SCHEDULE.betas[0].log()
    normal = Normal(torch.tensor(estimate), (0.5 * (0.7 * high + 0.3 * low)).exp())
    edges = torch.linspace(-1 + width / 2, 1 - width / 2, levels - 1, dtype=torch.float64)
    cdf = torch.cat([torch.zeros(1), normal.cdf(edges), torch.ones(1)])
    torch.testing.assert_close(torch.exp2(-bits), cdf.diff().clamp(min=1e-12), rtol=1e-6, atol=1e-9)
    assert float(bits.max()) == pytest.approx(-math.log2(1e-12))  # as bad as it can be
    with pytest.raises(ValueError, match="bin_width must be positive, got 0"):
        variational_bound(SCHEDULE, grey, grey, d, variance, t, bin_width=0)
