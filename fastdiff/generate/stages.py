"""Check what a job asks of a model with several stages (unCLIP), and fill in their defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.checkpoint.model import Model
from fastdiff.generate.job import (
    PRIOR_OPTIONS,
    InterpolationJob,
    Job,
    TextJob,
    TextSettings,
    stage_options,
)

PRIOR_STEPS, UPSAMPLER_STEPS = 25, 7
"""Default steps, those of diffusers' UnCLIPPipeline."""
PRIOR_SAMPLES = 2
"""Default number of image embeddings (Ramesh et al. 2022, section 2.2)."""


def check_stages(job: Job, model: Model) -> None:
    """Check that a model can do a job with its stages.

    Raises:
        ValueError: it cannot, or the job has options for stages that the model does not have.
    """
    if model.upsamplers:
        _check_upsampled(job, model)
    for name in stage_options(job):
        stage = model.upsamplers if name == "upsampler_steps" else model.prior
        if not stage:
            what = name.partition("_")[0]
            raise ValueError(f"{model.name} has no {what}, so {name} has no effect; leave it out")


def _check_upsampled(job: Job, model: Model) -> None:
    if not isinstance(job, TextJob | InterpolationJob):
        raise ValueError(
            f"{model.name} makes small images and enlarges them, so it cannot begin from a large "
            "one; use a prompt (fastdiff txt2img PROMPT)"
        )
    if getattr(job, "upscale", None) is not None:
        raise ValueError(
            f"{model.name} enlarges its images with networks of its own; leave upscale out"
        )


def resolved_text(text: TextSettings, prior: Model) -> TextSettings:
    """The text settings of a job with the defaults of a prior filled in; the same object if there
    are none to fill in."""
    scale = 1.0 if prior.guidance_scale is None else prior.guidance_scale
    defaults = zip(PRIOR_OPTIONS, (PRIOR_STEPS, scale, PRIOR_SAMPLES), strict=True)
    unset: dict[str, Any] = {k: v for k, v in defaults if getattr(text, k) is None}
    return replace(text, **unset) if unset else text
