"""Larger images: enlarge the latents, or the image, and let image-to-image add the detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.core import Progress, SampleSettings, stage_seeds
from fastdiff.generate.image_to_image import latents_to_latents
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings

Via = Literal["latent", "image"]


def upscale(
    model: TextDiffusion,
    z: Tensor,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    scale: float = 2.0,
    via: Via = "latent",
    strength: float = 0.6,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Enlarge what `text_to_latents` made ("hires fix"), one image per seed.

    The noise of this pass is derived from the seeds, so the seeds of the first pass may be given.

    Args:
        z: (1 or N, C, h, w), scaled; of an image, `model.core.encode(image)`.
        scale: factor of both sides; the result's are rounded to what the networks can halve.
        via: enlarge the latents (bicubic; soft, so strength 0.5 and more), or the image between
            decoding and encoding (keeps more at low strength).
        strength, prompt, on_step, progress: as in `image_to_image`.

    Returns (N, 3, H, W) fp32 on the CPU, in [-1, 1].

    Raises:
        ValueError: scale below 1, or what `image_to_image` refuses.
    """
    check_scale(scale)
    if via not in ("latent", "image"):
        raise ValueError(f"unknown way {via!r}; expected one of latent, image")
    step = model.unet.config.size_multiple
    height, width = (max(round(side * scale / step), 1) * step for side in z.shape[2:])
    if via == "latent":
        z = F.interpolate(z, (height, width), mode="bicubic")
    else:
        factor = model.autoencoder.downsample_factor
        image = model.core.decode(z, tile=settings.tile)
        size = (height * factor, width * factor)
        image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        z = model.core.encode(image, tile=settings.tile)
    z = latents_to_latents(
        model,
        z,
        prompt,
        stage_seeds(seeds, "upscale"),
        strength=strength,
        text=text,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    return model.decode(z, settings)


def check_scale(scale: float) -> None:
    """Raise ValueError unless an image may be enlarged so."""
    if not 1 <= scale <= 16:
        raise ValueError(f"scale must lie in 1 to 16, got {scale}; 2 doubles both sides")
