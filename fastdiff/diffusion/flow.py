"""Flow matching: straight paths from data to noise (Lipman et al. 2023; Esser et al. 2024, SD3).

    x_s = (1 - s) * x0 + s * n,   F = dx_s / ds = n - x0,   t = s * T,   0 <= s <= 1

The noise level s is the network's timestep divided by T. Divided by h = sqrt((1 - s)² + s²), x_s is
the variance-preserving x of all samplers, with alpha = (1 - s) / h and sigma = s / h, so that
s = sigma / (alpha + sigma) and h = 1 / (alpha + sigma). Both ends have h = 1. Tables for prediction
"flow" contain this factor: x is x_s in the loop (`samplers.table`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.schedules import FLOW, FlowSchedule, ScheduleConfig

SPACINGS = ("trailing", "linspace")
"""The named spacings of steps over s; timesteps can also be given as numbers."""


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
    if config.kind != FLOW or pixels < 1 or trained < 1:
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
