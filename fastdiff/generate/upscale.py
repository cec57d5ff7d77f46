"""Larger images: enlarge the latents or the image, then add detail with image-to-image.

This pass derives its own seed, so it does not repeat the noise of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastdiff.generate.image_to_image import from_latents
from fastdiff.generate.job import TextJob, UpscaleJob, Via, stage_seed
from fastdiff.generate.session import Pass, Session


def plan(session: Session, job: UpscaleJob) -> Pass:
    """Plan an upscaling job.

    Raises:
        ValueError: the image or the prompt does not fit the model.
    """
    image = session.picture(job.image, fit=job.fit)
    z = session.encoded([job.image], image, job.settings.tile or 0, job.fit)
    z = enlarge(session, z, job.scale, job.via, job.settings.tile or 0)
    return from_latents(
        session, job, z, strength=job.strength, seed=stage_seed(job.seed, "upscale")
    )


def second_pass(session: Session, job: TextJob, scale: float) -> Callable[[Tensor], Pass]:
    """A function that plans the pass after the first one, to enlarge its result ("hires fix")."""

    def go_on(z: Tensor) -> Pass:
        larger = enlarge(session, z, scale, job.upscale_via, job.settings.tile or 0)
        seed = stage_seed(job.seed, "upscale")
        return from_latents(session, job, larger, strength=job.upscale_strength, seed=seed)

    return go_on


def enlarge(session: Session, z: Tensor, scale: float, via: Via, tile: int) -> Tensor:
    """Enlarge z: (C, h, w), scaled, by `scale`, rounded to sides that the networks support."""
    step = session.facts.size_factor // session.facts.factor
    height, width = (max(round(side * scale / step), 1) * step for side in z.shape[1:])
    if via == "latent":
        return F.interpolate(z[None], (height, width), mode="bicubic")[0]
    factor = session.facts.factor
    image = session.latents.decode(z[None], tile=tile)
    size = (height * factor, width * factor)
    image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return session.latents.encode(image, tile=tile)[0]
