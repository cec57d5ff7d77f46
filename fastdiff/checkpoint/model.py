"""What a checkpoint holds once it is read: whoever trained it, whatever its layout was."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.diffusion.predictions import Prediction
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.text import TextEncoder
from fastdiff.models.unet import UNet


@dataclass(kw_only=True)
class Checkpoint:
    """A model read from disk, its modules in eval mode and without gradients."""

    layout: str
    """How the files were laid out: "diffusers", "compvis", "guided-diffusion", "ddpm", "bundle"."""
    unet: UNet | None = None
    """The denoiser; None for an autoencoder alone."""
    autoencoder: Autoencoder | None = None
    """The first stage; None for diffusion on pixels."""
    text_encoders: tuple[TextEncoder, ...] = ()
    """In the order in which their tokens are joined along the width."""
    class_embedding: nn.Embedding | None = None
    """Classes as one context token each, where the U-Net has a context and no text (LDM)."""
    schedule: ScheduleConfig | None = None
    """The noise the denoiser was trained with; None where there is no denoiser, or where a U-Net
    came alone."""
    prediction: Prediction = "eps"
    """What the denoiser returns."""
    sampler: SamplerSettings | None = None
    """How the files say to sample, `sampler.arguments(schedule, steps)` for `build_table`; None
    where they say nothing or no table of ours does it (then provenance["no_sampler"] says why)."""
    scale_factor: float = 1.0
    """Latents are multiplied by it before the denoiser sees them."""
    image_size: int | None = None
    """Height and width of the images it was trained on, in pixels, where the files tell."""
    path: Path = Path()
    provenance: dict[str, Any] = field(default_factory=dict)
    """What else there is to know: "pipeline" (diffusers' class), "facts" of the files (training
    step, metadata), "assumed" (name -> what the files do not say and was taken from the documents
    of the published models), "ignored" (what was left in the files), "no_sampler"."""
