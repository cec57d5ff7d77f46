"""Rows, the registry of samplers, and what several families of samplers share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeVar

from fastdiff.diffusion.levels import Level, levels_of_sigmas
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.kernels import COLUMNS

NO_SLOT = -1
COLUMN = {column.name: int(column) for column in COLUMNS}
Variance = Literal["fixed_small", "fixed_large", "learned"]
SolverType = Literal["midpoint", "heun"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network evaluation at a level and the update after it (letters: the package)."""

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


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler and its traits."""

    rows: Callable[..., list[Row]]
    """levels -> rows; its other arguments are the sampler's options."""
    order: int | None
    """Order of convergence with the number of steps, weak if the sampler adds noise; None for
    networks that were distilled to few steps, where more steps do not converge to the ODE."""
    evaluations: int = 1
    """Network evaluations per step, except that steps to the clean image take one."""
    needs_signal: bool = False
    """Whether its formulas divide by alpha at each level, so that no level may have alpha = 0."""
    spacing: str = "trailing"
    """The spacing used if none is given."""
    ancestral: bool = False
    """Whether guidance by gradients shifts the mean of a step, by its variance, and not the score
    (Dhariwal & Nichol 2021, algorithm 1)."""

    @property
    def headline(self) -> str:
        """The first sentence of its docstring, which names the method and the paper."""
        return " ".join((inspect.getdoc(self.rows) or "").partition("\n\n")[0].split())

    @property
    def cost(self) -> str:
        """The order of convergence and the number of evaluations, in words."""
        order = "distilled networks" if self.order is None else f"order {self.order}"
        each = "1 evaluation" if self.evaluations == 1 else f"{self.evaluations} evaluations"
        return f"{order}, {each} per step"

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.rows).parameters
        return {
            name: parameter.default
            for name, parameter in parameters.items()
            if name not in ("levels", "schedule")
        }

    @property
    def takes_schedule(self) -> bool:
        """Whether it may need the noise schedule, for the timesteps of further levels."""
        return "schedule" in inspect.signature(self.rows).parameters


SAMPLERS: dict[str, Sampler] = {}
"""Name -> sampler, filled by the families of this package."""
_Rows = TypeVar("_Rows", bound=Callable[..., list[Row]])


def sampler(name: str, **traits: Any) -> Callable[[_Rows], _Rows]:
    """Register a function from levels to rows as a sampler; `traits` are the fields of Sampler."""

    def register(rows: _Rows) -> _Rows:
        SAMPLERS[name] = Sampler(rows=rows, **traits)
        return rows

    return register


OUT_OF_NOISE = 20.0
"""A step that starts above this sigma / alpha and reduces it by more than this factor starts from
nearly pure noise, like the first step of a cosine schedule (20,000 to 13 in 20 steps). A method
that corrects the step by the slope at its end, d1 - d0 = (D0 - D1) / sigma', weighted with the
length of the step, would multiply a small difference between estimates by half this ratio. Such a
step is an Euler step instead."""


def out_of_noise(now: Level, to: Level) -> bool:
    """Whether a step starts from nearly pure noise; see OUT_OF_NOISE."""
    return now.ve_sigma > OUT_OF_NOISE * max(to.ve_sigma, 1.0)


def repeats(now: Level, to: Level) -> bool:
    """Whether a step ends, up to rounding, at the level where it starts, and so does nothing."""
    return to.ve_sigma > now.ve_sigma * (1 - 1e-9)


def takes_euler(now: Level, to: Level) -> bool:
    """Whether a step of a singlestep method is an Euler step: it ends at the clean image, where
    log-SNR is infinite, starts from nearly pure noise, or repeats its level and does nothing."""
    return to.sigma == 0 or repeats(now, to) or out_of_noise(now, to)


def euler_row(now: Level, to: Level, step: int) -> Row:
    """A step of order 1: DDIM without noise (Song et al. 2021, eq. 12)."""
    a = to.sigma / now.sigma
    return Row(at=now, step=step, a=a, b=to.alpha - now.alpha * a)


def eps_weights(level: Level, weight: float) -> tuple[float, float]:
    """(a, b) with a * x + b * D = weight * eps_hat, eps_hat = (x - alpha * D) / sigma."""
    return weight / level.sigma, -weight * level.alpha / level.sigma


def ancestral(now: Level, to: Level, eta: float) -> tuple[Level, float]:
    """The level that a step goes down to, and the noise that brings it up to `to` (k-diffusion).

    sigma_up² = eta² * sigma_ve'² * (1 - sigma_ve'² / sigma_ve²), sigma_down² = sigma_ve'² -
    sigma_up². Both are returned scaled by alpha'.
    """
    up = eta * to.ve_sigma * math.sqrt(1 - (to.ve_sigma / now.ve_sigma) ** 2)
    down = math.sqrt(to.ve_sigma**2 - up**2)
    return Level(to.t, to.alpha, to.alpha * down), to.alpha * up


class Churn:
    """Noise added before each step (Karras et al. 2022, algorithm 2, lines 4 to 6).

    With gamma = min(s_churn / steps, sqrt(2) - 1) for levels from s_tmin to s_tmax, a step starts
    at sigma_hat = (1 + gamma) * sigma, after noise of s_noise * sqrt(sigma_hat² - sigma²) was
    added. A row adds its noise at its end, so this noise belongs to the row before; the first step
    has none, and no level is raised above the first, because the network has not seen more noise.

    Attributes:
        raised: the level that each step starts at.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        schedule: NoiseSchedule | None,
        s_churn: float,
        s_tmin: float,
        s_tmax: float,
        s_noise: float,
    ) -> None:
        if s_churn < 0 or s_noise < 0:
            raise ValueError(
                f"s_churn and s_noise must be >= 0, got {s_churn} and {s_noise}; s_churn=0 adds no "
                "noise"
            )
        self._levels, self._noise = levels, s_noise
        self.raised = list(levels[:-1])
        gamma = min(s_churn / max(len(levels) - 1, 1), math.sqrt(2) - 1)
        chosen = [
            step
            for step, level in enumerate(levels[:-1])
            if step and gamma and s_tmin <= level.ve_sigma <= s_tmax
        ]
        if not chosen:
            return
        if schedule is None:
            raise ValueError("s_churn needs the noise schedule, to find timesteps; pass schedule=")
        most = levels[0].ve_sigma
        sigmas = [min((1 + gamma) * levels[step].ve_sigma, most) for step in chosen]
        for step, level in zip(chosen, levels_of_sigmas(schedule, sigmas), strict=True):
            self.raised[step] = level

    def then(self, row: Row) -> Row:
        """The last row of a step, followed by the noise before the next step."""
        if row.step + 1 == len(self.raised):
            return row
        ends, starts = self._levels[row.step + 1], self.raised[row.step + 1]
        if starts is ends:
            return row
        scale = starts.alpha / ends.alpha
        c1, c2, c3 = (scale * c for c in row.c)
        s = self._noise * math.sqrt(max(starts.sigma**2 - (scale * ends.sigma) ** 2, 0.0))
        return replace(row, a=scale * row.a, b=scale * row.b, c=(c1, c2, c3), s=s)


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta must be in [0, 1], got {eta}; 0 adds no noise, 1 adds as much as DDPM"
        )


def check_option(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless an option has the type of its default; numbers must be finite.

    A default of infinity, a limit that is not there, allows infinity.
    """
    kind, words = type(default), {bool: "True or False", int: "a whole number", str: "text"}
    if kind is float:
        fits = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if fits else math.nan
        if math.isnan(number) or (math.isinf(number) and math.isfinite(default)):
            raise ValueError(f"{name} must be a finite number, got {value!r:.40}")
    elif kind in words and type(value) is not kind:
        raise ValueError(f"{name} must be {words[kind]}, got {value!r:.40}")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Raise ValueError if an option has none of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
