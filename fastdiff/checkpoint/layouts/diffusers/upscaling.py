"""What is special about diffusers' pipelines that enlarge a picture on latents:
StableDiffusionUpscalePipeline (Stable Diffusion's x4-upscaler) and LDMSuperResolutionPipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastdiff.checkpoint.layouts.diffusers.parts import scheduler_of
from fastdiff.checkpoint.layouts.diffusers.read import INDEX
from fastdiff.checkpoint.model import Model, PictureNoise

PIPELINE = "StableDiffusionUpscalePipeline"
LOW_RES = "low_res_scheduler"
LDM_PIPELINE = "LDMSuperResolutionPipeline"
"""Decodes latents without a factor, whatever its first stage's config states."""
MOST_NOISE = "max_noise_level"
GUIDANCE = 9.0
"""The guidance scale of diffusers' pipeline."""


def picture_noise(folder: Path, index: Mapping[str, Any], parts: Collection[str]) -> PictureNoise:
    """The noise of the low-resolution picture. index: the model_index.json; parts: its parts.

    Raises:
        ValueError: the scheduler of the noise is missing, or the highest level is not one of its.
    """
    if LOW_RES not in parts:
        raise ValueError(f"{folder}: {PIPELINE} lacks {LOW_RES}; download the whole folder")
    schedule = scheduler_of(folder / LOW_RES).schedule
    most = index.get(MOST_NOISE, 350)  # diffusers' default
    if type(most) is not int or not 0 <= most < schedule.num_timesteps:
        raise ValueError(
            f"{folder / INDEX}: {MOST_NOISE} must be 0 to {schedule.num_timesteps - 1}, got "
            f"{most!r:.60}; correct it"
        )
    return PictureNoise(schedule=schedule, most=most)


def add(model: Model, noise: PictureNoise) -> None:
    """Add what the noise needs to a model.

    Raises:
        ValueError: the U-Net does not read the level of the noise.
    """
    levels: Any = None if model.denoiser is None else model.denoiser.config.num_classes
    if levels is None or levels <= noise.most:
        raise ValueError(
            f"{model.path}: the U-Net's num_class_embeds must be above {noise.most}, the highest "
            f"noise level, got {levels}"
        )
    model.picture_noise = noise
    model.guidance_scale = GUIDANCE
