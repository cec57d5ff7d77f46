"""Where steps lie: IDDPM's respacing strings and FastDPM's lists, as the authors' programs give
them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.diffusion.fastdpm import step_timesteps, var_levels, variances
from fastdiff.diffusion.levels import spaced_levels
from fastdiff.diffusion.respacing import respaced_timesteps, respacing_steps
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from fastdiff.names import FASTDPM_SPACINGS

LINEAR = NoiseSchedule(ScheduleConfig())
COSINE = NoiseSchedule(ScheduleConfig(kind="cosine"))

# What space_timesteps of improved-diffusion returns, sorted.
RESPACED = {
    (1000, "ddim25"): [*range(0, 1000, 40)],
    (1000, "4,3,2"): [0, 111, 222, 333, 334, 500, 666, 667, 999],
    (4000, "12"): [0, 364, 727, 1091, 1454, 1818, 2181, 2545, 2908, 3272, 3635, 3999],
    (1000, "1,5"): [0, 500, 625, 750, 874, 999],
    (300, "10,15,20"): [
        *(0, 11, 22, 33, 44, 55, 66, 77, 88, 99),
        *(100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199),
        *(200, 205, 210, 216, 221, 226, 231, 236, 242, 247),
        *(252, 257, 263, 268, 273, 278, 283, 289, 294, 299),
    ],
    (1000, "25"): [
        *(0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500),
        *(541, 583, 624, 666, 708, 749, 791, 832, 874, 916, 957, 999),
    ],
}


@pytest.mark.parametrize(("total", "spacing"), RESPACED)
def test_respacing_is_the_originals(total: int, spacing: str) -> None:
    expected = RESPACED[total, spacing]
    assert respaced_timesteps(spacing, total) == expected[::-1]
    assert respacing_steps(spacing) == len(expected)


def test_a_respaced_table_is_ddpm_on_the_respaced_schedule() -> None:
    """IDDPM section 4: beta of the chosen timesteps is 1 - alphas_cumprod / the one before."""
    table = build_table("ddpm", COSINE, 9, spacing="4,3,2", prediction="x0")
    assert table.timesteps.tolist() == RESPACED[1000, "4,3,2"][::-1]
    kept = COSINE.alphas_cumprod[torch.tensor(RESPACED[1000, "4,3,2"])]
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    beta = 1 - kept / before
    scale_x0 = before.sqrt() * beta / (1 - kept)
    scale_x = (kept / before).sqrt() * (1 - before) / (1 - kept)
    std = (beta * (1 - before) / (1 - kept)).sqrt()
    for name, wanted in (("B", scale_x0), ("A", scale_x), ("S", std)):
        torch.testing.assert_close(table.column(name), wanted.flip(0), rtol=1e-10, atol=1e-12)


BAD_RESPACINGS = {
    ("ddim400", 1000): "no integer stride over 1000 timesteps gives exactly 400",
    ("10,15,20", 40): "needs 15 timesteps from a section of 13; use at most 13 there",
    ("0,0", 1000): "must have at least 1 timestep, got '0,0'",
    ("ddim", 1000): "must be like '25', '10,15,20' or 'ddim50', got 'ddim'",
    ("1001", 1000): "needs 1001 timesteps from a section of 1000",
}


@pytest.mark.parametrize(("spacing", "total"), BAD_RESPACINGS)
def test_bad_respacings(spacing: str, total: int) -> None:
    with pytest.raises(ValueError, match=BAD_RESPACINGS[spacing, total]):
        respaced_timesteps(spacing, total)


def test_a_respacing_says_its_own_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"'4,3,2' has 9 steps, got 10; set steps to 9"):
        spaced_levels(LINEAR, 10, "4,3,2")


# get_VAR_noise and _precompute_VAR_steps of FastDPM_pytorch, beta 1e-4 to 0.02, T = 1000. They
# search until the product is within 1e-4 of its goal.
VARIANCES = {
    ("linear", 10): [
        *(0.0001, 0.108089, 0.216078, 0.324067, 0.432056),
        *(0.540045, 0.648034, 0.756023, 0.864012, 0.972001),
    ],
    ("quadratic", 10): [
        *(0.0001, 0.011025, 0.04, 0.087025, 0.1521),
        *(0.235225, 0.3364, 0.455625, 0.5929, 0.748225),
    ],
    ("quadratic", 20): [
        *(0.0001, 0.00330625, 0.011025, 0.0232563, 0.04, 0.0612563, 0.087025),
        *(0.117306, 0.1521, 0.191406, 0.235225, 0.283556, 0.3364, 0.393756),
        *(0.455625, 0.522006, 0.5929, 0.668306, 0.748225, 0.832656),
    ],
}
TIMESTEPS = {
    ("linear", 10): [
        *(998.9957, 802.762, 668.6355, 554.5918, 452.1016),
        *(357.472, 268.6044, 183.9859, 101.7513, 0),
    ],
    ("quadratic", 10): [
        *(616.7341, 493.9817, 394.0765, 308.8676, 234.8582),
        *(170.3005, 114.3631, 66.8653, 28.2925, 0),
    ],
    ("quadratic", 20): [
        *(929.5515, 829.0204, 742.1942, 664.602, 593.9839, 529.0005, 468.7833),
        *(412.7373, 360.4417, 311.5961, 265.988, 223.4749, 183.9734, 147.455),
        *(113.9478, 83.5446, 56.4237, 32.8945, 13.5306, 0),
    ],
}
STEP_LISTS = {
    ("linear", 10): [0, 111, 222, 333, 444, 555, 666, 777, 888, 999],
    ("linear", 20): [
        *(0, 52, 105, 157, 210, 262, 315, 368, 420, 473),
        *(525, 578, 630, 683, 736, 788, 841, 893, 946, 999),
    ],
    ("quadratic", 10): [0, 9, 39, 88, 158, 246, 355, 483, 632, 800],
    ("quadratic", 20): [
        *(0, 2, 8, 19, 35, 55, 79, 108, 141, 179),
        *(221, 268, 319, 374, 434, 498, 567, 640, 718, 800),
    ],
}


@pytest.mark.parametrize(("curve", "steps"), VARIANCES)
def test_var_lists_are_the_originals(curve: str, steps: int) -> None:
    etas = variances(curve, steps, LINEAR)
    assert etas == pytest.approx(VARIANCES[curve, steps], rel=1e-5)
    timesteps, gammas = zip(*var_levels(curve, steps, LINEAR), strict=True)
    assert timesteps == pytest.approx(TIMESTEPS[curve, steps], abs=5e-3)
    assert gammas[-1] == pytest.approx(1 - etas[0], rel=1e-12)


@pytest.mark.parametrize(("curve", "steps"), STEP_LISTS)
def test_step_lists_are_the_originals(curve: str, steps: int) -> None:
    assert step_timesteps(curve, steps, 1000) == STEP_LISTS[curve, steps][::-1]


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(("curve", "steps"), [("linear", 30), ("quadratic", 60)])
def test_var_reaches_the_noise_of_the_last_timestep(
    schedule: NoiseSchedule, curve: str, steps: int
) -> None:
    levels = var_levels(curve, steps, schedule)
    assert levels[0] == pytest.approx((999, float(schedule.alphas_cumprod[-1])), rel=1e-9)
    etas = variances(curve, steps, schedule)
    even = [eta if curve == "linear" else math.sqrt(eta) for eta in etas]
    strides = torch.tensor(even, dtype=torch.float64).diff()
    torch.testing.assert_close(strides, strides[:1].expand_as(strides), rtol=1e-9, atol=0)


@given(st.floats(1, 998))
def test_the_timestep_of_linear_betas_continues_the_product(t: float) -> None:
    """The paper's R: alphas_cumprod(t) = alphas_cumprod(t - 1) * (1 - beta(t)) at every real t."""
    from fastdiff.diffusion.fastdpm import _timesteps

    stride = float(LINEAR.betas[1] - LINEAR.betas[0])
    low = math.floor(t)
    share = t - low
    c = (1 - float(LINEAR.betas[0])) / stride
    gamma = math.exp((t + 1) * math.log(stride) + math.lgamma(c + 1) - math.lgamma(c - t))
    before = gamma / (1 - float(LINEAR.betas[0]) - t * stride)
    assert _timesteps(LINEAR, [gamma, before]) == pytest.approx([t, t - 1], abs=1e-4)
    ends = LINEAR.alphas_cumprod[low], LINEAR.alphas_cumprod[min(low + 1, 999)]
    assert ends[1] * (1 - 1e-9) <= gamma <= ends[0] * (1 + 1e-9)
    assert share == 0 or gamma < ends[0]


@pytest.mark.parametrize("spacing", FASTDPM_SPACINGS)
@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_fastdpm_steps_are_the_originals(spacing: str, kappa: float) -> None:
    """VAR_sampling and STEP_sampling, written as there, with the same noise."""
    steps = 12
    table = build_table("fastdpm", LINEAR, steps, spacing=spacing, eta=kappa)
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([3, 8])

    def network(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x + t / 500)

    ours = sample(lambda x, row: network(x, float(table.timesteps[row])), table, x, seeds)
    way, curve = spacing.split("-")
    if way == "var":
        etas = torch.tensor(variances(curve, steps, LINEAR), dtype=torch.float64)
        gammas = (1 - etas).cumprod(0).flip(0)
        timesteps = [t for t, _ in var_levels(curve, steps, LINEAR)]
    else:
        timesteps = step_timesteps(curve, steps, 1000)
        gammas = LINEAR.alphas_cumprod[torch.tensor(timesteps)]
    for i, t in enumerate(timesteps):
        now = gammas[i]
        to = gammas[i + 1] if i + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
        sigma = kappa * ((1 - to) / (1 - now) * (1 - now / to)).sqrt()
        eps_hat = network(x, t)
        noise = philox_normal(seeds, (5,), step=i, stream=SAMPLER_NOISE).double()
        x = x * (to / now).sqrt()
        c = (1 - to - sigma**2).sqrt() - (1 - now).sqrt() * (to / now).sqrt()
        x = x + c * eps_hat + sigma * noise
    torch.testing.assert_close(ours, x, rtol=1e-7, atol=1e-9)


def test_fastdpm_at_full_length_is_ddpm() -> None:
    """T linear steps between the same ends are the training's own, whichever way they are found."""
    whole = build_table("ddpm", LINEAR, 1000, spacing="leading").columns
    for spacing in ("var-linear", "step-linear"):
        table = build_table("fastdpm", LINEAR, 1000, spacing=spacing)
        torch.testing.assert_close(table.columns, whole, rtol=1e-8, atol=1e-10)


def test_fastdpm_has_a_spacing_of_its_own() -> None:
    default = build_table("fastdpm", LINEAR, 8)
    assert torch.equal(
        default.columns, build_table("ddim", LINEAR, 8, spacing="var-linear", eta=1.0).columns
    )


ZERO_SNR = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
BAD_FASTDPM = [
    ("step-quadratic", 30, LINEAR, "visits a timestep twice with 30 steps of 1000; use at most 29"),
    ("step-linear", 1001, LINEAR, "visits a timestep twice .* use at most 1000"),
    ("step-linear", 1, LINEAR, "needs at least 2 steps, got 1"),
    ("var-linear", 1, LINEAR, "needs at least 2 steps, got 1"),
    ("var-linear", 10, ZERO_SNR, "needs some signal at the last timestep.*'trailing'"),
    ("var-linear", 200_000, LINEAR, "cannot fit 200000 steps .* use at most 1011"),
]


@pytest.mark.parametrize(("spacing", "steps", "schedule", "message"), BAD_FASTDPM)
def test_bad_fastdpm(spacing: str, steps: int, schedule: NoiseSchedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_levels(schedule, steps, spacing)


def test_the_advice_on_too_many_steps_works() -> None:
    assert len(spaced_levels(LINEAR, 29, "step-quadratic")) == 29
    with pytest.raises(ValueError, match=r"use at most \d+ steps") as error:
        spaced_levels(LINEAR, 200_000, "var-linear")
    most = int(str(error.value).rpartition("at most ")[2].split()[0])
    assert len(spaced_levels(LINEAR, most, "var-linear")) == most
