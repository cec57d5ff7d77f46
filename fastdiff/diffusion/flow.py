"""Flow matching: straight paths from data to noise (Lipman et al. 2023; Esser et al. 2024, SD3).

    x_s = (1 - s) * x0 + s * n,   F = dx_s / ds = n - x0,   t = s * T,   0 <= s <= 1

The noise level s is the network's timestep divided by T. Divided by h = sqrt((1 - s)² + s²), x_s is
the variance-preserving x of all samplers, with alpha = (1 - s) / h and sigma = s / h, so that
s = sigma / (alpha + sigma) and h = 1 / (alpha + sigma). Both ends have h = 1. Tables for prediction
"flow" contain this factor: x is x_s in the loop (`samplers.table`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

KIND = "flow"
SPACINGS = ("trailing", "linspace")
"""The named spacings of steps over s; timesteps can also be given as numbers."""


class FlowSchedule(NoiseSchedule):
    """alpha, sigma and signal-to-noise ratio of the straight path at any real t in [0, T].

    It has no betas: there is no `posterior`, and it cannot be respaced.

    Attributes:
        num_timesteps: T.
        shift: of the noise levels of sampling and training; see `shifted`.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        if config.kind != KIND:
            raise ValueError(f"expected a schedule of kind 'flow', got {config.kind!r}")
        self.num_timesteps, self.shift = config.num_timesteps, config.shift

    def share(self, t: float | Tensor) -> Tensor:
        """s = t / T, the share of the noise. Returns t's shape, fp64, on t's device."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= self.num_timesteps)).all()):
            raise ValueError(
                f"timesteps must be in [0, {self.num_timesteps}], got {float(t.min()):g} to "
                f"{float(t.max()):g}; t = 0 has no noise"
            )
        return t / self.num_timesteps

    def alpha(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return (1 - s) / torch.hypot(1 - s, s)

    def sigma(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return s / torch.hypot(1 - s, s)

    def snr(self, t: float | Tensor) -> Tensor:
        s = self.share(t)
        return ((1 - s) / s).square()

    def log_snr(self, t: float | Tensor) -> Tensor:
        return self.snr(t).log()

    def timestep(self, sigmas: Tensor) -> Tensor:
        """The t at which sigma / alpha has the given value; inf is T. Returns fp64, CPU."""
        return self.num_timesteps / (1 + 1 / sigmas.detach().to("cpu", torch.float64))

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_s = (1 - s) * x0 + s * noise, which the network sees.

        x0, noise: (N, ...), any float dtype. t: () or (N,). Returns x0's shape and dtype.
        """
        s = self.share(t)
        return self._like(1 - s, x0) * x0 + self._like(s, x0) * noise

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor) -> NoReturn:
        raise ValueError("flow matching has no betas, so there is no posterior of a step")

    def respaced(self, timesteps: Sequence[int]) -> NoReturn:
        raise ValueError("flow matching has no betas, so its schedule cannot be respaced")


def noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule of any config."""
    return FlowSchedule(config) if config.kind == KIND else NoiseSchedule(config)


def shifted(s: Tensor, shift: float) -> Tensor:
    """More noise for shift > 1: shift * s / (1 + (shift - 1) * s) (Esser et al. 2024, eq. 23).

    s: any shape, in [0, 1]. Two shifts in a row are the shift by their product.
    """
    return shift * s / (1 + (shift - 1) * s)


def for_pixels(config: ScheduleConfig, pixels: int, trained: int) -> ScheduleConfig:
    """The schedule for images of another size (Esser et al. 2024, section 5.3.2, eq. 23).

    More pixels hide the same signal less under the same noise, so the shift is multiplied by
    sqrt(pixels / trained).

    config: of kind "flow", whose shift is right for images of `trained` pixels.
    """
    if config.kind != KIND or pixels < 1 or trained < 1:
        raise ValueError(
            "expected a schedule of kind 'flow' and positive numbers of pixels, got "
            f"{config.kind!r}, {pixels} and {trained}"
        )
    return replace(config, shift=config.shift * math.sqrt(pixels / trained))


def flow_timesteps(schedule: FlowSchedule, steps: int, spacing: str) -> list[float]:
    """Real timesteps t = s * T of the steps, shifted, the noisiest first; the first is T.

    trailing: s in strides of 1 / steps. linspace: s evenly spaced from 1 to 1 / T.

    Raises:
        ValueError: the spacing is not one of `SPACINGS`.
    """
    total = schedule.num_timesteps
    if spacing == "trailing":
        s = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    elif spacing == "linspace":
        s = torch.from_numpy(np.linspace(1.0, 1.0 / total, steps))
    else:
        raise ValueError(
            f"spacing must be {' or '.join(SPACINGS)} with flow matching, or the timesteps "
            f"themselves, got {spacing!r}"
        )
    return [float(t) for t in shifted(s, schedule.shift) * total]


def check_flow(kind: str, prediction: str) -> None:
    """Raise ValueError unless prediction "flow" and a schedule of kind "flow" come together."""
    if (kind == KIND) != (prediction == "flow"):
        raise ValueError(
            "prediction 'flow' and a schedule of kind 'flow' belong together, got prediction "
            f"{prediction!r} and schedule {kind!r}; set both"
        )
