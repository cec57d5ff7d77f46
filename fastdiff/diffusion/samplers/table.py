"""From a sampler's name to a table that `sampler_step` executes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.flow import SPACINGS
from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.levels import CLEAN, Level, final_level, spaced_levels
from fastdiff.diffusion.predictions import input_scale, to_denoised
from fastdiff.diffusion.samplers.rows import COLUMN, NO_SLOT, SAMPLERS, Row, check_option
from fastdiff.diffusion.schedules import FLOW, FlowSchedule, NoiseSchedule, check_flow
from fastdiff.names import Prediction


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
        initial_level: the level to noise x to before the first row, if x does not start as noise;
            with prediction "flow" its alpha and sigma are 1 - s and s.
        scales: (rows + 1,), fp64: what the variance-preserving x is multiplied by in the loop,
            before each row and after the last. All are 1 except with prediction "flow".
    """

    name: str
    columns: Tensor
    timesteps: Tensor
    sigmas: Tensor
    steps: Tensor
    final_sigma: float
    initial_sigma: float = 1.0
    initial_level: Level = CLEAN
    scales: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))

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

    @cached_property
    def unguided(self) -> SamplerTable:
        """The table for predictions to which guidance and clamp have been applied already
        (`fastdiff.diffusion.gradients`)."""
        columns = self.columns.clone()
        for name in ("W", "RESCALE", "CLAMP"):
            columns[:, COLUMN[name]] = _IDLE[name]
        return replace(self, columns=columns)

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
        options: options of the sampler, as its function in this package describes them; `fastdiff
            samplers NAME` lists their names. None means the sampler's default.

    Raises:
        ValueError: a name or option is unknown, the steps are out of range, the spacing, prediction
            or sampler cannot start where the schedule has no signal, or only one of schedule and
            prediction is that of flow matching.
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
    flow = isinstance(schedule, FlowSchedule)
    check_flow(FLOW if flow else "of another kind", prediction)
    if spacing is None:
        usual = SAMPLERS[name].spacing
        spacing = "trailing" if flow and usual not in SPACINGS else usual
    levels = spaced_levels(schedule, steps, spacing, steps_offset=steps_offset)
    if levels[0].alpha == 0 and SAMPLERS[name].needs_signal:
        if prediction == "flow":
            raise ValueError(
                f"sampler {name!r} divides by alpha, which is 0 at the first level of flow "
                "matching; use 'flow-heun' or 'dpmpp-2m'"
            )
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
    if stop < steps and options.get("s_churn"):
        raise ValueError(
            "a table with s_churn must not be cut with stop, because the noise of a step is added "
            f"at the end of the one before, got stop={stop}; set s_churn=0"
        )
    if churn := options.get("s_churn"):
        check_option("s_churn", churn, 0.0)
        options["s_churn"] = float(churn) * (steps - start) / steps  # per step as in a whole table
    rows = _rows(name, levels[start:], schedule, options) if start < steps else []
    rows = [replace(row, step=row.step + start) for row in rows if row.step + start < stop]
    settings = prediction, clamp, guidance.weight, guidance.rescale
    return _table_of_rows(name, levels, rows, (start, stop), settings)


def table_of_levels(
    name: str,
    levels: Sequence[Level],
    *,
    schedule: NoiseSchedule | None = None,
    prediction: Prediction = "eps",
    clamp: float | None = None,
    weight: Callable[[int], float] = lambda step: 1.0,
    **options: float | str | bool | None,
) -> SamplerTable:
    """Build a sampler's table through given noise levels.

    Args:
        levels: the level of each step, and finally the level to end at; the noisiest first.
        schedule: required by samplers that evaluate the network between the levels.
        weight: step -> guidance scale.
        clamp, options: as in `build_table`.

    Raises:
        ValueError: an option is unknown, or the schedule is missing.
    """
    rows = _rows(name, levels, schedule, options)
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
    visited = [*(row.at for row in rows), levels[stop]]
    scales = [input_scale(level.alpha, level.sigma, prediction) for level in visited]
    columns = [
        _columns(row, number, prediction, clamp, (weight(row.step), rescale), scales[number:])
        for number, row in enumerate(rows)
    ]
    initial = levels[start]
    factor = input_scale(initial.alpha, initial.sigma, prediction)
    return SamplerTable(
        name=name,
        columns=torch.tensor(columns, dtype=torch.float64).reshape(-1, len(COLUMN)),
        timesteps=torch.tensor([row.at.t for row in rows], dtype=torch.float64),
        sigmas=torch.tensor([row.at.ve_sigma for row in rows], dtype=torch.float64),
        steps=torch.tensor([row.step for row in rows], dtype=torch.int64),
        final_sigma=levels[stop].ve_sigma,
        initial_level=Level(initial.t, factor * initial.alpha, factor * initial.sigma),
        scales=torch.tensor(scales, dtype=torch.float64),
    )


def _columns(
    row: Row,
    number: int,
    prediction: Prediction,
    clamp: float | None,
    guidance: tuple[float, float],
    scales: Sequence[float],
) -> list[float]:
    """The values of row `number` in the order of the columns.

    guidance: weight and rescale. scales: the factors of x before and after the row; what the slots
    of the history hold does not depend on them.
    """
    (weight, rescale), (before, after) = guidance, scales[:2]
    u, v = to_denoised(row.at.alpha, row.at.sigma, prediction)
    # With equal bounds, a network with learned variance gets this row's s too.
    fixed = 2 * math.log(row.s) if row.s > 0 else 0.0
    low, high = row.log_variance or (fixed, fixed)
    if row.s > 0:
        low, high = low + 2 * math.log(after), high + 2 * math.log(after)
    values = {
        "U": u / before,
        "V": v,
        "A": row.a * after / before,
        "B": row.b * after,
        "S": row.s * after,
        "P": row.p / before,
        "Q": row.q,
        **{name: after * c for name, c in zip(("C1", "C2", "C3"), row.c, strict=True)},
        "SLOT": row.slot,
        "W": weight,
        "CLAMP": math.inf if clamp is None else clamp,
        "LOGVAR_MIN": low,
        "LOGVAR_MAX": high,
        "NOISE_STEP": number,
        "RESCALE": rescale if weight != 1 else 0.0,
    }
    return [values.get(name, 0.0) for name in COLUMN]


def _rows(
    name: str,
    levels: Sequence[Level],
    schedule: NoiseSchedule | None,
    options: dict[str, float | str | bool | None],
) -> list[Row]:
    sampler = SAMPLERS[name]
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if unknown := [key for key in given if key not in sampler.options]:
        known = ", ".join(sampler.options) or "none"
        raise ValueError(f"sampler {name!r} has no option {unknown[0]!r}; it has {known}")
    for key, value in given.items():
        check_option(key, value, sampler.defaults[key])
    if sampler.takes_schedule:
        given["schedule"] = schedule
    return sampler.rows(levels, **given)
