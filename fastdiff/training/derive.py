"""Derive the settings of a run that depend on its images, unless they are set explicitly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.data import AugmentConfig, DataConfig, describe_folder
from fastdiff.files import one_line_errors
from fastdiff.models.concat import extra_channels
from fastdiff.training.autoencoder import AutoencoderRun
from fastdiff.training.classifier import ClassifierRun
from fastdiff.training.diffusion import DiffusionRun

RunT = TypeVar("RunT", AutoencoderRun, ClassifierRun, DiffusionRun[Any])
PHOTOGRAPHS = AugmentConfig(flip=True, fill="reflection")
"""A mirrored photograph still looks real; a rotated or sheared one does not."""


@one_line_errors()
def for_data(run: RunT, data: DataConfig) -> RunT:
    """Adapt a run to other images: augmentation, channels, classes and guidance.

    Args:
        run: a run that works on the digits.
        data: the new source and path. Folders are inspected; for shards only the augmentation is
            adapted, because reading them takes long.

    Raises:
        FileNotFoundError, ValueError: as for `fastdiff.data.open_dataset` and `load_bundle`.
    """
    channels, classes = run.data.channels, 0
    if data.source == "folder":
        channels, classes = describe_folder(Path(data.path))
    data = replace(data, augment=PHOTOGRAPHS, channels=channels, image_size=run.data.image_size)
    if isinstance(run, AutoencoderRun):
        return replace(
            run,
            data=data,
            model=replace(run.model, image_channels=channels),
            discriminator=replace(run.discriminator, image_channels=channels),
        )
    if isinstance(run, ClassifierRun):
        taken = run.model
        if run.guides:  # its samples are those of the denoiser
            data = replace(data, channels=run.data.channels)
        else:
            taken = replace(taken, in_channels=channels, sample_size=data.image_size)
        taken = replace(taken, num_classes=classes or taken.num_classes)
        return replace(run, data=data, model=taken)
    model = run.model
    if run.autoencoder:
        first = load_bundle(run.autoencoder)
        data = replace(
            data,
            channels=first.image_channels or data.channels,
            image_size=first.image_size or data.image_size,
        )
        if first.autoencoder is not None:
            latent = first.autoencoder
            side = data.image_size // latent.downsample_factor
            more = _concatenated(run, latent.config.latent_channels, data, latent.downsample_factor)
            model = _taking(model, latent.config.latent_channels, side, more)
    else:
        more = channels if run.low_resolution else _concatenated(run, channels, data, 1)
        model = _taking(model, channels, data.image_size, more)
    if data.source != "folder":
        return replace(run, data=data, model=model)
    return replace(
        run,
        data=data,
        model=replace(model, num_classes=classes or None, null_class=bool(classes)),
        class_dropout=run.class_dropout if classes else 0.0,
        preview=replace(run.preview, guidance_scale=run.preview.guidance_scale if classes else 1.0),
        latent_views=run.latent_views if run.autoencoder else 0,
    )


def _concatenated(run: DiffusionRun[Any], channels: int, data: DataConfig, factor: int) -> int:
    """Input channels that a run's concatenated picture takes behind those of x."""
    return extra_channels(
        run.extra or "none", channels=channels, image_channels=data.channels, factor=factor
    )


def _taking(model: Any, channels: int, side: int, more: int) -> Any:
    """Change a denoiser's config to samples of (channels, side, side), with `more` channels behind
    x."""
    out = channels * (2 if model.learned_sigma else 1)
    if hasattr(model, "sample_size"):
        model = replace(model, sample_size=side)
    return replace(model, in_channels=channels + more, out_channels=out)
