"""What a caller wants of a checkpoint, and what its files cannot say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
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
