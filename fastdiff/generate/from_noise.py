"""Images from classes and prompts: noise(seed) -> the whole table -> upscaling or a refiner."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdiff.diffusion.schedules import noise_schedule
from fastdiff.generate import refine, superresolution, upscale
from fastdiff.generate.job import ClassJob, TextJob, stage_seed
from fastdiff.generate.pictures import read_picture
from fastdiff.generate.session import Pass, Session
from fastdiff.generate.slerp import slerp
from fastdiff.images import enlarged
from fastdiff.models.concat import sketch_channels


def plan(session: Session, job: ClassJob | TextJob, refiner: Session | None = None) -> Pass:
    """Plan the passes of a job that starts from noise.

    Raises:
        ValueError: the prompts, pictures or refiner do not fit the model.
    """
    assert job.height is not None, "the job is checked"
    assert job.width is not None
    size = (job.height, job.width)
    x = start_noise(session, job)
    stop: int | None = None
    then: Callable[[Tensor], Pass] | None = None
    if session.upsamplers:
        then = superresolution.second_pass(session, job, refiner)
    elif isinstance(job, TextJob) and refiner is not None:
        stop, then = refine.second_pass(session, refiner, job)
    elif isinstance(job, TextJob) and job.upscale is not None:
        then = upscale.second_pass(session, job, job.upscale)
    table = session.table(job.settings, stop=stop)
    x = x * table.initial_sigma
    extra = _extra(session, job, x)
    return Pass(
        session=session, request=session.request(job, table, x, size, extra=extra), then=then
    )


def _extra(session: Session, job: ClassJob | TextJob, x: Tensor) -> Tensor | None:
    """What the denoiser reads behind x of a job's picture, (K, h, w); None if it reads none.

    Raises:
        ValueError: the picture cannot be read, or a sketch has another size than the image.
    """
    facts = session.facts
    if job.image is None or facts.extra not in ("upsampler", "sketch"):
        return None
    if facts.extra == "upsampler":
        return _small_picture(session, job, x)
    sketch = read_picture(job.image, 1, None, None)
    if sketch.shape[1:] != (job.height, job.width):
        raise ValueError(
            f"a sketch must have the size of the image, {job.width} x {job.height}, got "
            f"{sketch.shape[2]} x {sketch.shape[1]} (width x height); resize it, or set height and "
            "width"
        )
    return sketch_channels(sketch[None], facts.factor)[0].to(x)


def _small_picture(session: Session, job: ClassJob | TextJob, x: Tensor) -> Tensor:
    """The picture that an upsampler enlarges, as it reads it: (image_channels, h, w), like x.

    Next to latents it has their size, and the noise of the job's level where the model wants some.

    Raises:
        ValueError: the picture cannot be read, or does not have the size of the latents.
    """
    assert job.image is not None
    facts, noise = session.facts, session.model.picture_noise
    size = (x.shape[1], x.shape[2]) if facts.enlarges_to_latents else (None, None)
    image = read_picture(job.image, facts.image_channels, *size)
    image = enlarged(image[None], x.shape[1:])[0].to(x)
    if noise is None:
        return image
    assert isinstance(job, TextJob)
    assert job.text.image_noise is not None, "the job is checked"
    schedule, level = noise_schedule(noise.schedule), job.text.image_noise
    alpha, sigma = float(schedule.alpha(level)), float(schedule.sigma(level))
    drawn = session.noise(stage_seed(job.seed, "image noise"), tuple(image.shape))
    return alpha * image + sigma * drawn.to(image)


def start_noise(session: Session, job: ClassJob | TextJob) -> Tensor:
    """The initial noise of a job, (C, h, w): that of its seed, or between those of two seeds.

    Between two seeds it is on the great circle, so that every mixture has the norm of noise (White
    2016, "slerp").
    """
    assert job.height is not None
    assert job.width is not None
    shape = session.facts.x_shape(job.height, job.width)
    noise = session.noise(job.seed, shape)
    if job.variation_seed is None or job.variation == 0:
        return noise
    return slerp(noise, session.noise(job.variation_seed, shape), job.variation)
