"""Folders in diffusers' layout: a pipeline with its model_index.json, or a single model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoint import bert, text_encoders
from fastdiff.checkpoint.build import Plan
from fastdiff.checkpoint.layouts.diffusers import dit, image_noise, unclip, upscaling
from fastdiff.checkpoint.layouts.diffusers.parts import (
    Files,
    find_weights,
    noise_of,
    part_of,
    plan_of,
    scheduler_of,
)
from fastdiff.checkpoint.layouts.diffusers.read import CONFIG, INDEX, SCHEDULER_CONFIG
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.options import NOISE
from fastdiff.checkpoint.scheduler import SchedulerConfig
from fastdiff.checkpoint.weights import read_json
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.dit import DiT
from fastdiff.models.network import Network
from fastdiff.models.prior import Prior
from fastdiff.models.text import AnyEncoder
from fastdiff.models.unet import UNet
from fastdiff.names import Prediction

NAME = "diffusers"
DENOISERS = ("unet", "transformer")
"""Folders of a pipeline that may contain its denoiser."""
# Parts of a pipeline that do not affect the images.
LEFT_OUT = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "requires_safety_checker",
    "watermarker",
    "depth_estimator",
)
XL_FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
XL_SCALE = 0.13025  # scaling_factor of Stable Diffusion XL's autoencoder; 0.18215 in 1 and 2


def load_pipeline(folder: Path, loading: Loading) -> Model:
    """Load the folder of a pipeline.

    Raises:
        FileNotFoundError: a part that model_index.json names is missing.
        ValueError: a part is damaged, of the wrong kind, or does not fit the others.
    """
    index = read_json(folder / INDEX)
    parts = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    if index.get("_class_name") in unclip.PIPELINES:
        return unclip.open_pipeline(folder, index["_class_name"], parts, loading)
    known = {*DENOISERS, "vae", "vqvae", "scheduler", "text_encoder", "text_encoder_2"}
    known |= {"tokenizer", "tokenizer_2", "bert"}
    noised = index.get("_class_name") == image_noise.PIPELINE
    if noised:
        known |= set(image_noise.PARTS)
    enlarges = index.get("_class_name") == upscaling.PIPELINE
    if enlarges:
        known.add(upscaling.LOW_RES)
    left_out = [name for name in LEFT_OUT if name in parts.keys() - known]
    if unknown := sorted(parts.keys() - known - set(LEFT_OUT)):
        raise ValueError(
            f"{folder / INDEX}: {index.get('_class_name')!r:.60} contains {', '.join(unknown)}, "
            "which fastdiff does not support; give a pipeline with a U-Net or DiT, an autoencoder "
            "and CLIP text encoders"
        )
    own = [name for name in DENOISERS if name in parts]
    if len(own) > 1:
        raise ValueError(
            f"{folder / INDEX}: {index.get('_class_name')!r:.60} contains {' and '.join(own)}; "
            "fastdiff supports pipelines with one denoiser"
        )
    first = next((name for name in ("vae", "vqvae") if name in parts), None)
    files = Files(loading.options.variant)
    # Read the configs and headers of all parts first, to fail before any weights are read.
    scheduler = scheduler_of(part_of(folder, "scheduler")) if "scheduler" in parts else None
    opened = {
        name: (read_json(part / CONFIG), files.find(part))
        for name in (*own, first)
        if name is not None and name in parts
        for part in (part_of(folder, name),)
    }
    scale = loading.options.scale_factor
    if first is not None:
        unscaled = index.get("_class_name") == upscaling.LDM_PIPELINE
        stated = 1.0 if unscaled else scale_factor(opened[first][0], part_of(folder, first))
        _check_scale(opened.get("unet", ({}, None))[0], stated, given=scale is not None)
        scale = scale or stated
    plans = {
        name: plan_of(part_of(folder, name), data, weights)
        for name, (data, weights) in opened.items()
    }
    text = _text_plans(folder, parts, loading, files)
    sight = image_noise.plan(folder, parts, files, loading) if noised else None
    noise = upscaling.picture_noise(folder, index, parts) if enlarges else None
    files.finish(folder)
    if sight is not None:
        image_noise.check(folder, sight, plans[own[0]].model if own else None)
    models = {name: loading.fill(plan) for name, plan in plans.items()}
    denoiser, autoencoder = models.get(own[0] if own else ""), models.get(first or "")
    xl = isinstance(denoiser, UNet) and denoiser.config.added_condition_dim is not None
    xl = xl and not noised
    model = Model(
        layout=NAME,
        denoiser=denoiser if isinstance(denoiser, Network) else None,
        autoencoder=autoencoder if isinstance(autoencoder, Autoencoder) else None,
        text_encoders=_text_encoders(folder, parts, text, loading, xl=xl),
        scale_factor=scale or 1.0,
        image_size=loading.options.image_size,
        class_names=_class_names(index, denoiser),
        path=folder,
        provenance={
            "pipeline": index.get("_class_name"),
            "ignored": left_out,
            **({"without variant": files.plain} if files.plain else {}),
        },
    )
    model.image_channels = image_channels(model.denoiser, model.autoencoder)
    for name in XL_FLAGS:
        if name in index:
            model.provenance[name] = bool(index[name])
    if model.class_names:
        model.provenance[dit.ID2LABEL] = index[dit.ID2LABEL]
    _describe(model, opened[own[0]][0] if own else {}, scheduler, loading)
    if sight is not None:
        image_noise.add(model, sight, loading)
    if noise is not None:
        upscaling.add(model, noise)
    return model


def _class_names(index: Mapping[str, Any], denoiser: nn.Module | None) -> tuple[str, ...]:
    """The first of each class's names in DiTPipeline's `id2label`; empty where it has none.

    Raises:
        ValueError: it does not name every class of the denoiser once.
    """
    table = index.get(dit.ID2LABEL)
    if table is None or not isinstance(denoiser, DiT):
        return ()
    count = denoiser.config.num_classes or 0
    keys = {str(label) for label in range(count)}
    if (
        not isinstance(table, dict)
        or table.keys() != keys
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise ValueError(
            f"{INDEX}: {dit.ID2LABEL} must name the classes 0 to {count - 1}, got {table!r:.60}; "
            "correct or remove it"
        )
    return dit.first_names(table)


def load_component(folder: Path, loading: Loading) -> Model:
    """Load the folder of a single model: a denoiser, an autoencoder or a text encoder."""
    data = read_json(folder / CONFIG)
    weights = find_weights(folder, loading.options.variant)
    model = Model(layout=NAME, path=folder, image_size=loading.options.image_size)
    if "_class_name" in data:
        part = loading.fill(plan_of(folder, data, weights))
        if isinstance(part, Network):
            model.denoiser = part
            config = folder / SCHEDULER_CONFIG  # DDPM's first repositories keep both in one folder
            scheduler = scheduler_of(folder) if config.is_file() else None
            _describe(model, data, scheduler, loading)
        else:
            assert isinstance(part, Autoencoder)
            model.autoencoder = part
            model.scale_factor = loading.options.scale_factor or scale_factor(data, folder)
        model.image_channels = image_channels(model.denoiser, model.autoencoder)
    else:
        part = loading.fill(text_encoders.plan_folder(folder, weights, loading))
        pooled = type(part).__name__ == "CLIPTextModelWithProjection"
        model.text_encoders = (text_encoders.conditioned(part, None, xl=pooled),)
    return model


def scale_factor(data: Mapping[str, Any], folder: Path) -> float:
    """The scaling_factor in an autoencoder's config.

    Raises:
        ValueError: the factor is not a positive number, or the latents are also shifted.
    """
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if data.get(name) is not None:
            raise ValueError(
                f"{folder / CONFIG}: {name} must be absent, got {data[name]!r:.60}; fastdiff "
                "supports only a scaling_factor for latents"
            )
    value = data.get("scaling_factor", 0.18215)  # diffusers' default for both kinds
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ValueError(f"{folder / CONFIG}: scaling_factor must be positive, got {value!r:.60}")
    return float(value)


def _check_scale(unet: Mapping[str, Any], scale: float, *, given: bool) -> None:
    """Detect the wrong autoencoder by its scale: those of 1, 2 and XL have the same shapes."""
    if given or unet.get("_class_name") != "UNet2DConditionModel":
        return
    xl = unet.get("addition_embed_type") == "text_time"
    if (scale == XL_SCALE) != xl and scale in (XL_SCALE, 0.18215):
        raise ValueError(
            f"the autoencoder's scaling_factor is {scale}, as in Stable Diffusion "
            f"{'1 and 2' if xl else 'XL'}, but the U-Net is from Stable Diffusion "
            f"{'XL' if xl else '1 or 2'}; use the autoencoder that belongs to it, or set "
            f"scale_factor={scale} if they were trained together"
        )


def _describe(
    model: Model,
    unet: Mapping[str, Any],
    scheduler: SchedulerConfig | None,
    loading: Loading,
) -> None:
    """Set what the scheduler and the U-Net's config state about sampling."""
    options = loading.options
    if model.denoiser is None:
        return
    if scheduler is not None:
        model.schedule = noise_of(model.path, scheduler, loading)
        model.prediction = scheduler.prediction
        model.sampler = scheduler.sampler
        if scheduler.no_sampler:
            model.provenance["no_sampler"] = scheduler.no_sampler
    else:
        model.schedule = loading.noise(ScheduleConfig()) if loading.says_noise else None
        trained: Prediction = "x0" if isinstance(model.denoiser, Prior) else "eps"
        model.prediction = options.prediction or trained
        if options.prediction is None:
            loading.assumed.take("prediction", trained)
            model.provenance |= loading.assumed.provenance
    if isinstance(model.denoiser, UNet):
        model.provenance["linear projections"] = bool(unet.get("use_linear_projection"))
    if (embed := unet.get("class_embed_type")) == "projection":
        model.provenance["class_embed_type"] = embed
    if unet.get("addition_time_embed_dim") is not None:
        model.provenance["addition_time_embed_dim"] = unet["addition_time_embed_dim"]
    size = unet.get("sample_size")
    if model.image_size is None and type(size) is int and size > 0:
        if model.autoencoder is not None:
            model.image_size = size * model.autoencoder.downsample_factor
        elif unet.get("_class_name") == "UNet2DModel":
            model.image_size = size
        else:
            model.provenance["latent size"] = size


def _text_plans(
    folder: Path, parts: Mapping[str, str], loading: Loading, files: Files
) -> dict[str, Plan]:
    if not loading.options.text_encoders:
        return {}
    plans = {}
    if "bert" in parts:
        data = read_json(folder / "bert" / CONFIG)
        plans["bert"] = bert.plan_folder(data, files.find(folder / "bert"))
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            weights = files.find(folder / name)
            plans[name] = text_encoders.plan_folder(folder / name, weights, loading)
    return plans


def _text_encoders(
    folder: Path, parts: Mapping[str, str], plans: Mapping[str, Plan], loading: Loading, *, xl: bool
) -> tuple[AnyEncoder, ...]:
    if "bert" in plans:
        own = folder / "tokenizer" if "tokenizer" in parts else None
        place = loading.options.tokenizer[0] if loading.options.tokenizer else own
        return (bert.encoder(plans["bert"], place, loading),)
    encoders = []
    for position, (name, plan) in enumerate(plans.items()):
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        place = folder / tokenizer_name if tokenizer_name in parts else None
        if loading.options.tokenizer:
            given = loading.options.tokenizer
            place = given[min(position, len(given) - 1)]
        tokenizer = text_encoders.read_tokenizer(place) if place is not None else None
        encoders.append(text_encoders.conditioned(loading.fill(plan), tokenizer, xl=xl))
    return tuple(encoders)


def _is_diffusers(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / CONFIG).is_file()


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Path)
    of_pipeline = (
        "vae",
        "tokenizer",
        "lora",
        "embedding",
        "controlnet",
        "variant",
        "ema",
        "text_encoders",
        "strict",
    )
    noise = ("schedule", *NOISE, "prediction", "scale_factor", "image_size")
    if extra := [name for name in loading.given if name not in (*of_pipeline, *noise)]:
        raise ValueError(
            f"{source}: {', '.join(extra)} cannot be given, because its config.json states them; "
            "leave them out"
        )
    opened = load_pipeline if (source / INDEX).is_file() else load_component
    return opened(source, loading)


_BESIDE = "whose config is in the same folder; give that folder"
LAYOUT = Layout(
    name=NAME,
    folder=_is_diffusers,
    refused={
        "the weights of a diffusers ControlNet; load the model that it was trained for with the "
        "folder as controlnet (--controlnet)": ("controlnet_cond_embedding.conv_in.weight",),
        f"the weights of a diffusers model, {_BESIDE}": (
            "conv_in.weight",
            "down_blocks.0.resnets.0.norm1.weight",
        ),
        f"the weights of a diffusers DiT, {_BESIDE}": (
            "pos_embed.proj.weight",
            "transformer_blocks.0.norm1.linear.weight",
        ),
        f"the weights of a diffusers autoencoder, {_BESIDE}": (
            "encoder.conv_in.weight",
            "encoder.mid_block.resnets.0.norm1.weight",
        ),
    },
    open=_open,
    save=save_diffusers,
)
