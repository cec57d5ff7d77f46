"""Tables and the loop: exact identities, guidance, learned variance, seeds, errors."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.samplers import COLUMN, SAMPLERS, SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import INITIAL_NOISE, SAMPLER_NOISE, backend, philox_normal
from fastdiff.names import SPACINGS
from tests.kernels.cases import device_of, needs_triton

LINEAR = NoiseSchedule(ScheduleConfig())
ZERO_SNR = NoiseSchedule(ScheduleConfig(kind="scaled_linear", zero_terminal_snr=True))
NEED_SIGNAL = ("karras", "exponential", "var-linear", "var-quadratic")
SHORT = NoiseSchedule(ScheduleConfig(kind="cosine", num_timesteps=20))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 60),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(["eps", "v", "x0"]),
    zero_snr=st.booleans(),
)
def test_a_point_is_hit_exactly(
    name: str, steps: int, spacing: str, prediction: str, zero_snr: bool
) -> None:
    """If all data is one point and the network knows it, every sampler ends on it, noise or not."""
    if name == "lcm":
        return  # its boundary conditions mix some of x into the last estimate
    schedule = ZERO_SNR if zero_snr else LINEAR
    if zero_snr and (SAMPLERS[name].needs_signal or prediction == "eps" or spacing in NEED_SIGNAL):
        return  # errors, tested below
    if (spacing.startswith(("var", "step")) and steps < 2) or spacing == "step-quadratic":
        return  # errors, tested in test_levels
    point = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)

    def predict(x: Tensor, row: int) -> Tensor:
        t = float(table.timesteps[row])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        if spacing.startswith("var"):  # between timesteps these are the Gamma function's
            ratio = float(table.sigmas[row])
            alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        eps_hat = (x - alpha * point) / sigma
        return {"eps": eps_hat, "v": alpha * eps_hat - sigma * point, "x0": point.expand_as(x)}[
            prediction
        ]

    table = build_table(name, schedule, steps, prediction=prediction, spacing=spacing)
    result = sample(predict, table, noise(3, 2, 4), [5, 6, 7])
    torch.testing.assert_close(result, point.expand(3, 2, 4), rtol=1e-9, atol=1e-9)
    assert (table.sigmas.diff() <= 1e-12).all()
    assert table.final_sigma == 0


@given(steps=st.integers(1, 200), spacing=st.sampled_from(SPACINGS))
def test_ddim_with_all_noise_is_ddpm(steps: int, spacing: str) -> None:
    """Song et al. 2021, section 4.1: eta = 1 is DDPM's posterior step, column by column."""
    if (spacing.startswith(("var", "step")) and steps < 2) or spacing == "step-quadratic":
        return  # errors, tested in test_levels
    ddim = build_table("ddim", LINEAR, steps, spacing=spacing, eta=1.0)
    ddpm = build_table("ddpm", LINEAR, steps, spacing=spacing)
    torch.testing.assert_close(ddim.columns, ddpm.columns, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ddpm_step_is_the_posterior(variance: str) -> None:
    """Each row over all timesteps is DDPM eq. 7 with the schedule's own posterior (IDDPM eq. 15
    if learned).
    """
    table = build_table("ddpm", SHORT, 20, prediction="x0", spacing="leading", variance=variance)
    seeds = torch.tensor([4, 9])
    d, v = noise(2, 3, 5, seed=1), noise(2, 3, 5, seed=2).clamp(-1, 1)
    states = [noise(2, 3, 5)]
    output = torch.cat([d, v], 1) if variance == "learned" else d
    sample(
        lambda x, row: output,
        table,
        states[0],
        seeds,
        on_step=lambda step: states.append(step.x.clone()),
    )
    for row, t in enumerate(range(19, -1, -1)):
        x, x_next = states[row], states[row + 1]
        mean, small, _ = SHORT.posterior(x, d, torch.tensor(t))
        beta = SHORT.betas[t]
        std = {"fixed_small": small.sqrt(), "fixed_large": beta.sqrt()}.get(variance)
        if std is None:
            f = (v + 1) / 2
            std = (0.5 * (f * beta.log() + (1 - f) * small.log())).exp()
        z = philox_normal(seeds, (3, 5), step=row, stream=SAMPLER_NOISE).double()
        expected = mean + std * z if t > 0 else mean
        torch.testing.assert_close(x_next, expected, rtol=1e-9, atol=1e-9)


def test_fixed_noise_ignores_a_learned_variance() -> None:
    """A network with 2C channels can be sampled by DDIM(eta) and the others: they bring their
    own noise.
    """
    d, v = noise(2, 3, 5, seed=1), noise(2, 3, 5, seed=2)
    for name in ("ddim", "euler-ancestral", "dpmpp-2m-sde"):
        options = {} if name == "dpmpp-2m-sde" else {"eta": 0.7}
        table = build_table(name, LINEAR, 7, prediction="v", **options)
        results = [
            sample(lambda x, row, f=f: f, table, noise(2, 3, 5), [1, 2])
            for f in (d, torch.cat([d, v], 1))
        ]
        # exp(log s) in place of s
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_guidance() -> None:
    """W applies in its steps, both halves are asked for only there, and F is the combination."""
    uncond, cond = noise(2, 2, 3, seed=1), noise(2, 2, 3, seed=2)

    def predict(x: Tensor, row: int) -> Tensor:
        return torch.cat([uncond, cond]) if table.guided[row] else cond

    settings = {"prediction": "x0", "guidance_scale": 3.0, "guidance_interval": (1, 3)}
    table = build_table("heun", LINEAR, 4, **settings)
    steps = []
    sample(predict, table, noise(2, 2, 3), [1, 2], on_step=steps.append)
    assert table.steps.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert table.guided == [False, False, True, True, True, True, False]
    assert [(step.done, step.total) for step in steps] == [(done, 7) for done in range(1, 8)]
    assert [list(step.samples) for step in steps] == [[0, 1]] * 7
    for guided, step in zip(table.guided, steps, strict=True):
        expected = uncond + 3 * (cond - uncond) if guided else cond
        torch.testing.assert_close(step.denoised, expected)

    # Lin et al. 2023, eq. 15-16
    settings["guidance_rescale"] = 0.7
    table = build_table("heun", LINEAR, 4, **settings)
    phi = [0.7 if guided else 0.0 for guided in table.guided]
    assert table.column("RESCALE").tolist() == phi
    sample(predict, table, noise(2, 2, 3), [1, 2], on_step=steps.append)
    combined = uncond + 3 * (cond - uncond)
    std = cond.std((1, 2), keepdim=True) / combined.std((1, 2), keepdim=True)
    torch.testing.assert_close(steps[-2].denoised, 0.7 * combined * std + 0.3 * combined)
    torch.testing.assert_close(steps[-1].denoised, cond)


def test_clamp() -> None:
    table = build_table("ddim", LINEAR, 5, prediction="x0", clamp=0.5)
    estimates = []
    result = sample(
        lambda x, row: 3 * torch.sign(x),
        table,
        noise(2, 2, 3),
        [1, 2],
        on_step=lambda step: estimates.append(step.denoised),
    )
    assert (result.abs() == 0.5).all()
    assert all((d.abs() == 0.5).all() for d in estimates)  # previews are of the clamped D


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_batch_and_seeds(name: str) -> None:
    """A seed gives the same bits alone and at any place of a batch, and other seeds give other
    samples.
    """
    table = build_table(name, LINEAR, 6)
    seeds = [11, 5, 2**62 + 3, 0, 5, 8, 13]

    def predict(x: Tensor, row: int) -> Tensor:
        return torch.tanh(x) * math.cos(table.timesteps[row])

    batch = sample(predict, table, (3, 4, 4), seeds)
    assert batch.dtype == torch.float32
    for i, seed in enumerate(seeds):
        assert torch.equal(sample(predict, table, (3, 4, 4), [seed])[0], batch[i])
    assert torch.equal(batch[1], batch[4])
    assert not torch.equal(batch[0], batch[1])
    start = philox_normal(torch.tensor(seeds), (3, 4, 4), step=0, stream=INITIAL_NOISE)
    before = start.clone()
    assert torch.equal(sample(predict, table, start, seeds), batch)
    assert torch.equal(start, before), "the caller's noise is left as it is"


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("seed", [5, -3, 2**31 + 7])
def test_all_64_bits_of_a_seed_count(name: str, seed: int) -> None:
    """Both in the initial noise and in the noise of the steps."""
    table = build_table(name, LINEAR, 4)
    start = noise(2, 3, 4, 4).float()
    start[1] = start[0]
    for flipped in (1, 31, 32, 33, 62):
        seeds = [seed, seed ^ (1 << flipped)]
        drawn = sample(lambda x, row: 0.1 * x, table, (3, 4, 4), seeds)
        assert not torch.equal(drawn[0], drawn[1]), f"bit {flipped} of the initial noise's seed"
        same = sample(lambda x, row: 0.1 * x, table, start, seeds)
        assert torch.equal(same[0], same[1]) == (name == "ddim"), flipped


def test_fp32_follows_fp64() -> None:
    """The fp32 table costs rounding only: every sampler stays within 1e-4 of its fp64 result."""
    for name in SAMPLERS:
        table = build_table(name, LINEAR, 20, spacing="karras")
        x = noise(2, 3, 8).float()
        factors = (table.timesteps / 300).cos().tolist()

        def predict(x: Tensor, row: int, factors: list[float] = factors) -> Tensor:
            return torch.tanh(x) * factors[row]

        results = [sample(predict, table, start, [1, 2]) for start in (x, x.double())]
        error = (results[0].double() - results[1]).norm() / results[1].norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("check", ["end", "step"])
def test_not_finite(check: str) -> None:
    calls = []

    def predict(x: Tensor, row: int) -> Tensor:
        calls.append(row)
        output = torch.zeros_like(x)
        if len(calls) == 4:
            output[1, 0, 2] = float("nan") if check == "end" else float("inf")
        return output

    table = build_table("heun", LINEAR, 10)
    with pytest.raises(ValueError, match=r"NaN or infinity at step 1 \(row 3 of 19, t = 7\d\d\)"):
        sample(predict, table, (2, 3), [1, 2], check=check)
    assert len(calls) == (4 if check == "step" else 19)


VE = 0.25, 1.5  # mean and deviation of the data in the two tests below


def smooth(y: Tensor, sigma: float) -> Tensor:
    """An estimate of x0 that is not linear in y."""
    return torch.tanh(VE[0] + y / (1 + sigma**2)) * VE[1]


def run_in_ve(table: SamplerTable, y: Tensor, seeds: Tensor) -> Tensor:
    """A table's result, where y is x0 + sigma n at the start and at the end."""
    sigmas = table.sigmas.tolist()
    result = sample(
        lambda x, row: smooth(x * math.hypot(1, sigmas[row]), sigmas[row]),
        table,
        y / math.hypot(1, sigmas[0]),
        seeds,
    )
    return result * math.hypot(1, table.final_sigma)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_2s_ancestral_in_the_variance_exploding_space(eta: float, final: str) -> None:
    """Step by step with the formulas of DPM-Solver++(2S) and ancestral noise, written for y."""
    options = {"prediction": "x0", "spacing": "trailing", "final": final, "eta": eta}
    table = build_table("dpmpp-2s-ancestral", LINEAR, 6, **options)  # type: ignore[arg-type]
    sigmas = [*table.sigmas[::2].tolist(), table.final_sigma]
    seeds, y = torch.tensor([3, 4]), 9 * noise(2, 3, 4)
    expected = y.clone()
    for step, (sigma, to) in enumerate(pairwise(sigmas)):
        up = eta * to * math.sqrt(1 - to**2 / sigma**2)
        down = math.sqrt(to**2 - up**2)
        d = smooth(expected, sigma)
        if to:
            middle = math.sqrt(sigma * down)
            d = smooth(middle / sigma * expected + (1 - middle / sigma) * d, middle)
        expected = down / sigma * expected + (1 - down / sigma) * d
        if up:
            drawn = philox_normal(seeds, (3, 4), step=2 * step + 1, stream=SAMPLER_NOISE)
            expected += up * drawn.double()
    torch.testing.assert_close(run_in_ve(table, y, seeds), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_3m_sde_in_the_variance_exploding_space(eta: float) -> None:
    """Step by step with k-diffusion's formulas for y, from divided differences of D."""
    table = build_table("dpmpp-3m-sde", LINEAR, 9, prediction="x0", spacing="karras", eta=eta)
    sigmas = [*table.sigmas.tolist(), 0.0]
    seeds, y = torch.tensor([3, 4]), 9 * noise(2, 3, 4)
    expected, past = y.clone(), []
    for step, (sigma, to) in enumerate(pairwise(sigmas)):
        past = [smooth(expected, sigma), *past[:2]]
        if not to:
            expected = past[0]
            break
        h = math.log(sigma / to)
        big = h * (1 + eta)
        phi_2 = math.expm1(-big) / big + 1
        expected = math.exp(-big) * expected - math.expm1(-big) * past[0]
        if step:
            last = math.log(sigmas[step - 1] / sigma)
            first = (past[0] - past[1]) * h / last
        if step == 1:
            expected += phi_2 * first
        elif step > 1:
            before = math.log(sigmas[step - 2] / sigmas[step - 1])
            bend = (first - (past[1] - past[2]) * h / before) * h / (last + before)
            expected += phi_2 * (first + bend * last / h) - (phi_2 / big - 0.5) * bend
        if eta:
            drawn = philox_normal(seeds, (3, 4), step=step, stream=SAMPLER_NOISE).double()
            expected += to * math.sqrt(-math.expm1(-2 * h * eta)) * drawn
    torch.testing.assert_close(run_in_ve(table, y, seeds), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_does_not_depend_on_where_a_table_starts(name: str) -> None:
    """But for its first step, which has no row before it to add the noise."""
    whole = build_table(name, LINEAR, 10, s_churn=2.0)
    cut = build_table(name, LINEAR, 10, s_churn=2.0, start=5)
    tail = whole.sigmas[whole.steps > 5]
    torch.testing.assert_close(cut.sigmas[cut.steps > 5], tail, rtol=1e-12, atol=0)
    assert not torch.equal(tail, build_table(name, LINEAR, 10).sigmas[whole.steps > 5])


@pytest.mark.parametrize(("eta", "before"), [(0.9, 1), (0.8, 2), (0.3, 7), (0.5, 5)])
def test_tcd_goes_to_the_timestep_of_the_paper(eta: float, before: int) -> None:
    """floor((1 - eta) * 10), where 1 - 0.9 in fp64 is below 0.1."""
    table = build_table("tcd", LINEAR, 3, spacing=[500.0, 10.0, 3.0], eta=eta)
    alpha, sigma = LINEAR.alphas_cumprod.sqrt(), (1 - LINEAR.alphas_cumprod).sqrt()
    expected = alpha[10] / alpha[before] * sigma[before] / sigma[500]
    assert float(table.column("A")[0]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_in_the_variance_exploding_space(name: str) -> None:
    """Karras et al. 2022, algorithm 2, for y, with the first level as the highest."""
    churn = {"s_churn": 2.0, "s_tmin": 0.3, "s_tmax": 8.0, "s_noise": 1.1}
    table = build_table(name, LINEAR, 14, prediction="x0", spacing="karras", **churn)
    plain = build_table(name, LINEAR, 14, prediction="x0", spacing="karras")
    sigmas = [float(plain.sigmas[plain.steps == step][0]) for step in range(14)] + [0.0]
    seeds, y = torch.tensor([3, 4]), 9 * noise(2, 3, 4)
    expected, row, raised = y.clone(), 0, 0
    for step, (level, to) in enumerate(pairwise(sigmas)):
        sigma = level
        if step and churn["s_tmin"] <= level <= churn["s_tmax"]:
            sigma, raised = level * (1 + churn["s_churn"] / 14), raised + 1
            drawn = philox_normal(seeds, (3, 4), step=row - 1, stream=SAMPLER_NOISE).double()
            expected += 1.1 * math.sqrt(sigma**2 - level**2) * drawn
        d = (expected - smooth(expected, sigma)) / sigma
        row += 1
        following = expected + (to - sigma) * d
        if name == "heun" and to:
            slope = (following - smooth(following, to)) / to
            following = expected + (to - sigma) * (d + slope) / 2
            row += 1
        expected = following
    assert raised > 2
    assert row == len(table)
    torch.testing.assert_close(run_in_ve(table, y, seeds), expected, rtol=1e-10, atol=1e-10)


def test_describe() -> None:
    lines = build_table("plms", LINEAR, 4, guidance_scale=2.0).describe()
    assert lines[0] == [
        "row",
        "step",
        "t",
        "sigma",
        "u",
        "v",
        "a",
        "b",
        "c1",
        "c2",
        "c3",
        "p",
        "q",
        "slot",
        "w",
    ]
    assert [line[:3] for line in lines[1:]] == [
        ["0", "0", "999"],
        ["1", "0", "749"],
        ["2", "1", "749"],
        ["3", "2", "499"],
        ["4", "3", "249"],
    ]
    assert all(len(line) == len(lines[0]) for line in lines)
    assert lines[1][-1] == "2"
    table = build_table("ddim", LINEAR, 4)
    assert table.describe()[0] == ["row", "step", "t", "sigma", "u", "v", "a", "b"]
    assert len(table) == 4
    assert table.to("cpu").dtype == torch.float32
    assert table.column("A").tolist() == table.columns[:, COLUMN["A"]].tolist()


BAD = [
    (("ddmp", LINEAR, 10), {}, "unknown sampler 'ddmp'; expected one of ddpm, ddim, euler"),
    (("ddim", LINEAR, 0), {}, "steps must be at least 1, got 0"),
    (("ddim", LINEAR, -3), {"spacing": "karras"}, "steps must be at least 1, got -3"),
    (("ddim", LINEAR, 1001), {}, "steps must be 1 to 1000 with spacing 'trailing', got 1001; "),
    (("ddim", LINEAR, 10), {"spacing": "odd"}, "unknown spacing 'odd'; expected one of trailing"),
    (("ddim", LINEAR, 3), {"spacing": [5, 9, 1]}, "must contain 3 descending timesteps.* got 3"),
    (
        ("ddim", LINEAR, 2),
        {"spacing": [1000, 1]},
        r"timesteps must be in \[0, 999\], got 1 to 1000",
    ),
    (
        ("ddim", LINEAR, 10),
        {"spacing": "karras", "steps_offset": 1},
        "steps_offset must be 0 with .*'leading'",
    ),
    (("ddim", LINEAR, 10), {"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
    (("ddpm", LINEAR, 10), {"eta": 1.0}, "'ddpm' has no option 'eta'; it has variance"),
    (("heun", LINEAR, 10), {"eta": 1.0}, "'heun' has no option 'eta'; it has s_churn, s_tmin"),
    (("plms", LINEAR, 10), {"eta": 1.0}, "'plms' has no option 'eta'; it has none"),
    (("unipc", LINEAR, 10), {"solver_order": 4}, "solver_order must be one of 1, 2, 3, got 4"),
    (("unipc", LINEAR, 10), {"solver_order": 2.0}, "solver_order must be a whole number, got 2.0"),
    (("ddim", LINEAR, 10), {"eta": "0.5"}, "eta must be a finite number, got '0.5'"),
    (("ddim", LINEAR, 10), {"eta": math.nan}, "eta must be a finite number, got nan"),
    (("heun", LINEAR, 10), {"s_churn": math.nan}, "s_churn must be a finite number, got nan"),
    (("heun", LINEAR, 10), {"s_churn": 1, "s_noise": math.inf}, "s_noise must be a finite number"),
    (("lcm", LINEAR, 10), {"timestep_scaling": math.nan}, "timestep_scaling must be a finite"),
    (
        ("unipc", LINEAR, 10),
        {"lower_order_final": "no"},
        "lower_order_final must be True or False, got 'no'",
    ),
    (("euler", LINEAR, 10), {"s_churn": -1.0}, "s_churn and s_noise must be >= 0, got -1.0"),
    (("euler", LINEAR, 10), {"s_churn": 1.0, "stop": 4}, "must not be cut with stop.*stop=4"),
    (
        ("ddpm", LINEAR, 10),
        {"variance": "big"},
        "unknown variance 'big'; expected one of fixed_small",
    ),
    (
        ("ddim", LINEAR, 10),
        {"prediction": "foo"},
        "unknown prediction 'foo'; expected one of eps",
    ),
    (("ddim", LINEAR, 10), {"clamp": 0.0}, "clamp must be positive, got 0"),
    (
        ("ddim", LINEAR, 10),
        {"final": "one"},
        "unknown final 'one'; expected one of zero, sigma_min",
    ),
    (
        ("ddim", LINEAR, 10),
        {"guidance_scale": -1.0},
        "guidance scale must be a finite number >= 0, got -1",
    ),
    (("ddim", LINEAR, 10), {"guidance_interval": (3, 11)}, "must end at 10 or earlier"),
    (
        ("ddim", LINEAR, 10),
        {"guidance_interval": (3, 3)},
        "interval must be steps .* got \\(3, 3\\)",
    ),
    (
        ("ddim", ZERO_SNR, 10),
        {},
        "'eps' contains no information about x0 at alpha = 0.* use prediction 'v'",
    ),
    (("heun", ZERO_SNR, 10), {"prediction": "v"}, "'heun' divides by alpha.* use 'ddim'"),
    (
        ("ddim", ZERO_SNR, 10),
        {"prediction": "v", "spacing": "karras"},
        "'karras' needs .*'trailing'",
    ),
]


@pytest.mark.parametrize(("args", "options", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_tables(args: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_table(*args, **options)
    assert "\n" not in str(error.value)


def test_none_is_the_samplers_default() -> None:
    a = build_table("euler-ancestral", LINEAR, 5, eta=None)
    assert torch.equal(a.columns, build_table("euler-ancestral", LINEAR, 5, eta=1.0).columns)


def test_bad_sampling() -> None:
    table = build_table("ddim", LINEAR, 3, guidance_scale=2.0)
    with pytest.raises(ValueError, match="expected one seed per sample, got 3 for 2 samples"):
        sample(lambda x, row: x, table, noise(2, 3), [1, 2, 3])
    with pytest.raises(ValueError, match=r"row 0 is guided.* return 4 outputs.* got 2; "):
        sample(lambda x, row: x, table, noise(2, 3), [1, 2])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True])
def test_bad_seeds(seed: float) -> None:
    with pytest.raises(ValueError, match=r"of at most 64 bits, got -?(18|92|1\.5|True)"):
        sample(lambda x, row: x, build_table("ddim", LINEAR, 1), (2, 3), [seed])


def test_bad_guidance() -> None:
    for options in ({"scale": math.nan}, {"rescale": 1.5}, {"interval": (-1, 3)}):
        with pytest.raises(ValueError, match=r"guidance .* got "):
            GuidanceConfig(**options)


def test_no_gradients_are_recorded() -> None:
    """Parameters in training want gradients; sampling must not keep a graph of all its steps."""
    scale = torch.tensor(0.5, requires_grad=True)
    seen = []

    def predict(x: Tensor, row: int) -> Tensor:
        seen.append((x * scale).requires_grad)
        return torch.tanh(x * scale)

    result = sample(predict, build_table("ddim", LINEAR, 2), (2, 3), [1])
    assert seen == [False, False]
    assert not result.requires_grad


class Calls(TorchDispatchMode):
    """Counts the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[str(op.name())] += 1
        return op(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("previews", [False, True])
def test_the_loop_never_waits_for_the_device(previews: bool) -> None:
    """No row copies between host and device, judging by the ops that a GPU would run."""
    device = device_of("triton")

    def calls(steps: int) -> Counter[str]:
        table = build_table("dpmpp-2m-sde", LINEAR, steps, guidance_scale=2.0)
        on_step = (lambda *_: None) if previews else None
        x = torch.randn(2, 3, 4, 4, device=device)
        with backend("triton"), Calls() as mode:
            sample(
                lambda x, *_: torch.cat([x, x]),
                table,
                x,
                torch.tensor([1, 2], device=device),
                on_step=on_step,
                check="never",
            )
        return mode.counts

    few, many = calls(2), calls(5)
    assert many["fastdiff::sampler_step"] == 5
    for op in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
        assert many[op] == 0, op
    assert many["aten::_to_copy"] == few["aten::_to_copy"]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("cut", [1, 4])
def test_the_first_steps_are_those_of_the_whole_table(name: str, cut: int) -> None:
    whole = build_table(name, LINEAR, 8, guidance_scale=3.0, guidance_interval=(2, 6))
    first = build_table(name, LINEAR, 8, guidance_scale=3.0, guidance_interval=(2, 6), stop=cut)
    rows = int((whole.steps < cut).sum())
    assert torch.equal(first.columns, whole.columns[:rows])
    assert torch.equal(first.steps, whole.steps[:rows])
    assert first.final_sigma == float(whole.sigmas[whole.steps == cut][0])


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler-ancestral"])
def test_the_last_steps_of_a_sampler_without_memory_are_those_of_the_whole_table(name: str) -> None:
    whole = build_table(name, LINEAR, 8, guidance_scale=3.0, guidance_interval=(2, 6))
    last = build_table(name, LINEAR, 8, guidance_scale=3.0, guidance_interval=(2, 6), start=5)
    own = [column for name, column in COLUMN.items() if name != "NOISE_STEP"]
    assert torch.equal(last.columns[:, own], whole.columns[5:, own])
    assert last.column("NOISE_STEP").tolist() == [0, 1, 2]  # of its own noise
    assert last.steps.tolist() == [5, 6, 7]
    assert last.initial_level.t == float(whole.timesteps[5])
    assert last.initial_level.alpha**2 + last.initial_level.sigma**2 == pytest.approx(1)


def test_a_sampler_with_memory_starts_anew() -> None:
    """Its first row would read a history that has not been written yet."""
    for name in ("dpmpp-2m", "dpmpp-2m-sde", "plms"):
        table = build_table(name, LINEAR, 8, start=3)
        assert all(float(table.column(f"C{slot}")[0]) == 0 for slot in (1, 2, 3))
        assert table.steps[0] == 3


def test_no_steps_at_all() -> None:
    table = build_table("heun", LINEAR, 8, start=8)
    assert (len(table), table.columns.shape, table.final_sigma) == (0, (0, 20), 0.0)
    for start, stop in ((5, 3), (-1, 2), (0, 9)):
        with pytest.raises(ValueError, match=r"0 <= start <= stop <= 8"):
            build_table("ddim", LINEAR, 8, start=start, stop=stop)
