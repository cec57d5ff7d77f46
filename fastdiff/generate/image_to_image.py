"""Image to image: encode, add the noise of a later step of the table, and sample from there.

The image is encoded to the mode of its latent distribution, so the seed's noise is the only
randomness.
"""

from __future__ import annotations

from torch import Tensor

from fastdiff.generate.job import ImageToImageJob, Job, first_step
from fastdiff.generate.session import Pass, Session


def plan(session: Session, job: ImageToImageJob) -> Pass:
    """Plan an image-to-image job.

    Raises:
        ValueError: the image or the prompt does not fit the model.
    """
    image = session.picture(job.image, job.height, job.width, fit=job.fit)
    z = session.encoded([job.image], image, job.settings.tile or 0, job.fit)
    return from_latents(session, job, z, strength=job.strength, seed=job.seed)


def from_latents(session: Session, job: Job, z: Tensor, *, strength: float, seed: int) -> Pass:
    """Plan a pass that starts from latents. z: (C, h, w), scaled. seed: seed of all noise."""
    table = session.table(job.settings, start=first_step(job.settings.total, strength))
    if not len(table):
        return Pass(session=session, x=z)
    level, factor = table.initial_level, session.facts.factor
    noise = session.noise(seed, tuple(z.shape))
    size = z.shape[1] * factor, z.shape[2] * factor
    x = level.alpha * z + level.sigma * noise
    return Pass(session=session, request=session.request(job, table, x, size, seed=seed))
