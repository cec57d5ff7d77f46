"""Image to image: encode, add the noise of a later step of the table, and sample from there.

The image is encoded to the mode of its latent distribution, so the seed's noise is the only
randomness.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdiff.generate.job import ImageToImageJob, Job, first_step
from fastdiff.generate.pictures import read_depth
from fastdiff.generate.session import Pass, Session


def plan(session: Session, job: ImageToImageJob) -> Pass:
    """Plan an image-to-image job.

    Raises:
        ValueError: the image or the prompt does not fit the model.
    """
    image = session.picture(job.image, job.height, job.width, fit=job.fit)
    z = session.encoded([job.image], image, job.settings.tile or 0, job.fit)
    more: dict[str, Any] = {}
    if job.depth is not None:
        more["extra"] = fitted_depth(read_depth(job.depth), z)
    return from_latents(session, job, z, strength=job.strength, seed=job.seed, **more)


def fitted_depth(depth: Tensor, z: Tensor) -> Tensor:
    """A depth map as a depth model reads it beside latents: of their size, from -1 to 1.

    depth: (1, H, W), any range. z: (C, h, w). Returns (1, h, w), like z.

    Raises:
        ValueError: the map is the same everywhere.
    """
    small = F.interpolate(depth[None].to(z), z.shape[1:], mode="bicubic")[0]
    low, high = small.amin(), small.amax()
    if not (depth.amax() > depth.amin() and high > low):  # the filter rounds
        raise ValueError(
            f"the depth map must not be the same everywhere, got only {float(low):g}; give a map "
            "of the picture"
        )
    return 2 * (small - low) / (high - low) - 1


def from_latents(
    session: Session, job: Job, z: Tensor, *, strength: float, seed: int, **more: Any
) -> Pass:
    """Plan a pass that starts from latents. z: (C, h, w), scaled. seed: seed of all noise. more:
    other fields of the request."""
    table = session.table(job.settings, start=first_step(job.settings.total, strength))
    if not len(table):
        return Pass(session=session, x=z)
    level, factor = table.initial_level, session.facts.factor
    noise = session.noise(seed, tuple(z.shape))
    size = z.shape[1] * factor, z.shape[2] * factor
    x = level.alpha * z + level.sigma * noise
    return Pass(session=session, request=session.request(job, table, x, size, seed=seed, **more))
