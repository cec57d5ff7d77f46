"""Inpainting: new pixels where the mask is 1, the rest as it was.

A denoiser trained for it reads [x, mask, latents of the image without what is masked], 9 channels
of Stable Diffusion. Any other is held to the image after each row: outside the mask x becomes the
image's latents with the noise of that level (Lugmayr et al. 2022, eq. 8, without resampling).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.generate.job import InpaintJob, first_step
from fastdiff.generate.pictures import fitted, read_mask_of, read_picture
from fastdiff.generate.session import Pass, Session


def plan(session: Session, job: InpaintJob) -> Pass:
    """
    Raises:
        ValueError: an image, a mask or a prompt that does not fit.
    """
    tile = job.settings.tile or 0
    image = session.picture(job.image, job.height, job.width, fit=job.fit)
    whole = read_picture(job.image, session.facts.image_channels, job.height, job.width)
    mask = fitted(read_mask_of(job, whole), session.facts.size_factor, job.fit, mask=True)
    if not mask.any():
        raise ValueError("fit='crop' leaves nothing of the mask; use fit='resize' (--fit resize)")
    paste = (mask, image) if job.paste else None
    table = session.table(job.settings, start=first_step(job.settings.total, job.strength))
    z = session.encoded([job.image], image, tile, job.fit)
    if not len(table):
        return Pass(session=session, x=z, paste=paste)
    noise = session.noise(job.seed, tuple(z.shape))
    mask = mask.to(noise)
    if session.facts.extra == "inpainting":
        small = F.interpolate(mask[None], z.shape[1:])[0]  # the nearest pixel, as in training
        kept = session.encoded([job.image, job.mask], image * (mask < 0.5).to(image), tile, job.fit)
        more: dict[str, Any] = {"extra": torch.cat([small, kept])}
    else:
        # A latent pixel is new if any pixel of its square is: a thin stroke does not get lost.
        small = F.adaptive_max_pool2d(mask[None], z.shape[1:])[0]
        more = {"mask": small, "known": z, "noise": noise}
    level = table.initial_level
    x = noise if job.strength == 1 else level.alpha * z + level.sigma * noise
    size = image.shape[1], image.shape[2]
    return Pass(session=session, request=session.request(job, table, x, size, **more), paste=paste)
