"""Samplers as tables: one row per network evaluation, linear in what the network returns.

    F   = F_uncond + W * (F_cond - F_uncond)                      guidance, then RESCALE
    D   = clamp(U * x + V * F, -CLAMP, CLAMP)                     estimate of x0
    x'  = A * x + B * D + C1 * H_1 + C2 * H_2 + C3 * H_3 + S * noise
    H'  = P * x + Q * D                                           into slot SLOT, if it is not -1

`fastdiff.kernels.sampler_step` executes a row. All samplers work in the variance-preserving space
x = alpha * x0 + sigma * n, including those from variance-exploding papers (whose x is ours divided
by alpha). So the network's input needs no scaling, and Euler and DDIM give the same table.

A sampler is a function from noise levels to rows. `levels` contains one `Level` per step, the
noisiest first, and finally the level to end at. In comments, a prime marks the level that a step
ends at.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.levels import CLEAN, Level, final_level, spaced_levels
from fastdiff.diffusion.predictions import to_denoised
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.kernels import COLUMNS
from fastdiff.names import Prediction

NO_SLOT = -1
COLUMN = {column.name: int(column) for column in COLUMNS}
Variance = Literal["fixed_small", "fixed_large", "learned"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network evaluation at a level and the update after it (letters: module docstring)."""

    at: Level
    step: int
    a: float
    b: float
    c: tuple[float, float, float] = (0.0, 0.0, 0.0)
    s: float = 0.0
    slot: int = NO_SLOT
    p: float = 0.0
    q: float = 0.0
    log_variance: tuple[float, float] | None = None
    """Bounds between which a network with learned variance interpolates; None: the noise is s."""


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler's rows, ready for `sampler_step`, with the levels that plots and messages show.

    Attributes:
        name: the sampler's name in SAMPLERS.
        columns: (rows, 20), fp64, CPU; the columns are `fastdiff.kernels.sampler_step.COLUMNS`.
        timesteps: (rows,), fp64: the t passed to the network; not integers with sigma spacings.
        sigmas: (rows,), fp64: sigma / alpha at which the network is evaluated.
        steps: (rows,), int64: the step that each row belongs to (Heun's steps have two rows).
        final_sigma: sigma / alpha of the result, 0 for a clean image.
        initial_sigma: standard deviation of the initial noise.
        initial_level: the level to noise x to before the first row, if x does not start as noise.
    """

    name: str
    columns: Tensor
    timesteps: Tensor
    sigmas: Tensor
    steps: Tensor
    final_sigma: float
    initial_sigma: float = 1.0
    initial_level: Level = CLEAN

    def __len__(self) -> int:
        return len(self.columns)

    def column(self, name: str) -> Tensor:
        """One named column, such as "A" or "W". Returns (rows,), fp64, CPU."""
        return self.columns[:, COLUMN[name]]

    @cached_property
    def guided(self) -> list[bool]:
        """For each row, whether it also needs the unconditional output of the network."""
        return [weight != 1 for weight in self.column("W").tolist()]

    @cached_property
    def rescales(self) -> bool:
        """Whether any row rescales its guided prediction (RESCALE)."""
        return any(self.column("RESCALE").tolist())

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The columns in the form that `sampler_step` takes: (rows, 20) on the device."""
        return self.columns.to(device=device, dtype=dtype)

    def describe(self) -> list[list[str]]:
        """The table as text: a row of headings, then one row of strings per network evaluation.

        Columns without effect (all zero, or no clamp in any row) are left out.
        """
        shown = [
            name
            for name, idle in _IDLE.items()
            if not bool((self.column(name) == idle).all()) or name in "UVAB"
        ]
        lines = [["row", "step", "t", "sigma", *(name.lower() for name in shown)]]
        for row in range(len(self)):
            t, sigma = float(self.timesteps[row]), float(self.sigmas[row])
            numbers = [t, sigma, *(float(self.column(name)[row]) for name in shown)]
            lines.append([str(row), str(int(self.steps[row])), *(f"{n:.5g}" for n in numbers)])
        return lines


_IDLE = {
    **dict.fromkeys(("U", "V", "A", "B", "C1", "C2", "C3", "S", "P", "Q"), 0.0),
    "SLOT": NO_SLOT,
    "W": 1.0,
    "CLAMP": math.inf,
    "RESCALE": 0.0,
}


# --- samplers: from levels to rows ---


def ddpm(levels: Sequence[Level], *, variance: Variance = "fixed_small") -> list[Row]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any timesteps (IDDPM section 4).

    x' = mean of q(x' | x, D) (eq. 7) + sqrt(variance) * noise. The variance is eq. 7's beta-tilde
    ("fixed_small"), the step's beta ("fixed_large"), or the network's interpolation between the two
    in log space ("learned", IDDPM eq. 15; the network then returns 2C channels).
    """
    if variance not in ("fixed_small", "fixed_large", "learned"):
        raise ValueError(
            f"unknown variance {variance!r}; expected one of fixed_small, fixed_large, learned"
        )
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        beta = 1 - (now.alpha / to.alpha) ** 2
        small = beta * (to.sigma / now.sigma) ** 2
        s, log_variance = math.sqrt(beta if variance == "fixed_large" else small), None
        if to.sigma == 0 or beta == 0:  # algorithm 2, line 3: no noise in the last step
            s = 0.0
        elif variance == "learned":
            s, log_variance = 1.0, (math.log(small), math.log(beta))
        a = (now.alpha / to.alpha) * (to.sigma / now.sigma) ** 2
        b = to.alpha * beta / now.sigma**2
        rows.append(Row(at=now, step=step, a=a, b=b, s=s, log_variance=log_variance))
    return rows


def ddim(levels: Sequence[Level], *, eta: float = 0.0) -> list[Row]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    x' = alpha' * D + sqrt(sigma'² - s²) * eps_hat + s * noise,
    s = eta * sigma' / sigma * sqrt(1 - alpha² / alpha'²).
    eta = 0 is an ODE solver of order 1, eta = 1 is DDPM. Without noise the levels may also ascend,
    which encodes a sample (section 4.3, the reverse of the ODE).

    Raises:
        ValueError: the levels ascend with eta > 0, or begin at the clean sample.
    """
    _check_eta(eta)
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        if not now.sigma:
            raise ValueError(
                "levels must not begin at the clean sample, because its noise is unknown; "
                "begin at t = 0"
            )
        if eta and to.sigma * now.alpha > now.sigma * to.alpha:
            raise ValueError(f"eta must be 0 for ascending levels (encoding), got {eta}")
        s = eta and eta * to.sigma / now.sigma * math.sqrt(1 - (now.alpha / to.alpha) ** 2)
        a = math.sqrt(max(to.sigma**2 - s**2, 0.0)) / now.sigma  # eps_hat = (x - alpha * D) / sigma
        rows.append(Row(at=now, step=step, a=a, b=to.alpha - now.alpha * a, s=s))
    return rows


def fastdpm(levels: Sequence[Level], *, eta: float = 1.0) -> list[Row]:
    """FastDPM (Kong and Ping 2021): DDIM's update at VAR or STEP noise levels; eta is kappa.

    eta = 1 is DDPM-rev, 0 DDIM-rev. The levels are the spacing's: "var-linear", "var-quadratic",
    "step-linear" or "step-quadratic" (`fastdiff.diffusion.fastdpm`).
    """
    return ddim(levels, eta=eta)


def euler(levels: Sequence[Level]) -> list[Row]:
    """Euler steps of the probability-flow ODE in sigma / alpha (Karras et al. 2022, eq. 1 and 3).

    y' = y + (sigma_ve' - sigma_ve) * (y - D) / sigma_ve with y = x / alpha. Multiplied by alpha',
    this equals DDIM with eta = 0 term by term, so the table is the same.
    """
    return ddim(levels, eta=0.0)


def euler_ancestral(levels: Sequence[Level], *, eta: float = 1.0) -> list[Row]:
    """Euler to sigma_down, then noise of sigma_up, as in k-diffusion.

    sigma_up² = eta² * sigma_ve'² * (1 - sigma_ve'² / sigma_ve²), sigma_down² = sigma_ve'² -
    sigma_up². Multiplied by alpha', sigma_up is DDIM's s and sigma_down its sqrt(sigma'² - s²), so
    this is DDIM's table with eta = 1.
    """
    return ddim(levels, eta=eta)


OUT_OF_NOISE = 20.0
"""A step that starts above this sigma / alpha and reduces it by more than this factor starts from
nearly pure noise, like the first step of a cosine schedule (20,000 to 13 in 20 steps). A method
that corrects the step by the slope at its end, d1 - d0 = (D0 - D1) / sigma', weighted with the
length of the step, would multiply a small difference between estimates by half this ratio. Such a
step is an Euler step instead."""


def _out_of_noise(now: Level, to: Level) -> bool:
    return now.ve_sigma > OUT_OF_NOISE * max(to.ve_sigma, 1.0)


def heun(levels: Sequence[Level]) -> list[Row]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two rows per step.

    The first row takes an Euler step and keeps y + (sigma_ve' - sigma_ve) / 2 * d, the part of the
    result that is known by then. The second row adds the other half of the slope, evaluated at the
    end. As in the paper, the step to sigma = 0 is an Euler step; so is a step from nearly pure
    noise (`OUT_OF_NOISE`).
    """
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        a = to.sigma / now.sigma
        first = Row(at=now, step=step, a=a, b=to.alpha - now.alpha * a)
        if to.sigma == 0 or _out_of_noise(now, to):
            rows.append(first)
            continue
        p = (to.alpha / now.alpha + a) / 2
        q = to.alpha * (1 - to.ve_sigma / now.ve_sigma) / 2
        rows.append(Row(at=now, step=step, a=a, b=first.b, slot=0, p=p, q=q))
        half = (1 - now.ve_sigma / to.ve_sigma) / 2
        rows.append(Row(at=to, step=step, a=half, b=-to.alpha * half, c=(1.0, 0.0, 0.0)))
    return rows


def plms(levels: Sequence[Level]) -> list[Row]:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, F-PNDM), started as in Stable Diffusion.

    x' = alpha' / alpha * x + g * e, where g = sigma' - sigma * alpha' / alpha and e is a
    combination of the last four eps_hat. The first step is taken twice, so there is one more row
    than steps: row 1 evaluates the network at the end of the step and redoes the step with the mean
    slope, x + g * (e_1 - e_0) / 2, because x already contains g * e_0. If the first step starts
    from nearly pure noise (`OUT_OF_NOISE`), it is an Euler step, and the second is taken twice.
    """
    weights = (
        (1.0,),
        (1.5, -0.5),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )
    rows: list[Row] = []
    start = 1 if _out_of_noise(levels[0], levels[1]) else 0
    for step, (now, to) in enumerate(pairwise(levels)):
        ratio = to.alpha / now.alpha
        g = to.sigma - now.sigma * ratio
        newest, *older = weights[min(max(step - start, 0), 3)]
        c = [0.0, 0.0, 0.0]
        for back, weight in enumerate(older, start=1):
            c[(step - back) % 3] = g * weight
        a, b = _eps_weights(now, g * newest)
        p, q = _eps_weights(now, 1.0)
        rows.append(
            Row(at=now, step=step, a=ratio + a, b=b, c=(c[0], c[1], c[2]), slot=step % 3, p=p, q=q)
        )
        if step == start and to.sigma > 0:
            a, b = _eps_weights(to, g / 2)
            c = [0.0, 0.0, 0.0]
            c[step % 3] = -g / 2
            rows.append(Row(at=to, step=step, a=1 + a, b=b, c=(c[0], c[1], c[2])))
    return rows


def dpmpp_2m(levels: Sequence[Level], *, lower_order_final: bool = True) -> list[Row]:
    """DPM-Solver++(2M): order 2, one evaluation per step (Lu et al. 2022b, algorithm 2)."""
    return dpmpp_2m_sde(levels, eta=0.0, lower_order_final=lower_order_final)


def dpmpp_2m_sde(
    levels: Sequence[Level], *, eta: float = 1.0, lower_order_final: bool = True
) -> list[Row]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b; midpoint form) with k-diffusion's eta.

    h is half the step in log-SNR, so e^-h = sigma_ve' / sigma_ve; r = h_previous / h.

        x' = sigma' / sigma * e^(-eta h) * x
             + alpha' * (1 - e^(-(1 + eta) h)) * (D + (D - D_previous) / (2 r))
             + sigma' * sqrt(1 - e^(-2 eta h)) * noise

    The first step and, with lower_order_final, the last one are of order 1. The last one has to be
    if it ends at sigma = 0, where h is infinite.
    """
    _check_eta(eta)
    rows: list[Row] = []
    for step, (now, to) in enumerate(pairwise(levels)):
        decay = to.sigma * now.alpha / (to.alpha * now.sigma)  # e^-h without infinities
        b = to.alpha * (1 - decay ** (1 + eta))
        last = step == len(levels) - 2
        extrapolation = 0.0
        if step > 0 and not (last and (lower_order_final or to.sigma == 0)):
            h, h_before = -math.log(decay), math.log(levels[step - 1].ve_sigma / now.ve_sigma)
            extrapolation = h / h_before / 2
        rows.append(
            Row(
                at=now,
                step=step,
                a=to.sigma / now.sigma * decay**eta,
                b=b * (1 + extrapolation),
                c=(-b * extrapolation, 0.0, 0.0),
                s=to.sigma * math.sqrt(1 - decay ** (2 * eta)),
                slot=NO_SLOT if last else 0,
                p=0.0,
                q=0.0 if last else 1.0,
            )
        )
    return rows


def _eps_weights(level: Level, weight: float) -> tuple[float, float]:
    """(a, b) with a * x + b * D = weight * eps_hat, eps_hat = (x - alpha * D) / sigma."""
    return weight / level.sigma, -weight * level.alpha / level.sigma


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta must be in [0, 1], got {eta}; 0 adds no noise, 1 adds as much as DDPM"
        )


SAMPLERS: dict[str, Callable[..., list[Row]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "heun": heun,
    "plms": plms,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "fastdpm": fastdpm,
}
NEEDS_SIGNAL = ("heun", "plms")
"""Samplers whose formulas divide by alpha at each level, so no level may have alpha = 0."""
SPACING_OF = {"fastdpm": "var-linear"}
"""Samplers with their own default spacing; the default of the others is "trailing"."""


# --- from a name to a table ---


def build_table(
    name: str,
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: Prediction = "eps",
    spacing: str | Sequence[float] | None = None,
    steps_offset: int = 0,
    final: Literal["zero", "sigma_min"] = "zero",
    start: int = 0,
    stop: int | None = None,
    clamp: float | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[int, int] | None = None,
    **options: float | str | bool | None,
) -> SamplerTable:
    """Build a sampler's table.

    Args:
        name: a key of SAMPLERS.
        schedule: the noise schedule that the network was trained with.
        steps: steps from noise to image; `len(table)` is the number of network evaluations.
        prediction: what the network returns.
        spacing: how the steps are spaced: over timesteps ("trailing", "leading" with
            `steps_offset`, "linspace", "simple"), over noise levels ("karras", "exponential"), as
            in FastDPM ("var-linear", "var-quadratic", "step-linear", "step-quadratic"), by a
            respacing string of IDDPM such as "10,15,20" or "ddim50", or at the given timesteps,
            descending real numbers. None: the sampler's default, "trailing" except for fastdpm.
        final: end at the clean image, or at the noise level of t = 0 (diffusers'
            final_sigmas_type, or set_alpha_to_one=False).
        start, stop: take only the steps [start, stop). They start from a sample noised to the level
            of step `start`, without the history of earlier steps, and end at the noise level of
            step `stop`. The steps keep their numbers.
        clamp: limit of |D|, 1 for pixels. x' is computed entirely from the clamped D, including its
            eps_hat (diffusers' DDIM keeps the unclamped eps_hat unless use_clipped_model_output).
        guidance_scale, guidance_rescale, guidance_interval: see GuidanceConfig; the interval counts
            steps.
        options: options of the sampler: eta (ddim, fastdpm, euler-ancestral, dpmpp-2m-sde),
            variance (ddpm), lower_order_final (dpmpp-2m, dpmpp-2m-sde). None means the sampler's
            default.

    Raises:
        ValueError: a name or option is unknown, the steps are out of range, or the spacing,
            prediction or sampler cannot start where the schedule has no signal.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}")
    guidance = GuidanceConfig(
        scale=guidance_scale, rescale=guidance_rescale, interval=guidance_interval
    )
    if guidance_interval is not None and guidance_interval[1] > steps:
        raise ValueError(
            f"guidance_interval must end at {steps} or earlier for {steps} steps, "
            f"got {guidance_interval}"
        )
    if clamp is not None and not clamp > 0:
        raise ValueError(
            f"clamp must be positive, got {clamp}; use 1 for images, None for no clamp"
        )
    spacing = SPACING_OF.get(name, "trailing") if spacing is None else spacing
    levels = spaced_levels(schedule, steps, spacing, steps_offset=steps_offset)
    if levels[0].alpha == 0 and name in NEEDS_SIGNAL:
        raise ValueError(
            f"sampler {name!r} divides by alpha, which is 0 at t = {levels[0].t:g} of this "
            "zero-terminal-SNR schedule; use 'ddim' or 'dpmpp-2m', or spacing 'leading'"
        )
    levels.append(final_level(schedule, final))
    stop = steps if stop is None else stop
    if not 0 <= start <= stop <= steps:
        raise ValueError(
            f"start and stop must satisfy 0 <= start <= stop <= {steps}, got {start} and {stop}; "
            "start=0 and stop=None take all steps"
        )
    rows = SAMPLERS[name](levels[start:], **_options(name, options)) if start < steps else []
    rows = [replace(row, step=row.step + start) for row in rows if row.step + start < stop]
    settings = prediction, clamp, guidance.weight, guidance.rescale
    return _table_of_rows(name, levels, rows, (start, stop), settings)


def table_of_levels(
    name: str,
    levels: Sequence[Level],
    *,
    prediction: Prediction = "eps",
    clamp: float | None = None,
    weight: Callable[[int], float] = lambda step: 1.0,
    **options: float | str | bool | None,
) -> SamplerTable:
    """Build a sampler's table through given noise levels.

    Args:
        levels: the level of each step, and finally the level to end at; the noisiest first.
        weight: step -> guidance scale.
        clamp, options: as in `build_table`.
    """
    rows = SAMPLERS[name](levels, **_options(name, options))
    ends = (0, len(levels) - 1)
    return _table_of_rows(name, levels, rows, ends, (prediction, clamp, weight, 0.0))


def _table_of_rows(
    name: str,
    levels: Sequence[Level],
    rows: Sequence[Row],
    ends: tuple[int, int],
    settings: tuple[Prediction, float | None, Callable[[int], float], float],
) -> SamplerTable:
    """Assemble a table.

    ends: indices of the levels to start from and to end at. settings: prediction, clamp, guidance
    weight and guidance rescale.
    """
    (start, stop), (prediction, clamp, weight, rescale) = ends, settings
    columns = [
        _columns(row, number, prediction, clamp, (weight(row.step), rescale))
        for number, row in enumerate(rows)
    ]
    return SamplerTable(
        name=name,
        columns=torch.tensor(columns, dtype=torch.float64).reshape(-1, len(COLUMN)),
        timesteps=torch.tensor([row.at.t for row in rows], dtype=torch.float64),
        sigmas=torch.tensor([row.at.ve_sigma for row in rows], dtype=torch.float64),
        steps=torch.tensor([row.step for row in rows], dtype=torch.int64),
        final_sigma=levels[stop].ve_sigma,
        initial_level=levels[start],
    )


def _columns(
    row: Row,
    number: int,
    prediction: Prediction,
    clamp: float | None,
    guidance: tuple[float, float],
) -> list[float]:
    """The values of row `number` in the order of the columns; guidance: weight and rescale."""
    weight, rescale = guidance
    u, v = to_denoised(row.at.alpha, row.at.sigma, prediction)
    # With equal bounds, a network with learned variance gets this row's s too.
    fixed = 2 * math.log(row.s) if row.s > 0 else 0.0
    low, high = row.log_variance or (fixed, fixed)
    values = {
        "U": u,
        "V": v,
        "A": row.a,
        "B": row.b,
        "S": row.s,
        "P": row.p,
        "Q": row.q,
        **dict(zip(("C1", "C2", "C3"), row.c, strict=True)),
        "SLOT": row.slot,
        "W": weight,
        "CLAMP": math.inf if clamp is None else clamp,
        "LOGVAR_MIN": low,
        "LOGVAR_MAX": high,
        "NOISE_STEP": number,
        "RESCALE": rescale if weight != 1 else 0.0,
    }
    return [values.get(name, 0.0) for name in COLUMN]


def _options(name: str, options: dict[str, float | str | bool | None]) -> dict[str, object]:
    given: dict[str, object] = {key: value for key, value in options.items() if value is not None}
    known = [key for key in inspect.signature(SAMPLERS[name]).parameters if key != "levels"]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"sampler {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    return given
