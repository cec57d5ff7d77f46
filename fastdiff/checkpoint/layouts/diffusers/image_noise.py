"""The further parts of diffusers' StableUnCLIPImg2ImgPipeline (Stable Diffusion 2.1 unCLIP): CLIP's
image encoder, the statistics of its embeddings, and the noise that is added to one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastdiff.checkpoint import image_encoders
from fastdiff.checkpoint.build import Plan, plan_model
from fastdiff.checkpoint.layouts.diffusers.options import Options
from fastdiff.checkpoint.layouts.diffusers.parts import Files, reading, scheduler_of
from fastdiff.checkpoint.layouts.diffusers.read import CONFIG
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.weights import Sources, read_json
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.unclip import ImageNoise, ImageNoiseConfig

PIPELINE = "StableUnCLIPImg2ImgPipeline"
PARTS = ("image_normalizer", "image_noising_scheduler", "image_encoder", "feature_extractor")
NORMALIZER = "StableUnCLIPImageNormalizer"
GUIDANCE = 10.0
"""The guidance scale of diffusers' pipeline."""


class Plans(NamedTuple):
    """The parts, whose weights have not been read yet."""

    sight: Plan
    noise: Plan
    schedule: ScheduleConfig


def names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers') of the normalizer."""
    assert isinstance(model, ImageNoise)
    return {"mean": ("mean",), "std": ("std",)}


def config(data: Mapping[str, Any]) -> ImageNoiseConfig:
    """Our config for the `config.json` of a StableUnCLIPImageNormalizer.

    Raises:
        ValueError: another class, or an option that it does not have.
    """
    options = Options(data)
    if options.class_name != NORMALIZER:
        raise ValueError(
            f"_class_name must be {NORMALIZER!r}, got {options.class_name!r:.60}; give the "
            "image_normalizer of the pipeline"
        )
    made = ImageNoiseConfig(embedding_dim=options.get("embedding_dim", 768))
    options.finish()
    return made


def plan(folder: Path, parts: Collection[str], files: Files, loading: Loading) -> Plans:
    """Plan the parts of a pipeline's folder. parts: those of its model_index.json.

    Raises:
        FileNotFoundError: the file of a part is missing.
        ValueError: a part is missing, damaged or of another kind.
    """
    if missing := [name for name in PARTS if name not in parts]:
        raise ValueError(f"{folder}: {PIPELINE} lacks {missing[0]}; download the whole folder")
    place = folder / "image_normalizer"
    path = place / CONFIG
    data = read_json(path)
    noise = plan_model(reading(path, lambda: config(data)), names, files.find(place))
    place = folder / "image_encoder"
    sight = image_encoders.plan_folder(place, files.find(place), loading)
    return Plans(sight, noise, scheduler_of(folder / "image_noising_scheduler").schedule)


def check(folder: Path, plans: Plans, unet: nn.Module | None) -> None:
    """Raise ValueError unless the widths of the parts fit each other."""
    reads: Any = None if unet is None else unet.config
    seen: Any = plans.sight.model.config
    noise: Any = plans.noise.model.config
    width = noise.embedding_dim
    if seen.projection_dim != width:
        raise ValueError(
            f"{folder}: the image encoder's projection_dim must be {width}, the embedding_dim of "
            f"the image_normalizer, got {seen.projection_dim}"
        )
    if getattr(reads, "added_condition_dim", None) != 2 * width:
        raise ValueError(
            f"{folder}: the U-Net's projection_class_embeddings_input_dim must be {2 * width}, "
            "twice the embedding_dim of the image_normalizer, got "
            f"{getattr(reads, 'added_condition_dim', None)}"
        )


def add(model: Model, plans: Plans, loading: Loading) -> None:
    """Read the planned parts into a model."""
    model.image_noise = loading.fill(plans.noise)
    model.image_noise_schedule = plans.schedule
    folder = model.path / "feature_extractor"
    model.image_encoder = image_encoders.encoder(plans.sight, folder, loading)
    model.guidance_scale = GUIDANCE
