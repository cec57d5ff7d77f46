"""`fastdiff.load`: whatever a user has on disk, as modules of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.build import Progress
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts import Layout, Source, layouts
from fastdiff.checkpoint.layouts.bundle import shipped_bundles, shipped_folder
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.options import Loading, LoadOptions
from fastdiff.checkpoint.weights import Weights, some
from fastdiff.diffusion.schedules import ScheduleConfig

PathLike = str | os.PathLike[str]


def load(
    path: PathLike,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    vae: PathLike | None = None,
    tokenizer: PathLike | Sequence[PathLike] | None = None,
    schedule: ScheduleConfig | str | None = None,
    options: LoadOptions | None = None,
    **said: Any,
) -> Model:
    """Open a checkpoint: a diffusers folder, a single file, or a fastdiff bundle.

    The layout is recognised from keys and shapes, never from a name. Nothing in a pickle is run.
    Names and shapes of all parts are checked before a number of any is read, and each number is
    read once, to where it stays.

    Args:
        path: a folder with model_index.json, or with the config.json of one model; a .safetensors,
            .ckpt, .pt or .bin file of CompVis' latent diffusion, Stable Diffusion 1, 2 or XL,
            OpenAI's guided-diffusion or improved-diffusion, or a port of DDPM; a bundle's or a
            training run's folder, or a shipped bundle's name.
        dtype: what floating-point weights become; None: what each model mostly has in its file.
        progress: called as progress(tensor, bytes) after each tensor.
        vae: a file or folder whose autoencoder is used, for a model without one or instead of its
            own.
        tokenizer: a CLIP tokenizer's folder, or one per text encoder, for single files.
        schedule: the noise of the training, whole or by the kind of its betas, where the files do
            not say it.
        options: the same and more as one object; what is given by name wins over it.
        said: any other field of `LoadOptions`: variant, ema, text_encoders, prediction, num_heads,
            head_dim, qkv_order, timestep_scale, norm_groups, scale_factor, image_size, ...

    What had to be assumed is in `Model.assumed`, and in words in `Model.assumed_lines`.

    Raises:
        FileNotFoundError: nothing there, or a part of it is missing.
        ValueError: damaged, unknown, or parts that do not belong together; one line.
        ImportError: text encoders are wanted and transformers is not installed.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = (tokenizer,)
    if tokenizer is not None:
        said["tokenizer"] = tuple(Path(folder) for folder in tokenizer)
    if vae is not None:
        said["vae"] = Path(vae)
    if isinstance(schedule, str):
        said["schedule"] = schedule
    elif not isinstance(schedule, ScheduleConfig | None):
        raise ValueError(
            f"schedule must be a ScheduleConfig or the name of one, got {schedule!r:.60}"
        )
    loading = Loading(
        options=replace(options or LoadOptions(), **said),
        schedule=schedule if isinstance(schedule, ScheduleConfig) else None,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    model = _open(Path(path), loading)
    if loading.options.vae is not None:
        model = _with_autoencoder(model, loading.options.vae, loading)
    _check_together(model)
    return model


def _open(path: Path, loading: Loading) -> Model:
    source: Source
    if path.is_dir():
        source = path
    elif path.exists():
        if loading.options.variant is not None:
            raise ValueError(
                f"variant is for folders, got {loading.options.variant!r} with the file {path}"
            )
        source = open_weights(path)
    elif (shipped := shipped_folder(str(path))) is not None:
        source = shipped
    else:
        raise FileNotFoundError(
            f"{path} is missing; give a file, a folder, or the name of a shipped model "
            f"({', '.join(shipped_bundles())})"
        )
    return recognise(source).open(source, loading)


def recognise(source: Source) -> Layout:
    """The layout of a folder or of an opened file, told by what is in it and never by its name.

    Raises:
        FileNotFoundError: a folder that holds no model.
        ValueError: a file of no known layout; says what the file is, or lists its keys.
    """
    for layout in layouts():
        if layout.recognises(source):
            return layout
    if isinstance(source, Path):
        found = sorted(path.name for path in source.glob("*"))
        raise FileNotFoundError(
            f"{source}: expected model_index.json (a diffusers pipeline) or config.json (a model "
            f"or a fastdiff bundle), got {some(found) or 'an empty folder'}"
        )
    raise ValueError(f"{source.path}: {_stranger(source)}")


def _stranger(weights: Weights) -> str:
    """What to say of a file of no known layout."""
    for layout in layouts():
        if (what := layout.refusal(weights)) is not None:
            return f"these are {what}"
    return (
        "expected a checkpoint of CompVis, Stable Diffusion, OpenAI or DDPM, got tensors of no "
        f"known layout: {some(sorted(weights.places), 8) or 'none'}"
    )


def _with_autoencoder(model: Model, path: Path, loading: Loading) -> Model:
    """The model with the autoencoder of another file or folder.

    Raises:
        ValueError: it holds none, or its latents are scaled in another way than the model's.
    """
    part = Loading(
        options=LoadOptions(text_encoders=False, norm_groups=loading.options.norm_groups),
        dtype=loading.dtype,
        device=loading.device,
        progress=loading.progress,
    )
    other = _open(path, part)
    if other.autoencoder is None:
        raise ValueError(f"{path} holds no autoencoder; give the file or folder of one as vae")
    assumed, latent = model.assumed, model.provenance.get("latent size")
    scale = model.scale_factor
    if loading.options.scale_factor is None:
        stated = "scale_factor" not in other.assumed
        known = model.autoencoder is not None and "scale_factor" not in assumed
        if known and stated and abs(other.scale_factor - scale) > 1e-6:
            raise ValueError(
                f"the latents of {path} are scaled by {other.scale_factor}, those of {model.path} "
                f"by {scale}; use the autoencoder that belongs to it, or give scale_factor={scale} "
                "if they were trained together"
            )
        if not known and stated:
            scale = other.scale_factor
            assumed.pop("scale_factor", None)
    return replace(
        model,
        autoencoder=other.autoencoder,
        scale_factor=scale,
        image_size=model.image_size or (latent and latent * other.autoencoder.downsample_factor),
        image_channels=image_channels(model.denoiser, other.autoencoder),
        provenance={**model.provenance, "vae": str(path), "assumed": assumed},
        stored_hash="",
    )


def _check_together(model: Model) -> None:
    """The parts' widths must meet: latents with the denoiser, tokens with its context."""
    denoiser, autoencoder = model.denoiser, model.autoencoder
    if denoiser is None:
        return
    config = denoiser.config
    if autoencoder is not None:
        latent = autoencoder.config.latent_channels
        out = config.out_channels // (2 if config.learned_sigma else 1)
        if latent != out:
            raise ValueError(
                f"{model.path}: the autoencoder's latents have {latent} channels, the denoiser's "
                f"{out}; use the autoencoder that belongs to it"
            )
    if model.text_encoders:
        configs: list[Any] = [encoder.model.config for encoder in model.text_encoders]
        widths = [text.hidden_size for text in configs]
        if sum(widths) != config.context_dim:
            raise ValueError(
                f"{model.path}: the text encoders' tokens are {' + '.join(map(str, widths))} "
                f"wide, the denoiser reads {config.context_dim}; use those that belong to it"
            )
    classes = model.class_embedding
    if classes is not None and classes.embedding_dim != config.context_dim:
        raise ValueError(
            f"{model.path}: the classes' tokens are {classes.embedding_dim} wide, the denoiser "
            f"reads {config.context_dim}"
        )
