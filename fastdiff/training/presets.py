"""Tested runs by name. Change fields with `dataclasses.replace` or on the command line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.data import AugmentConfig, DataConfig
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.discriminator import DiscriminatorConfig
from fastdiff.models.presets import AUTOENCODERS, CLASSIFIERS, DITS, UNETS, UVITS
from fastdiff.training.autoencoder import AutoencoderLossConfig, AutoencoderRun
from fastdiff.training.classifier import ClassifierRun
from fastdiff.training.concat import ConcatConfig, ConcatKind
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.diffusion import DiffusionRun, PreviewConfig
from fastdiff.training.objective import DenoiserLossConfig
from fastdiff.training.text import TextConfig

# The variations are as small as those of handwriting, and some images stay unchanged, so that the
# models also see the real distribution. The autoencoder may learn more than digits; the denoiser
# must not.
_WIDE = AugmentConfig(shift=1.5, rotation=8, scale=0.06, shear=6, probability=0.75)
_NARROW = AugmentConfig(shift=1, rotation=6, scale=0.05, shear=5, probability=0.85)


def _tiny(
    model: Any, folder: str, *, steps: int = 6000, batch_size: int = 64, **other: Any
) -> DiffusionRun[Any]:
    """A denoiser of digits that trains within fifteen minutes."""
    return DiffusionRun(
        model=model,
        class_dropout=0.1,
        optimization=OptimizationConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            weight_decay=0.01,
            warmup_steps=300,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.999,
        ),
        output=OutputConfig(
            folder=folder, preview_every=1000, save_every=1000, export_dtype="fp16"
        ),
        **other,
    )


def _tiny_latent(model: Any, folder: str, **other: Any) -> DiffusionRun[Any]:
    """A tiny denoiser of the latents of the shipped autoencoder."""
    return _tiny(
        model,
        folder,
        autoencoder="digits",
        data=DataConfig(augment=_NARROW),
        schedule=ScheduleConfig(kind="cosine"),
        prediction="v",
        loss=DenoiserLossConfig(timesteps="stratified"),
        latent_views=16,
        **other,
    )


def _captioned(source: str, image_size: int, *, augment: AugmentConfig | None = None) -> DataConfig:
    """Pictures with captions."""
    return DataConfig(
        source=source,  # type: ignore[arg-type]
        image_size=image_size,
        channels=3,
        augment=augment or AugmentConfig(),
    )


def _first_stage(data: DataConfig, folder: str, *, steps: int) -> AutoencoderRun:
    """The autoencoder of drawings: flat colours and sharp edges, so no discriminator."""
    return AutoencoderRun(
        model=AUTOENCODERS["emoji"],
        data=data,
        discriminator=DiscriminatorConfig(image_channels=3),
        loss=AutoencoderLossConfig(
            perceptual_weight=0.25, kl_weight=1e-3, adversarial_weight=0.0, adversarial_start=0
        ),
        optimization=OptimizationConfig(
            steps=steps,
            batch_size=16,
            learning_rate=1e-3,
            final_learning_rate=2e-5,
            beta2=0.99,
            warmup_steps=100,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.995,
            precision="bf16",
            channels_last=True,
        ),
        output=OutputConfig(folder=folder, preview_every=500, save_every=250, export_dtype="fp16"),
    )


def _text_to_image(
    model: Any, data: DataConfig, folder: str, *, steps: int, text: TextConfig, **other: Any
) -> DiffusionRun[Any]:
    """A denoiser and its text transformer, on the latents of the run before it."""
    return DiffusionRun(
        model=model,
        autoencoder=folder.replace("text", "autoencoder"),
        data=data,
        schedule=ScheduleConfig(kind="cosine"),
        prediction="v",
        loss=DenoiserLossConfig(timesteps="stratified"),
        class_dropout=0.1,
        text=text,
        optimization=OptimizationConfig(
            steps=steps,
            batch_size=32,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            weight_decay=0.01,
            warmup_steps=200,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.999,
            precision="bf16",
            channels_last=True,
        ),
        preview=PreviewConfig(guidance_scale=3.0, steps=25),
        output=OutputConfig(folder=folder, preview_every=1000, save_every=250, export_dtype="fp16"),
        **other,
    )


# Drawings are moved and scaled a little, on white; not mirrored, because of clocks and words.
_DRAWINGS = AugmentConfig(shift=2, scale=0.06, rotation=4, probability=0.8, fill="border")

_SCENES = _text_to_image(
    UNETS["scenes"],
    _captioned("scenes", 32),
    "runs/scenes-text",
    steps=12000,
    text=TextConfig(layers=2, heads=4, tokens=24, vocabulary=512),
    latent_views=1,
)


def _concatenating(kind: ConcatKind, in_channels: int, folder: str) -> DiffusionRun[Any]:
    """The denoiser of captioned scenes, which also reads a picture."""
    return replace(
        _SCENES,
        model=replace(_SCENES.model, in_channels=in_channels),
        concat=ConcatConfig(kind=kind),
        output=replace(_SCENES.output, folder=folder),
    )


TRAINING_PRESETS: dict[str, AutoencoderRun | ClassifierRun | DiffusionRun[Any]] = {
    "digits-autoencoder": AutoencoderRun(
        model=AUTOENCODERS["digits"],
        data=DataConfig(augment=_WIDE),
        discriminator=DiscriminatorConfig(
            image_channels=1, model_channels=32, num_layers=2, norm="group"
        ),
        loss=AutoencoderLossConfig(
            perceptual_weight=0.25, kl_weight=1e-2, adversarial_weight=0.1, adversarial_start=1200
        ),
        optimization=OptimizationConfig(
            steps=1600,
            batch_size=48,
            learning_rate=1e-3,
            final_learning_rate=5e-5,
            beta1=0.5,
            beta2=0.9,
            warmup_steps=100,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.995,
        ),
        output=OutputConfig(
            folder="runs/digits-autoencoder", preview_every=500, save_every=500, export_dtype="fp16"
        ),
    ),
    "digits-diffusion": DiffusionRun(
        model=replace(UNETS["digits"], dropout=0.1),
        autoencoder="runs/digits-autoencoder",
        data=DataConfig(augment=_NARROW),
        schedule=ScheduleConfig(kind="cosine"),
        prediction="v",
        loss=DenoiserLossConfig(timesteps="stratified"),
        class_dropout=0.1,
        latent_views=32,
        optimization=OptimizationConfig(
            steps=8000,
            batch_size=64,
            learning_rate=6e-4,
            final_learning_rate=1e-5,
            weight_decay=0.01,
            warmup_steps=200,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.999,
        ),
        preview=PreviewConfig(guidance_scale=1.5),
        output=OutputConfig(
            folder="runs/digits-diffusion", preview_every=1000, save_every=1000, export_dtype="fp16"
        ),
    ),
    # on the pixels of the scans as they are, 8 x 8 in 17 grey levels
    "tiny-ddpm": _tiny(  # Ho et al. 2020: the linear schedule, eps, the simple loss
        UNETS["tiny-pixels"],
        "runs/tiny-ddpm",
        steps=3000,  # twelve minutes of one thread
        data=DataConfig(image_size=8),
        preview=PreviewConfig(sampler="ddim"),
    ),
    "tiny-iddpm": _tiny(  # Nichol and Dhariwal 2021: cosine, a learned variance, L_hybrid
        replace(UNETS["tiny-pixels"], out_channels=2, learned_sigma=True),
        "runs/tiny-iddpm",
        steps=2000,  # eight minutes of one thread
        data=DataConfig(image_size=8),
        schedule=ScheduleConfig(kind="cosine"),
        loss=DenoiserLossConfig(bin_width=0.125),
        preview=PreviewConfig(sampler="ddpm"),
    ),
    "tiny-upsampler": _tiny(  # Nichol and Dhariwal 2021, section 4: 4 x 4 to 8 x 8
        replace(UNETS["tiny-pixels"], in_channels=2, out_channels=2, learned_sigma=True),
        "runs/tiny-upsampler",
        steps=3000,  # twelve minutes of one thread
        data=DataConfig(image_size=8),
        low_resolution=4,
        schedule=ScheduleConfig(kind="cosine"),
        loss=DenoiserLossConfig(bin_width=0.125),
        preview=PreviewConfig(sampler="ddpm"),
    ),
    "tiny-flow": _tiny(  # Esser et al. 2024: straight paths, logit-normal timesteps
        UNETS["tiny-pixels"],
        "runs/tiny-flow",
        steps=3000,  # twelve minutes of one thread
        data=DataConfig(image_size=8),
        schedule=ScheduleConfig(kind="flow"),
        prediction="flow",
        loss=DenoiserLossConfig(timesteps="logit-normal"),
        preview=PreviewConfig(sampler="flow-heun"),
    ),
    "tiny-mnist": _tiny(  # on pixels of MNIST, 28 x 28
        UNETS["tiny-mnist"],
        "runs/tiny-mnist",
        steps=4000,  # the images have twelve times the pixels of the scans
        batch_size=32,
        data=DataConfig(source="mnist-5k", image_size=28),
        schedule=ScheduleConfig(kind="cosine"),
        prediction="v",
        loss=DenoiserLossConfig(timesteps="stratified"),
        preview=PreviewConfig(guidance_scale=1.5),
    ),
    "tiny-dit": _tiny_latent(
        DITS["tiny"],
        "runs/tiny-dit",
        # previews use DDPM, the sampler that uses the learned variance
        preview=PreviewConfig(sampler="ddpm", guidance_scale=1.5),
    ),
    "tiny-uvit": _tiny_latent(
        UVITS["tiny"], "runs/tiny-uvit", preview=PreviewConfig(guidance_scale=1.5)
    ),
    # from captions: Rombach et al. 2022, section 3.3, with a text transformer trained jointly
    "emoji-autoencoder": _first_stage(
        _captioned("emoji", 64, augment=_DRAWINGS), "runs/emoji-autoencoder", steps=6000
    ),
    "emoji-text": _text_to_image(
        UNETS["emoji"],
        _captioned("emoji", 64, augment=_DRAWINGS),
        "runs/emoji-text",
        steps=20000,  # an hour and a half of two cores
        text=TextConfig(layers=1, heads=4, tokens=24, vocabulary=2048, dropout=0.1),
        latent_views=8,
    ),
    "scenes-autoencoder": _first_stage(
        _captioned("scenes", 32), "runs/scenes-autoencoder", steps=3000
    ),
    "scenes-text": _SCENES,
    # a picture behind x: Rombach et al. 2022, section 3.3; the same U-Net with more channels
    "scenes-inpainting": _concatenating("inpainting", 4 + 5, "runs/scenes-inpainting"),
    "scenes-sketch": _concatenating("sketch", 4 + 16, "runs/scenes-sketch"),
    "tiny-classifier": ClassifierRun(
        model=replace(CLASSIFIERS["tiny"], dropout=0.1),
        guides="digits",
        data=DataConfig(augment=_NARROW),
        schedule=ScheduleConfig(kind="cosine"),
        latent_views=8,
        optimization=OptimizationConfig(
            steps=1500,
            batch_size=64,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            weight_decay=0.05,
            warmup_steps=100,
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.995,
        ),
        output=OutputConfig(
            folder="runs/tiny-classifier",
            preview_every=500,
            save_every=500,
            export_dtype="fp16",
        ),
    ),
}
