"""ControlNets, added to a model when it is loaded.

Zhang et al. 2023 (arXiv 2302.05543). Two layouts are read: diffusers' folders (`ControlNetModel`),
and the original files, whose ControlNet lies under `control_model.` (alone, or beside the whole
Stable Diffusion) or under no prefix. The original layout does not say how many heads there are, so
they are those of the U-Net that the ControlNet was copied from: the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoint.build import Place, Plan, plan_model, source_names
from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts import openai
from fastdiff.checkpoint.layouts.diffusers import read as diffusers
from fastdiff.checkpoint.layouts.diffusers.parts import find_weights, reading
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.weights import Shapes, Sources, Weights, read_json, some
from fastdiff.models.controlnet import ControlNet, ControlNetConfig
from fastdiff.models.unet import UNet, UNetConfig

CLASS, UNET = "ControlNetModel", "UNet2DConditionModel"
PREFIX = "control_model."
MARK = "input_hint_block.0.weight"
DIFFUSERS_MARK = "controlnet_cond_embedding.conv_in.weight"
_UP = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
_TRAINING = ("controlnet_conditioning_channel_order", "global_pool_conditions")


def add_all(model: Model, paths: Sequence[Path], loading: Loading) -> Model:
    """Add ControlNets to a model, in their order.

    Args:
        model: with a U-Net that reads text.
        paths: folders of diffusers, or files in the original layout.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it contains no ControlNet, or one for another kind of model.
    """
    if not isinstance(model.denoiser, UNet) or not model.denoiser.config.has_transformers:
        raise ValueError(
            "a ControlNet is for a U-Net that reads text by cross-attention, got the "
            f"{type(model.denoiser).__name__} of {model.path}; leave controlnet out"
        )
    plans = [_plan(path, model, model.denoiser.config, loading) for path in paths]
    nets: tuple[ControlNet, ...] = tuple(loading.fill(plan) for plan in plans)
    return replace(
        model,
        controlnets=(*model.controlnets, *nets),
        provenance={**model.provenance, "controlnet": [str(path) for path in paths]},
        stored_hash="",
    )


def _plan(path: Path, model: Model, unet: UNetConfig, loading: Loading) -> Plan:
    """The ControlNet of a folder or file, checked against the model, its weights not read yet."""
    if path.is_dir():
        return _plan_folder(path, model, unet, loading.options.variant)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; give the folder of a diffusers ControlNet, or a file of the "
            "original layout"
        )
    weights = open_weights(path)
    if DIFFUSERS_MARK in weights.places:
        raise ValueError(
            f"{path}: these are the weights of a diffusers ControlNet, whose config is in the same "
            "folder; give that folder"
        )
    if f"{PREFIX}{MARK}" in weights.places:
        weights = weights.under(PREFIX)
    if MARK not in weights.places:
        raise ValueError(
            f"{path} contains no ControlNet, which would have {PREFIX}{MARK}, got "
            f"{some(sorted(weights.places))}; give a ControlNet for Stable Diffusion"
        )
    return _plan_original(weights, model, unet)


def _plan_folder(folder: Path, model: Model, unet: UNetConfig, variant: str | None) -> Plan:
    path = folder / diffusers.CONFIG
    data = read_json(path)
    if data.get("_class_name") != CLASS:
        raise ValueError(
            f"{path}: _class_name must be {CLASS!r}, got {data.get('_class_name')!r:.60}; give the "
            "folder of a ControlNet"
        )
    config = reading(path, lambda: diffusers_config(data))
    check_fits(config, model, unet, folder)
    weights = find_weights(folder, variant)
    current = {diffusers.current_name(key): key for key in weights.places}
    return plan_model(config, diffusers_names, weights.renamed(current))


def diffusers_config(data: Mapping[str, Any]) -> ControlNetConfig:
    """Our config for the config.json of a ControlNetModel.

    Raises:
        ValueError: an option that our ControlNet does not have.
    """
    order, pool = (data.get(name) for name in _TRAINING)
    if order not in (None, "rgb") or pool:
        raise ValueError(
            f"{CLASS}: expected pictures as RGB without global pooling, got {order!r} and "
            f"global_pool_conditions={pool!r}; fastdiff has no such ControlNet"
        )
    own = ("conditioning_channels", "conditioning_embedding_out_channels", *_TRAINING)
    down = list(data.get("down_block_types") or [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"])
    unet = {
        **{name: value for name, value in data.items() if name not in own},
        "_class_name": UNET,
        "out_channels": data.get("in_channels"),
        "down_block_types": down,
        "up_block_types": [_UP.get(name, name) for name in reversed(down)],
    }
    try:
        encoder = diffusers.unet_config(unet)
    except ValueError as error:
        raise ValueError(str(error).replace(UNET, CLASS)) from None
    return ControlNetConfig(
        encoder=encoder,
        image_channels=data.get("conditioning_channels", 3),
        hint_channels=tuple(data.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)),
    )


def _plan_original(weights: Weights, model: Model, unet: UNetConfig) -> Plan:
    """The config is that of the model's U-Net, as far as the shapes in the file agree."""
    shapes = weights.shapes
    keys = [key for key in shapes if key.endswith("attn2.to_k.weight")]
    convs = sorted(
        (int(match[1]), openai.shape_of(shapes, key, 4))
        for key in shapes
        if (match := re.fullmatch(r"input_hint_block\.(\d+)\.weight", key)) is not None
    )
    width, in_channels = openai.shape_of(shapes, "input_blocks.0.0.weight", 4)[:2]
    encoder = replace(
        unet,
        in_channels=in_channels,
        out_channels=in_channels,
        learned_sigma=False,
        context_dim=shapes[keys[0]][1] if keys else unet.context_dim,
        added_condition_dim=_added(shapes),
        model_channels=width if unet.time_channels is None else unet.model_channels,
    )
    # every second convolution halves the sides and widens
    config = ControlNetConfig(
        encoder=encoder,
        image_channels=convs[0][1][1],
        hint_channels=tuple(shape[0] for _, shape in convs[:-1][::2]),
    )
    check_fits(config, model, unet, weights.path)
    return plan_model(config, original_names, weights)


def _added(shapes: Shapes) -> int | None:
    shape = shapes.get("label_emb.0.0.weight")
    return None if shape is None else shape[1]


def check_fits(config: ControlNetConfig, model: Model, unet: UNetConfig, path: Path) -> None:
    """Raise ValueError unless a ControlNet can be added to a model with this U-Net."""
    own, first = config.encoder, model.autoencoder
    latents = unet.out_channels // (1 + unet.learned_sigma)
    wrong = [
        f"{what} {theirs}, the model's {ours}"
        for what, theirs, ours in (
            ("width of the text's tokens", own.context_dim, unet.context_dim),
            ("added condition (XL)", own.added_condition_dim, unet.added_condition_dim),
            ("channels of the latents", own.in_channels, latents),
            ("width of the first level", own.model_channels, unet.model_channels),
            ("factors of the levels", own.channel_mult, unet.channel_mult),
            ("residual blocks per level", own.num_res_blocks, unet.num_res_blocks),
            (
                "ratio of picture and latents",
                config.factor,
                config.factor if first is None else first.downsample_factor,
            ),
        )
        if theirs != ours
    ]
    if wrong:
        raise ValueError(
            f"the ControlNet of {path} does not fit {model.path}: {'; '.join(wrong)}; use one that "
            "was trained for this kind of model (Stable Diffusion 1, 2 or XL)"
        )


def diffusers_names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers' parameters) of a ControlNet."""
    assert isinstance(model, ControlNet)
    places = list(diffusers.encoder_places(model, model.config.encoder))
    embedding = "controlnet_cond_embedding"
    places += _outer_places(
        model,
        [f"{embedding}.conv_in", *_numbered(f"{embedding}.blocks", model.hint.blocks)],
        f"{embedding}.conv_out",
        _numbered("controlnet_down_blocks", model.zero_convs),
        "controlnet_mid_block",
    )
    return source_names(places, diffusers.LAYERS)


def original_names(model: nn.Module) -> Sources:
    """(our parameter -> the original's parameters) of a ControlNet."""
    assert isinstance(model, ControlNet)
    places: list[Place] = list(openai.embedding_places(model, model.config.encoder))
    places += openai.stage_places(model, ("input_blocks", "middle_block"))
    convs = [f"input_hint_block.{2 * index}" for index in range(len(model.hint.blocks) + 1)]
    places += _outer_places(
        model,
        convs,
        f"input_hint_block.{2 * len(convs)}",
        [f"{name}.0" for name in _numbered("zero_convs", model.zero_convs)],
        "middle_block_out.0",
    )
    return source_names(places, openai.LAYERS)


def _numbered(name: str, modules: nn.ModuleList) -> list[str]:
    return [f"{name}.{index}" for index in range(len(modules))]


def _outer_places(
    model: ControlNet, hint: Sequence[str], hint_out: str, zero_convs: Sequence[str], middle: str
) -> Iterator[Place]:
    """What a ControlNet has besides the encoder, by their names of it."""
    yield "hint.conv_in", model.hint.conv_in, hint[0]
    for index, (block, name) in enumerate(zip(model.hint.blocks, hint[1:], strict=True)):
        yield f"hint.blocks.{index}", block, name
    yield "hint.conv_out", model.hint.conv_out, hint_out
    for index, (conv, name) in enumerate(zip(model.zero_convs, zero_convs, strict=True)):
        yield f"zero_convs.{index}", conv, name
    yield "middle_out", model.middle_out, middle
