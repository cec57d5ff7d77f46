"""Check what a job asks of a model with several stages (unCLIP), and fill in their defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.checkpoint.model import Model
from fastdiff.generate.job import (
    PLAIN_TEXT,
    PRIOR_OPTIONS,
    InterpolationJob,
    Job,
    TextJob,
    TextSettings,
    stage_options,
)

PRIOR_STEPS, UPSAMPLER_STEPS = 25, 7
"""Default steps, those of diffusers' UnCLIPPipeline."""
PICTURE_NOISE = 20
"""Default noise level of diffusers' StableDiffusionUpscalePipeline."""
PRIOR_SAMPLES = 2
"""Default number of image embeddings (Ramesh et al. 2022, section 2.2)."""


def check_stages(job: Job, model: Model) -> None:
    """Check that a model can do a job with its stages.

    Raises:
        ValueError: it cannot, or the job has options for stages that the model does not have.
    """
    for name in stage_options(job):
        what, there = _stage_of(name, model)
        if not there:
            raise ValueError(f"{model.name} has no {what}, so {name} has no effect; leave it out")
    level, most = getattr(job, "text", PLAIN_TEXT).image_noise, most_noise(model)
    if level is not None and most is not None and level > most:
        raise ValueError(f"image_noise must be 0 to {most}, got {level}")
    if model.projection is None and model.image_encoder is None:
        return
    if not isinstance(job, TextJob | InterpolationJob):
        raise ValueError(
            f"{model.name} begins with noise and takes a picture as its embedding; use a prompt "
            "(fastdiff txt2img PROMPT), with image= (--image FILE) if it has an image encoder"
        )
    if model.upsamplers and getattr(job, "upscale", None) is not None:
        raise ValueError(
            f"{model.name} enlarges its images with networks of its own; leave upscale out"
        )
    if model.prior is None and job.image is None:
        raise ValueError(
            f"{model.name} makes variations of a picture, and none was given; pass image= "
            "(fastdiff txt2img PROMPT --image FILE; the prompt may be empty)"
        )


def _stage_of(option: str, model: Model) -> tuple[str, bool]:
    """The stage that an option is for, and whether a model has it."""
    if option == "upsampler_steps":
        return "upsampler", bool(model.upsamplers)
    if option in PRIOR_OPTIONS:
        return "prior", model.prior is not None
    if option == "image_noise":
        return "noise of pictures or of their embeddings", most_noise(model) is not None
    return "image encoder", model.image_encoder is not None


def most_noise(model: Model) -> int | None:
    """The highest `image_noise` of a model; None: it adds no noise to pictures."""
    if model.picture_noise is not None:
        return model.picture_noise.most
    levels = model.image_noise_schedule
    return None if levels is None else levels.num_timesteps - 1


def resolved_text(text: TextSettings, model: Model) -> TextSettings:
    """The text settings of a job with the defaults of a model's stages filled in; the same object
    if there are none to fill in."""
    if model.picture_noise is not None and text.image_noise is None:
        return replace(text, image_noise=min(PICTURE_NOISE, model.picture_noise.most))
    prior = model.prior
    if prior is None:
        return text
    scale = 1.0 if prior.guidance_scale is None else prior.guidance_scale
    defaults = zip(PRIOR_OPTIONS, (PRIOR_STEPS, scale, PRIOR_SAMPLES), strict=True)
    unset: dict[str, Any] = {k: v for k, v in defaults if getattr(text, k) is None}
    return replace(text, **unset) if unset else text
