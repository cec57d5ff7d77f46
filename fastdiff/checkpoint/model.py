"""What a checkpoint holds once it is read: whoever trained it, whatever its layout was."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    schedule: ScheduleConfig | None = None
    """The noise the denoiser was trained with; None where there is no denoiser."""
    prediction: Prediction = "eps"
    """What the denoiser returns."""
    scale_factor: float = 1.0
    """Latents are multiplied by it before the denoiser sees them."""
    image_size: int | None = None
    """Height and width of the images it was trained on, in pixels, where the files tell."""
    path: Path = Path()
    provenance: dict[str, Any] = field(default_factory=dict)
    """What else the files say of themselves: licence, training step, the pipeline's class."""
