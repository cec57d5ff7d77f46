"""Restart sampling (Xu et al. 2023, arXiv 2306.14878): the ODE, with noise put back in between.

    for every interval [low, high] of sigma / alpha, K times:
        x_high = x_low + sqrt(high² - low²) noise             algorithm 1, the forward jump
        x_low  = the ODE from high to low in N steps

The jump is linear in x, so it is part of the row that ends at `low`: the whole is a table like any
other. It goes up as well as down, which no list of levels of `build_table` does, so it has a
function of its own and no name in SAMPLERS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastdiff.diffusion.levels import Level, final_level, levels_of_sigmas, spaced_levels
from fastdiff.diffusion.samplers import COLUMN, SAMPLERS, SamplerTable, table_of_levels
from fastdiff.diffusion.schedules import FlowSchedule, NoiseSchedule, sigma_spacing
from fastdiff.names import Prediction


@dataclass(frozen=True, kw_only=True)
class Restart:
    """An interval that is gone through again."""

    low: float
    """sigma / alpha from which noise is added; the main steps' level nearest to it is taken."""
    high: float
    """sigma / alpha that it is raised to."""
    times: int = 1
    """How often (K)."""
    steps: int = 3
    """Steps of the ODE back down each time, spaced as Karras et al. 2022 (N_Restart - 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"a restart needs 0 < low < high, got low={self.low:g} and high={self.high:g}"
            )
        if self.times < 1 or self.steps < 1:
            raise ValueError(
                f"times and steps of a restart must be at least 1, got {self.times} and "
                f"{self.steps}; leave the restart out for none"
            )


def restart_table(
    schedule: NoiseSchedule,
    steps: int,
    restarts: Sequence[Restart],
    *,
    sampler: str = "heun",
    prediction: Prediction = "eps",
    spacing: str | Sequence[float] = "karras",
    clamp: float | None = None,
) -> SamplerTable:
    """The table of a sampler of the ODE with restarts, for `sample` and `Request`.

    Args:
        steps, prediction, spacing, clamp: of the main steps, as in `build_table`.
        restarts: the intervals, which may not begin at the same main level.
        sampler: one without noise and history, such as heun (the paper's), euler or dpmpp-2s.

    Raises:
        ValueError: the sampler adds noise or has a history, an interval is not on the schedule, or
            two begin at the same level.
    """
    if isinstance(schedule, FlowSchedule):
        raise ValueError(
            "restarts are defined for schedules with betas, got flow matching; build the table "
            "without restarts by build_table"
        )
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    levels = [*spaced_levels(schedule, steps, spacing), final_level(schedule, "zero")]

    def part(path: Sequence[Level]) -> SamplerTable:
        return table_of_levels(sampler, path, schedule=schedule, prediction=prediction, clamp=clamp)

    _check_forgets(part(levels))
    at = _places(levels, restarts)
    parts: list[SamplerTable] = []
    start = 0
    for place, restart in sorted(at.items()):
        low = levels[place]
        (high,) = levels_of_sigmas(schedule, [restart.high])
        inner = sigma_spacing("karras", restart.steps + 1, low.ve_sigma, restart.high)
        again = [high, *(levels_of_sigmas(schedule, [sigma])[0] for sigma in inner[1:-1]), low]
        parts += [_raised(part(levels[start : place + 1]), low, high)]
        parts += [_raised(part(again), low, high)] * (restart.times - 1) + [part(again)]
        start = place
    return _joined([*parts, part(levels[start:])])


def _check_forgets(table: SamplerTable) -> None:
    """Raise ValueError unless the sampler adds no noise and keeps nothing from step to step."""
    if bool((table.column("S") != 0).any()):
        raise ValueError(
            f"restarts need a sampler of the ODE, got {table.name!r}, which adds noise in every "
            "step; use 'heun'"
        )
    if SAMPLERS[table.name].evaluations == 1 and bool((table.column("SLOT") >= 0).any()):
        raise ValueError(
            f"restarts need a sampler that forgets earlier steps, got {table.name!r}; use 'heun'"
        )


def _places(levels: Sequence[Level], restarts: Sequence[Restart]) -> dict[int, Restart]:
    """Index of the main level that each restart begins at -> the restart."""
    found: dict[int, Restart] = {}
    inside = range(1, len(levels) - 1)
    for restart in restarts:
        if not inside:
            raise ValueError("restarts need at least 2 steps, got 1; take more steps")
        place = min(inside, key=lambda i: abs(math.log(levels[i].ve_sigma / restart.low)))
        if levels[place].ve_sigma >= restart.high:
            raise ValueError(
                f"the level nearest to low={restart.low:g} is {levels[place].ve_sigma:g}, above "
                f"high={restart.high:g}; take more steps, or another interval"
            )
        if restart.high > levels[0].ve_sigma:
            raise ValueError(
                f"high must be at most {levels[0].ve_sigma:g}, where sampling starts, got "
                f"{restart.high:g}"
            )
        if place in found:
            raise ValueError(
                f"two restarts begin at the level {levels[place].ve_sigma:g}; take more steps, or "
                "one restart with more times"
            )
        found[place] = restart
    return found


def _raised(table: SamplerTable, low: Level, high: Level) -> SamplerTable:
    """The table with its last row followed by the jump from low to high:

    x_high = (alpha_high / alpha_low) x_low + alpha_high sqrt(high² - low²) noise.
    """
    columns = table.columns.clone()
    factor = high.alpha / low.alpha
    for name in ("A", "B", "C1", "C2", "C3"):
        columns[-1, COLUMN[name]] *= factor
    noise = high.alpha * math.sqrt(high.ve_sigma**2 - low.ve_sigma**2)
    columns[-1, COLUMN["S"]] = noise
    for name in ("LOGVAR_MIN", "LOGVAR_MAX"):  # a network with learned variance gets the same
        columns[-1, COLUMN[name]] = 2 * math.log(noise)
    return replace(table, columns=columns, final_sigma=high.ve_sigma)


def _joined(tables: Sequence[SamplerTable]) -> SamplerTable:
    """One table after the other; every row has its own noise."""
    columns = torch.cat([table.columns for table in tables])
    columns[:, COLUMN["NOISE_STEP"]] = torch.arange(len(columns), dtype=torch.float64)
    steps, first = [], 0
    for table in tables:
        steps.append(table.steps + first)
        first += int(table.steps.max()) + 1 if len(table) else 0
    return replace(
        tables[0],
        columns=columns,
        timesteps=torch.cat([table.timesteps for table in tables]),
        sigmas=torch.cat([table.sigmas for table in tables]),
        steps=torch.cat(steps),
        final_sigma=tables[-1].final_sigma,
        scales=torch.ones(len(columns) + 1, dtype=torch.float64),
    )
