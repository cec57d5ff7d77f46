"""Classifier-free guidance (Ho and Salimans 2022, eq. 6).

    F = F_uncond + scale * (F_cond - F_uncond)

The paper's w is our scale - 1, so scale 1 is the conditional model. Jobs treat smaller scales as 1
(`SampleSettings.weight`), as diffusers does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How strongly, how and when samples are pulled towards their condition."""

    scale: float = 1.0
    """1: the unguided conditional model, at half the cost; larger: closer to the condition."""
    rescale: float = 0.0
    """phi of Lin et al. 2023, eq. 16: 1 restores the std of the conditional F, 0 leaves F as is."""
    interval: tuple[int, int] | None = None
    """Guided steps [first, stop), counted from 0, the noisiest (Kynkäänniemi et al. 2024)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"guidance scale must be a finite number >= 0, got {self.scale}; "
                "up to 1 means no guidance, 7.5 is usual with a prompt"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(
                f"guidance rescale must be in [0, 1], got {self.rescale}; Lin et al. use 0.7"
            )
        interval: object = self.interval
        if interval is not None and not (
            isinstance(interval, tuple | list)
            and [type(step) for step in interval] == [int, int]
            and 0 <= interval[0] < interval[1]
        ):
            raise ValueError(
                "guidance interval must be steps (first, stop) with 0 <= first < stop, got "
                f"{interval!r:.40}; None guides all steps"
            )

    def weight(self, step: int) -> float:
        """The scale at a step: 1 outside the interval, where no unconditional output is needed."""
        if self.interval is not None and not self.interval[0] <= step < self.interval[1]:
            return 1.0
        return self.scale
