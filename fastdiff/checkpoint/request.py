"""What a caller wants of a checkpoint, and what its files cannot say."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from fastdiff.checkpoint.build import Plan, Progress, fill
from fastdiff.diffusion.predictions import Prediction
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.layers import QKVOrder

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Unsaid:
    """What a single file does not say. None: what the published model of this layout has."""

    prediction: Prediction | None = None
    """What the network returns; "v" for Stable Diffusion 2 at 768 pixels."""
    schedule: ScheduleConfig | None = None
    """The noise it was trained with."""
    num_heads: int | None = None
    """Heads of every attention; give this or head_dim."""
    head_dim: int | None = None
    """Width of a head."""
    qkv_order: QKVOrder | None = None
    """Rows of packed qkv weights: legacy (H, 3, d), new (3, H, d)."""
    timestep_scale: float | None = None
    """The network sees t times this: 1000 / T for improved-diffusion's rescale_timesteps."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    scale_factor: float | None = None
    """The latents are multiplied by it."""
    image_size: int | None = None
    """Height and width of the images it was trained on, in pixels."""

    def __post_init__(self) -> None:
        if self.prediction not in (None, *get_args(Prediction)):
            raise ValueError(
                f"prediction must be one of {', '.join(get_args(Prediction))}, "
                f"got {self.prediction!r}"
            )
        if self.schedule is not None and not isinstance(self.schedule, ScheduleConfig):
            raise ValueError(f"schedule must be a ScheduleConfig, got {self.schedule!r:.60}")
        for name in ("image_size", "num_heads", "head_dim", "norm_groups"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"{name} must be a positive whole number, got {value!r:.60}")
        for name in ("scale_factor", "timestep_scale"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} must be positive and finite, got {value!r:.60}")
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                f"give one of num_heads and head_dim, got {self.num_heads} and {self.head_dim}"
            )

    @property
    def given(self) -> list[str]:
        """Names of what was set."""
        plain = Unsaid()
        return [name for name in vars(self) if getattr(self, name) != getattr(plain, name)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to load: see `fastdiff.load`."""

    variant: str | None = None
    dtype: torch.dtype | None = torch.float32
    device: torch.device | str = "cpu"
    text_encoders: bool = True
    tokenizers: tuple[str | os.PathLike[str], ...] = ()
    ema: bool = True
    unsaid: Unsaid = field(default_factory=Unsaid)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        dtype = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device must be one of torch's, such as 'cpu' or 'cuda', got {self.device!r}"
            ) from error

    def fill(self, plan: Plan) -> Any:
        """The planned model with its weights."""
        return fill(
            plan.model,
            plan.sources,
            plan.weights,
            dtype=self.dtype,
            device=self.device,
            progress=self.progress,
        )
