"""The published files of U-ViT: a plain state dict of its network, by classes or by text.

Bao et al. 2023 (arXiv 2209.12152). Config and size are read off names and shapes; heads and noise,
which they do not tell, are those of the published models: on latents the betas of Stable Diffusion,
on pixels linear ones, of which the continuous noise of the paper is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from fastdiff.checkpoint.build import Layers, Place, plan_model, source_names
from fastdiff.checkpoint.layouts.dit import (
    LATENT_CHANNELS,
    count_blocks,
    heads,
    label_rows,
    latents,
)
from fastdiff.checkpoint.layouts.openai import shape_of
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.weights import Shapes, Sources, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.uvit import UViT, UViTBlock, UViTConfig

NAME = "uvit"
HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
"""Width of a token -> heads, of the published sizes S, M, L and H."""
LATENT_SCHEDULE = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
PIXEL_SCHEDULE = ScheduleConfig()
CLIP_TOKENS = 77
"""Tokens of a prompt in the published text-to-image models."""
TIMESTEP_OFFSET = 1.0
"""The published code counts timesteps from 1."""
LAYERS: Layers = {UViTBlock: {"attn.out": ("attn.proj",)}}


def names(model: nn.Module) -> Sources:
    """(our parameter -> the published one)."""
    assert isinstance(model, UViT)
    return {**source_names(_places(model), LAYERS), "pos_embed": ("pos_embed",)}


def _places(model: UViT) -> Iterator[Place]:
    config = model.config
    yield "patch_embed", model.patch_embed, "patch_embed.proj"
    if config.time_mlp:
        yield "time_embed.0", model.time_embed[0], "time_embed.0"
        yield "time_embed.2", model.time_embed[2], "time_embed.2"
    if config.num_classes is not None:
        yield "label_embed", model.label_embed, "label_emb"
    if config.context_dim is not None:
        yield "context_embed", model.context_embed, "context_embed"
    for part in ("in_blocks", "out_blocks"):
        for index, block in enumerate(getattr(model, part)):
            yield f"{part}.{index}", block, f"{part}.{index}"
    yield "middle_block", model.middle_block, "mid_block"
    yield "norm_out", model.norm_out, "norm"
    yield "linear_out", model.linear_out, "decoder_pred"
    yield "conv_out", model.conv_out, "final_layer"


def config(shapes: Shapes, loading: Loading) -> UViTConfig:
    """Our config for the names and shapes of a U-ViT.

    Raises:
        ValueError: they do not make a U-ViT.
    """
    width, in_channels, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 4)
    out = shape_of(shapes, "decoder_pred.weight", 2)[0]
    positions = shape_of(shapes, "pos_embed", 3)[1]
    labels, context = "label_emb.weight" in shapes, "context_embed.weight" in shapes
    tokens = CLIP_TOKENS if context else 0
    patches = positions - 1 - labels - tokens
    grid = math.isqrt(max(patches, 0))
    if out != patch * patch * in_channels or grid == 0 or grid * grid != patches:
        raise ValueError(
            f"expected a U-ViT, got {positions} positions, and {out} numbers out for a patch of "
            f"{patch} x {patch} x {in_channels}; fastdiff has no such model"
        )
    # published with classes for guidance: one row more than the 1000 of ImageNet
    guided = labels and shape_of(shapes, "label_emb.weight", 2)[0] != 1000
    classes, null = label_rows(shapes, "label_emb.weight", loading, null=guided)
    return UViTConfig(
        in_channels=in_channels,
        out_channels=in_channels,
        width=width,
        depth=2 * count_blocks(shapes, "in_blocks."),
        num_heads=heads(width, HEADS, loading),
        patch_size=patch,
        sample_size=grid * patch,
        mlp_ratio=shape_of(shapes, "mid_block.mlp.fc1.weight", 2)[0] / width,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
        time_mlp="time_embed.0.weight" in shapes,
        timestep_offset=TIMESTEP_OFFSET,
        num_classes=classes,
        null_class=null,
        context_dim=shape_of(shapes, "context_embed.weight", 2)[1] if context else None,
        context_tokens=tokens or None,
        conv_out="final_layer.weight" in shapes,
    )


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    made = config(source.shapes, loading)
    on_latents = made.in_channels == LATENT_CHANNELS
    known = latents(made, loading, LATENT_SCHEDULE if on_latents else PIXEL_SCHEDULE)
    denoiser: UViT = loading.fill(plan_model(made, names, source))
    known["provenance"] |= {"facts": source.facts, **loading.assumed.provenance}
    return Model(
        layout=NAME,
        denoiser=denoiser,
        image_channels=image_channels(denoiser, None),
        path=source.path,
        **known,
    )


LAYOUT = Layout(
    name=NAME,
    files=(("patch_embed.proj.weight", "mid_block.attn.qkv.weight", "decoder_pred.weight"),),
    open=_open,
)
