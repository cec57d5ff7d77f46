"""The layout of DDPM's ports from TensorFlow to PyTorch, and of all CompVis autoencoders.

Ho et al. 2020 (arXiv 2006.11239), Esser et al. 2021 (2012.09841): `down.L.block.J`, `mid.block_1`,
`up.L.block.J`, where L counts from the finest level in both directions; q, k and v are three 1x1
convolutions. The trainer of DDIM's authors (Song et al. 2021, 2010.02502) saves a list: weights
under `module.`, the optimizer's state, epoch, step, and averaged weights if it made any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastdiff.checkpoint.build import Layers, Place, source_names
from fastdiff.checkpoint.layouts.diffusers.read import autoencoder_places, unet_places
from fastdiff.checkpoint.layouts.openai import Published, pixel_model, shape_of
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Shapes, Sources, Weights, some
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.layers import AttentionBlock, ResBlock
from fastdiff.models.unet import UNet, UNetConfig

SCHEDULE = ScheduleConfig()  # linear, 1e-4 to 0.02, 1000 steps: Ho et al. 2020, section 4
# of the published models; (1, 2, 2, 2, 4) is DDIM's CelebA
IMAGE_SIZES = {(1, 2, 2, 2): 32, (1, 2, 2, 2, 4): 64, (1, 1, 2, 2, 4, 4): 256}
MARKS = ("temb.dense.0.weight", "down.0.block.0.norm1.weight")
LIST = ("0.module.", "0.")  # a list's weights, of torch's DataParallel or without it
LIST_EPOCH, LIST_STEP, LIST_AVERAGED = "2", "3", "4."
LAYERS: Layers = {
    ResBlock: {"emb": ("temb_proj",), "skip": ("nin_shortcut",)},
    AttentionBlock: {"qkv": ("q", "k", "v"), "proj": ("proj_out",)},
}
# diffusers' name -> the port's name, from which diffusers' was derived
_NAMES = (
    ("time_embedding.linear_1", "temb.dense.0"),
    ("time_embedding.linear_2", "temb.dense.1"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"),
    ("samplers.0", "sample"),
    ("resnets", "block"),
    ("attentions", "attn"),
    ("down_blocks", "down"),
)


def names(model: nn.Module) -> Sources:
    """(our parameter -> the port's parameters) of a U-Net or an autoencoder."""
    if isinstance(model, UNet):
        places, last = unet_places(model), len(model.config.channel_mult) - 1
    else:
        assert isinstance(model, Autoencoder)
        places, last = autoencoder_places(model), len(model.config.channel_mult) - 1
    return source_names(_renamed(places, last), LAYERS)


def _renamed(places: Iterable[Place], last: int) -> Iterator[Place]:
    for ours, module, theirs in places:
        yield ours, module, _port_name(theirs, last)


def _port_name(name: str, last: int) -> str:
    for diffusers, port in _NAMES:
        name = name.replace(diffusers, port)
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)


def unet_config(shapes: Shapes, options: LoadOptions) -> UNetConfig:
    """Infer our config for a port of DDPM: one head, norms of epsilon 1e-6, asymmetric padding.

    Raises:
        ValueError: the names do not describe such a U-Net.
    """
    width, mult, blocks, attention = _levels(shapes, "")
    return UNetConfig(
        in_channels=shape_of(shapes, "conv_in.weight", 4)[1],
        out_channels=shape_of(shapes, "conv_out.weight", 4)[0],
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=blocks,
        attention_depth=tuple(int(on) for on in attention),
        head_dim=options.head_dim,
        downsample_padding="asymmetric",
        time_embedding="ddpm-original",
        norm_eps=1e-6,
        norm_groups=options.norm_groups,
        timestep_scale=options.timestep_scale or 1.0,
        num_heads=options.num_heads or (None if options.head_dim else 1),
        conv_resample=len(mult) == 1 or "down.0.downsample.conv.weight" in shapes,
    )


def autoencoder_config(shapes: Shapes, options: LoadOptions) -> AutoencoderConfig:
    """Infer our config for a first stage of CompVis: VQ if there is a codebook, else KL.

    Raises:
        ValueError: the names do not describe such an autoencoder.
    """
    width, mult, blocks, attention = _levels(shapes, "encoder.")
    codes = shapes.get("quantize.embedding.weight")
    return AutoencoderConfig(
        regularization="kl" if codes is None else "vq",
        image_channels=shape_of(shapes, "encoder.conv_in.weight", 4)[1],
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=blocks,
        latent_channels=shape_of(shapes, "post_quant_conv.weight", 4)[1],
        attention=attention if any(attention) else (),
        codebook_size=codes[0] if codes else 0,
        norm_groups=options.norm_groups,
        middle_attention="encoder.mid.attn_1.norm.weight" in shapes,
    )


def _levels(shapes: Shapes, prefix: str) -> tuple[int, tuple[int, ...], int, tuple[bool, ...]]:
    """Width of the first level, factor of each level, residual blocks, attention of each level."""
    down = re.compile(rf"{re.escape(prefix)}down\.(\d+)\.(block|attn)\.(\d+)\.")
    found = {(m[1], m[2], m[3]) for key in shapes if (m := down.match(key))}
    levels = len({level for level, _, _ in found})
    blocks = len({number for level, kind, number in found if (level, kind) == ("0", "block")})
    width = shape_of(shapes, f"{prefix}conv_in.weight", 4)[0]
    widths = [
        shape_of(shapes, f"{prefix}down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(levels)
    ]
    if not widths or any(other % width for other in widths):
        raise ValueError(
            f"the channels of every level must be a multiple of {width}, got {widths}; "
            "fastdiff does not support this model"
        )
    attention = tuple((str(level), "attn", "0") in found for level in range(levels))
    return width, tuple(other // width for other in widths), blocks, attention


def _from_list(weights: Weights, loading: Loading) -> tuple[Weights, dict[str, Any]]:
    """The weights of a list, averaged if it has those and they are wanted, and what it tells.

    Raises:
        ValueError: some weights have no average.
    """
    prefix = next((p for p in LIST if f"{p}{MARKS[0]}" in weights.places), None)
    if prefix is None:
        return weights, {}
    facts, raw = weights.facts, weights.under(prefix)
    told = {"epoch": facts.get(LIST_EPOCH), "step": facts.get(LIST_STEP)}
    averaged = weights.under(LIST_AVERAGED)
    use = bool(averaged.places) and loading.options.ema
    if use and (missing := sorted(raw.places.keys() - averaged.places.keys())):
        raise ValueError(
            f"{weights.path}: averaged weights are missing: {some(missing, 50)}; set ema=False to "
            "use the others"
        )
    return averaged if use else raw, {**told, "averaged weights": use}


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    weights, told = _from_list(source, loading)
    config = unet_config(weights.shapes, loading.options)
    known = Published({}, SCHEDULE, IMAGE_SIZES.get(config.channel_mult))
    model = pixel_model(weights, loading, config, known, names=names, layout="ddpm")
    model.provenance.update(told)
    return model


LAYOUT = Layout(
    name="ddpm",
    files=(MARKS, *(tuple(prefix + mark for mark in MARKS) for prefix in LIST)),
    open=_open,
)
