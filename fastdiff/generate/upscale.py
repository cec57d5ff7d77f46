"""Larger images: enlarge the latents, or the image, and let image-to-image add the detail.

The noise of this pass is derived from the seed, so that none of the first pass's comes again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastdiff.generate.image_to_image import from_latents
from fastdiff.generate.job import TextJob, UpscaleJob, Via, stage_seed
from fastdiff.generate.session import Pass, Session


def plan(session: Session, job: UpscaleJob) -> Pass:
    """
    Raises:
        ValueError: an image or a prompt that does not fit the model.
    """
    image = session.picture(job.image, fit=job.fit)
    z = session.encoded([job.image], image, job.settings.tile or 0, job.fit)
    z = enlarge(session, z, job.scale, job.via, job.settings.tile or 0)
    return from_latents(
        session, job, z, strength=job.strength, seed=stage_seed(job.seed, "upscale")
    )


def second_pass(session: Session, job: TextJob, scale: float) -> Callable[[Tensor], Pass]:
    """What comes after a first pass whose image is to be larger ("hires fix")."""

    def go_on(z: Tensor) -> Pass:
        larger = enlarge(session, z, scale, job.upscale_via, job.settings.tile or 0)
        seed = stage_seed(job.seed, "upscale")
        return from_latents(session, job, larger, strength=job.upscale_strength, seed=seed)

    return go_on


def enlarge(session: Session, z: Tensor, scale: float, via: Via, tile: int) -> Tensor:
    """z: (C, h, w), scaled -> the same, both sides `scale` times as long, as the networks allow."""
    step = session.facts.size_factor // session.facts.factor
    height, width = (max(round(side * scale / step), 1) * step for side in z.shape[1:])
    if via == "latent":
        return F.interpolate(z[None], (height, width), mode="bicubic")[0]
    factor = session.facts.factor
    image = session.latents.decode(z[None], tile=tile)
    size = (height * factor, width * factor)
    image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return session.latents.encode(image, tile=tile)[0]
