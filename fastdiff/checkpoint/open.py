"""`fastdiff.load`: whatever a user has on disk, as modules of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint.build import Progress, plan_model
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts import compvis, ddpm, openai
from fastdiff.checkpoint.layouts.bundle import load_bundle, shipped_bundles
from fastdiff.checkpoint.layouts.folders import load_component, load_pipeline
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.recognise import recognise_file, recognise_folder
from fastdiff.checkpoint.request import Request, Unsaid
from fastdiff.checkpoint.weights import Weights
from fastdiff.models.unet import UNet

PathLike = str | os.PathLike[str]


def load(
    path: PathLike,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    text_encoders: bool = True,
    tokenizer: PathLike | Sequence[PathLike] | None = None,
    ema: bool = True,
    progress: Progress | None = None,
    **unsaid: Any,
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
        variant: of the files in a diffusers folder, such as "fp16".
        dtype: what floating-point weights become; None: what each model mostly has in its file.
        text_encoders: whether to load them; they need transformers.
        tokenizer: a CLIP tokenizer's folder, or one per text encoder, for single files.
        ema: take the averaged weights where a CompVis file has both.
        progress: called as progress(tensor, bytes) after each tensor.
        unsaid: what single files do not say, the fields of `Unsaid`: prediction, schedule,
            num_heads, head_dim, qkv_order, timestep_scale, norm_groups, scale_factor, image_size.
            What was assumed for want of them stands in `provenance["assumed"]`.

    Raises:
        FileNotFoundError: nothing there, or a part of it is missing.
        ValueError: damaged, unknown, or parts that do not belong together; one line.
        ImportError: text encoders are wanted and transformers is not installed.
    """
    folders = (tokenizer,) if isinstance(tokenizer, str | os.PathLike) else tuple(tokenizer or ())
    request = Request(
        variant=variant,
        dtype=dtype,
        device=device,
        text_encoders=text_encoders,
        tokenizers=folders,
        ema=ema,
        unsaid=Unsaid(**unsaid),
        progress=progress,
    )
    model = _load(Path(path), request)
    _check_together(model)
    return model


def _load(path: Path, request: Request) -> Model:
    if path.is_dir():
        layout = recognise_folder(path)
        if layout == "bundle":
            return _bundle(path, request)
        allowed = ("schedule", "prediction", "scale_factor", "image_size")
        if extra := [name for name in request.unsaid.given if name not in allowed]:
            raise ValueError(f"{path}: {', '.join(extra)} stand in its config.json; leave them out")
        return (load_pipeline if layout == "pipeline" else load_component)(path, request)
    if not path.exists():
        if str(path) in shipped_bundles():
            return _bundle(path, request)
        raise FileNotFoundError(
            f"{path} is missing; give a file, a folder, or the name of a shipped model "
            f"({', '.join(shipped_bundles())})"
        )
    if request.variant is not None:
        raise ValueError(f"variant is for folders, got {request.variant!r} with the file {path}")
    weights = open_weights(path)
    layout = recognise_file(weights)
    if layout == "compvis":
        return compvis.load_compvis(weights, request)
    if layout == "compvis first stage":
        return compvis.load_first_stage(weights, request)
    return _pixel_model(weights, layout, request)


def _pixel_model(weights: Weights, layout: str, request: Request) -> Model:
    """guided-diffusion, improved-diffusion and DDPM: a U-Net on pixels and nothing else."""
    unsaid = request.unsaid
    assumed: dict[str, Any] = {}
    if layout == "ddpm":
        config, names = ddpm.unet_config(weights.shapes, unsaid), ddpm.names
        schedule, size = ddpm.SCHEDULE, ddpm.IMAGE_SIZES.get(config.channel_mult)
    else:
        config, known = openai.pixel_unet_config(weights.shapes, unsaid)
        names, schedule, size = openai.names, known.schedule, known.image_size
        if unsaid.qkv_order is None:
            assumed["qkv_order"] = config.qkv_order
        if unsaid.timestep_scale is None and config.timestep_scale != 1:
            assumed["timestep_scale"] = config.timestep_scale
    if unsaid.num_heads is None and unsaid.head_dim is None:
        heads = "num_heads" if config.num_heads is not None else "head_dim"
        assumed[heads] = getattr(config, heads)
    if unsaid.schedule is None:
        assumed["schedule"] = schedule
    if unsaid.prediction is None:
        assumed["prediction"] = "eps"
    if unsaid.image_size is None and size is not None:
        assumed["image_size"] = size
    denoiser: UNet = request.fill(plan_model(config, names, weights))
    provenance: dict[str, Any] = {"facts": weights.facts, "assumed": assumed}
    if config.in_channels == 6:
        provenance["condition"] = "the low-resolution image, upsampled, in the last 3 channels of x"
    return Model(
        layout=layout,
        denoiser=denoiser,
        schedule=unsaid.schedule or schedule,
        prediction=unsaid.prediction or "eps",
        image_size=unsaid.image_size or size,
        image_channels=image_channels(denoiser, None),
        path=weights.path,
        provenance=provenance,
    )


def _bundle(path: Path, request: Request) -> Model:
    if request.unsaid.given or request.variant:
        given = ", ".join([*request.unsaid.given, *(["variant"] if request.variant else [])])
        raise ValueError(f"{path}: a bundle says everything itself; leave {given} out")
    return load_bundle(path, device=request.device, dtype=request.dtype, progress=request.progress)


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
            f"{model.path}: the classes' tokens are {classes.embedding_dim} wide, the U-Net "
            f"takes {config.context_dim}"
        )
