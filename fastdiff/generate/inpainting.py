"""Inpainting: new pixels where the mask is 1, the original ones elsewhere.

A denoiser trained for inpainting reads [x, mask, latents of the masked image], 9 channels in Stable
Diffusion, [x, masked image, 1 - mask], 7 channels in GLIDE, or [x, latents of the masked image,
2 mask - 1], 7 channels in LDM. With any other denoiser, x outside the mask is reset after each row
to the image's latents, noised to that level (Lugmayr et al. 2022, eq. 8, without resampling).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.generate.job import InpaintJob, first_step
from fastdiff.generate.pictures import fitted, read_mask_of, read_picture
from fastdiff.generate.session import Pass, Session
from fastdiff.models.concat import erased, inpainting_channels


def plan(session: Session, job: InpaintJob) -> Pass:
    """Plan an inpainting job.

    Raises:
        ValueError: the image, the mask or the prompt does not fit the model.
    """
    tile = job.settings.tile or 0
    image = session.picture(job.image, job.height, job.width, fit=job.fit)
    whole = read_picture(job.image, session.facts.image_channels, job.height, job.width)
    mask = fitted(read_mask_of(job, whole), session.facts.size_factor, job.fit, mask=True)
    if not mask.any():
        raise ValueError("fit='crop' removes the whole mask; use fit='resize' (--fit resize)")
    paste = (mask, image) if job.paste else None
    table = session.table(job.settings, start=first_step(job.settings.total, job.strength))
    z = session.encoded([job.image], image, tile, job.fit)
    if not len(table):
        return Pass(session=session, x=z, paste=paste)
    noise = session.noise(job.seed, tuple(z.shape))
    mask = mask.to(noise)
    if session.facts.extra == "inpainting":
        more: dict[str, Any] = {"extra": _masked(session, job, image, mask)}
    else:
        # A latent pixel is replaced if any of its image pixels is, so thin strokes are kept.
        small = F.adaptive_max_pool2d(mask[None], z.shape[1:])[0]
        more = {"mask": small, "known": z, "noise": noise}
    level = table.initial_level
    x = noise if job.strength == 1 else level.alpha * z + level.sigma * noise
    size = image.shape[1], image.shape[2]
    return Pass(session=session, request=session.request(job, table, x, size, **more), paste=paste)


def _masked(session: Session, job: InpaintJob, image: Tensor, mask: Tensor) -> Tensor:
    """What an inpainting denoiser reads behind x: the masked image and the mask.

    image: (C, H, W) in [-1, 1]. mask: (1, H, W), 0 or 1.
    """
    facts, kept = session.facts, erased(image, mask)
    if facts.masks_as_ldm:
        kept = kept - mask.to(image)  # LDM masks in [0, 1]: black instead of grey
    kept = session.encoded([job.image, job.mask], kept, job.settings.tile or 0, job.fit)
    if not facts.masks_as_ldm:
        return inpainting_channels(kept[None], mask[None], pixels=facts.pixels)[0]
    small = F.interpolate(mask[None], kept.shape[1:])[0]
    return torch.cat([kept / session.model.scale_factor, 2 * small - 1])
