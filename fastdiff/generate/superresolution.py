"""unCLIP's last stage: networks of the model's own enlarge the image that the decoder has made.

They read the small image, enlarged by a bicubic filter, in the channels after those of x, and start
from noise of a seed of their own. Karlo's second network takes only the last step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.samplers import SamplerTable
from fastdiff.generate.job import CHECKPOINT, Job, SampleSettings, stage_seed
from fastdiff.generate.session import Pass, Session
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Request


def second_pass(
    session: Session, job: Job, refiner: Session | None = None
) -> Callable[[Tensor], Pass]:
    """A function that plans the pass after the decoder's.

    Raises:
        ValueError: there is a refiner, which has no place after it.
    """
    if refiner is not None:
        raise ValueError(
            f"{session.facts.name} enlarges its images with networks of its own, so it cannot be "
            "combined with a refiner; leave the refiner out"
        )
    first, *last = session.upsamplers
    settings, seed = settings_of(job), stage_seed(job.seed, "superresolution")
    stop = settings.total - 1 if last else None

    def enlarge(x: Tensor) -> Pass:
        size = [side * session.model.upsampling for side in x.shape[1:]]
        small = x.clamp(-1, 1)[None]
        extra = F.interpolate(small, size, mode="bicubic", antialias=True)[0]
        table = first.table(settings, stop=stop)
        noise = first.noise(seed, (first.facts.channels, *size)) * table.initial_sigma

        def finish(x: Tensor) -> Pass:
            final = last[0].table(settings, start=settings.total - 1)
            return Pass(session=last[0], request=request(final, x))

        def request(table: SamplerTable, x: Tensor) -> Request:
            return Request(table=table, x=x, seed=seed, condition=Condition(), extra=extra)

        if not len(table):  # a single step, which is the last
            return finish(noise)
        then = finish if last else None
        return Pass(session=first, request=request(table, noise), then=then)

    return enlarge


def settings_of(job: Job) -> SampleSettings:
    """How a checked job's image is enlarged: by the files' sampler, without guidance."""
    steps = job.settings.upsampler_steps
    return SampleSettings(sampler=CHECKPOINT, steps=steps, guidance_scale=1.0)
