"""Noise levels, and how a sampler's steps are spaced over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast, get_args

import torch

from fastdiff.diffusion.fastdpm import Curve, step_timesteps, var_levels
from fastdiff.diffusion.flow import flow_timesteps
from fastdiff.diffusion.respacing import check_spacing, check_steps, respaced_timesteps
from fastdiff.diffusion.schedules import (
    FlowSchedule,
    NoiseSchedule,
    sigma_spacing,
    timestep_spacing,
)
from fastdiff.names import FASTDPM_SPACINGS, SigmaSpacing, TimestepSpacing


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha * x0 + sigma * n at timestep t (real; -1 for the clean image)."""

    t: float
    alpha: float
    sigma: float

    @property
    def ve_sigma(self) -> float:
        """sigma / alpha: the noise level of Karras et al. 2022; inf where no signal is left."""
        return self.sigma / self.alpha if self.alpha else math.inf


CLEAN = Level(-1.0, 1.0, 0.0)


def spaced_levels(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str | Sequence[float],
    *,
    steps_offset: int = 0,
) -> list[Level]:
    """The noise levels of the steps, the noisiest first, without the final one.

    Args:
        spacing: a name in `fastdiff.names.SPACINGS` (with flow matching: of `flow.SPACINGS`), a
            respacing string (`respacing`), or the timesteps themselves, as descending real numbers.
        steps_offset: added to the timesteps of "leading".

    Raises:
        ValueError: the spacing is unknown, or cannot have this many steps on this schedule.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; 20 to 50 are usual")
    last = schedule.num_timesteps - 1
    if isinstance(spacing, str):
        check_spacing(spacing)
    if not isinstance(spacing, str):
        timesteps = [float(t) for t in spacing]
        if len(timesteps) != steps or any(a <= b for a, b in pairwise(timesteps)):
            raise ValueError(
                f"spacing must contain {steps} descending timesteps, one per step, "
                f"got {len(timesteps)}: {timesteps[:4]}..."
            )
    elif isinstance(schedule, FlowSchedule):
        if steps_offset:
            raise ValueError(f"steps_offset must be 0 with flow matching, got {steps_offset}")
        timesteps = flow_timesteps(schedule, steps, spacing)
    elif spacing in get_args(TimestepSpacing):
        kind = cast(TimestepSpacing, spacing)
        whole = timestep_spacing(kind, steps, schedule.num_timesteps, offset=steps_offset)
        timesteps = [float(t) for t in whole]
    elif steps_offset:
        raise ValueError(
            f"steps_offset must be 0 with spacing {spacing!r}, got {steps_offset}; "
            "it is for spacing 'leading'"
        )
    elif spacing in get_args(SigmaSpacing):
        ends = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (0, last))
        sigmas = sigma_spacing(cast(SigmaSpacing, spacing), steps, *ends)
        return levels_of_sigmas(schedule, sigmas)
    elif spacing in FASTDPM_SPACINGS:
        way, curve = spacing.split("-")
        if way == "var":
            pairs = var_levels(cast(Curve, curve), steps, schedule)
            return [Level(t, math.sqrt(gamma), math.sqrt(1 - gamma)) for t, gamma in pairs]
        whole = step_timesteps(cast(Curve, curve), steps, schedule.num_timesteps)
        timesteps = [float(t) for t in whole]
    else:
        check_steps(spacing, steps)
        timesteps = [float(t) for t in respaced_timesteps(spacing, schedule.num_timesteps)]
    return levels_at(schedule, timesteps)


def levels_at(schedule: NoiseSchedule, timesteps: Sequence[float]) -> list[Level]:
    """The schedule's levels at the given real timesteps, in the same order."""
    t = torch.tensor(timesteps, dtype=torch.float64)
    alphas, sigmas = schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
    return [Level(*numbers) for numbers in zip(timesteps, alphas, sigmas, strict=True)]


def levels_of_sigmas(schedule: NoiseSchedule, sigmas: Sequence[float]) -> list[Level]:
    """The variance-preserving levels with the given sigma / alpha > 0, at the schedule's t."""
    timesteps = schedule.timestep(torch.tensor(sigmas, dtype=torch.float64)).tolist()
    return [
        Level(t, 1 / math.hypot(1, s), s / math.hypot(1, s))
        for t, s in zip(timesteps, sigmas, strict=True)
    ]


def final_level(schedule: NoiseSchedule, final: str) -> Level:
    """The level a table ends at: the clean image ("zero"), or the level of t = 0 ("sigma_min")."""
    if final == "zero":
        return CLEAN
    if final != "sigma_min":
        raise ValueError(f"unknown final {final!r}; expected one of zero, sigma_min")
    # "leading" without an offset already ends at this level; its last step then does nothing.
    return levels_at(schedule, [0.0])[0]
