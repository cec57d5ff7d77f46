"""OpenAI's U-Net layout: improved-diffusion, guided-diffusion, and the U-Nets of CompVis' files.

Nichol & Dhariwal 2021 (arXiv 2102.09672), Dhariwal & Nichol 2021 (2105.05233), Rombach et al. 2022
(2112.10752). Our U-Net has the same lists of blocks (`input_blocks.N.M`), so only the names inside
a block differ. The config is inferred from names and shapes; what they do not determine comes from
`LoadOptions` or from the table of published models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from fastdiff.checkpoint.build import Layers, Place, plan_model, source_names
from fastdiff.checkpoint.layouts.diffusers import read as diffusers
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Shapes, Sources, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
)
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.names import Prediction, QKVOrder, ScheduleKind


@dataclass(frozen=True)
class Published:
    """What the documentation of a published U-Net states in addition to its shapes."""

    heads: dict[str, int]  # num_heads or head_dim
    schedule: ScheduleConfig
    image_size: int | None
    qkv_order: QKVOrder = "legacy"
    timestep_scale: float = 1.0


NAME = "guided-diffusion"
LINEAR = ScheduleConfig(kind="linear", rescale_ends=True)
COSINE = ScheduleConfig(kind="cosine")
COSINE_4000 = ScheduleConfig(kind="cosine", num_timesteps=4000)
LINEAR_4000 = ScheduleConfig(kind="linear", num_timesteps=4000, rescale_ends=True)
Key = tuple[int, tuple[int, ...], int, int, bool]
# The flags in the READMEs of both repositories. The key is width, channel_mult, residual blocks,
# number of levels with attention, and whether residual blocks change the resolution (as they do in
# guided-diffusion).
PUBLISHED: dict[Key, Published] = {
    # guided-diffusion
    (192, (1, 2, 3, 4), 3, 3, True): Published({"head_dim": 64}, COSINE, 64, "new"),
    (256, (1, 1, 2, 3, 4), 2, 3, True): Published({"num_heads": 4}, LINEAR, 128),
    # 256x256_diffusion with and without classes, LSUN
    (256, (1, 1, 2, 2, 4, 4), 2, 3, True): Published({"head_dim": 64}, LINEAR, 256),
    # 512x512_diffusion, published as 256 x (0.5, 1, 1, 2, 2, 4, 4)
    (128, (1, 2, 2, 4, 4, 8, 8), 2, 3, True): Published({"head_dim": 64}, LINEAR, 512),
    # 64_256_upsampler, 128_512_upsampler
    (192, (1, 1, 2, 2, 4, 4), 2, 3, True): Published({"num_heads": 4}, LINEAR, 256),
    (192, (1, 1, 2, 2, 4, 4), 2, 2, True): Published({"head_dim": 64}, LINEAR, 512),
    # improved-diffusion: imagenet64_uncond, cifar10_uncond
    (128, (1, 2, 3, 4), 3, 2, False): Published(
        {"num_heads": 4}, COSINE_4000, 64, timestep_scale=1 / 4
    ),
    (128, (1, 2, 2, 2), 3, 2, False): Published(
        {"num_heads": 4}, COSINE_4000, 32, timestep_scale=1 / 4
    ),
    # imagenet64_cond, upsample_cond, lsun_uncond
    (192, (1, 2, 3, 4), 3, 2, False): Published({"num_heads": 4}, COSINE_4000, 64),
    (192, (1, 1, 2, 2, 4, 4), 2, 2, False): Published({"num_heads": 4}, LINEAR_4000, 256),
    (128, (1, 1, 2, 2, 4, 4), 2, 1, False): Published({"num_heads": 1}, LINEAR, 256),
}
OTHER = Published({"num_heads": 4}, LINEAR, None)  # the defaults of both repositories

LAYERS: Layers = {
    ResBlock: {
        "norm1": ("in_layers.0",),
        "conv1": ("in_layers.2",),
        "emb": ("emb_layers.1",),
        "norm2": ("out_layers.0",),
        "conv2": ("out_layers.3",),
        "skip": ("skip_connection",),
    },
    AttentionBlock: {"context_kv": ("encoder_kv",), "proj": ("proj_out",)},
    SpatialTransformer: diffusers.LAYERS[SpatialTransformer],  # diffusers kept CompVis's names
    Downsample: {"conv": ("op",)},
}


def names(model: nn.Module) -> Sources:
    """(our parameter -> OpenAI's parameters) of a U-Net."""
    assert isinstance(model, UNet)
    places = list(embedding_places(model, model.config))
    places += stage_places(model, ("input_blocks", "middle_block", "output_blocks"))
    places.append(("norm_out", model.norm_out, "out.0"))
    places.append(("conv_out", model.conv_out, "out.2"))
    return source_names(places, LAYERS)


def embedding_places(model: Any, config: UNetConfig) -> Iterator[Place]:
    """The embedding of timestep, class and added vector, which a U-Net and a ControlNet have."""
    yield "time_embed.0", model.time_embed[0], "time_embed.0"
    yield "time_embed.2", model.time_embed[2], "time_embed.2"
    if config.num_classes is not None:
        yield "label_embed", model.label_embed, "label_emb"
    if config.added_condition_dim is not None and config.added_layers == 1:
        yield "added_embed", model.added_embed, "transformer_proj"
    elif config.added_condition_dim is not None:
        yield "added_embed.0", model.added_embed[0], "label_emb.0.0"
        yield "added_embed.2", model.added_embed[2], "label_emb.0.2"


def stage_places(model: nn.Module, parts: Sequence[str]) -> Iterator[Place]:
    """The blocks inside lists of stages, which have the same numbers in the files."""
    for part in parts:
        for path, block in getattr(model, part).named_modules():
            depth = path.count(".") + bool(path)
            if depth == (1 if part == "middle_block" else 2):
                yield f"{part}.{path}", block, f"{part}.{path}"


def unet_config(shapes: Shapes, options: LoadOptions, **fixed: Any) -> UNetConfig:
    """Infer our config from the names and shapes of a U-Net in OpenAI's layout.

    fixed: fields of UNetConfig that override the inferred ones.

    Raises:
        ValueError: the names do not describe a U-Net that fastdiff supports.
    """
    levels, blocks, resampled = _levels(shapes)
    # the first level may be narrower than the sinusoids of the time embedding (ADM-512)
    embedding = shape_of(shapes, "time_embed.0.weight", 2)[1]
    width, in_channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[:2]
    out_channels = shape_of(shapes, "out.2.weight", 4)[0]
    first = [1 + level * (blocks + 1) for level in range(levels)]  # a level's first block
    conv1 = [shape_of(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 4) for i in first]
    if any(shape[0] % width for shape in conv1):
        raise ValueError(
            f"the channels of every level must be a multiple of {width}, got "
            f"{[shape[0] for shape in conv1]}; fastdiff does not support this model"
        )
    depths = [_depth(shapes, f"input_blocks.{i}.1.") for i in first]
    transformer = next((k for k in shapes if k.endswith("attn2.to_k.weight")), None)
    appended = next((k for k in shapes if k.endswith(".encoder_kv.weight")), None)
    context = transformer or appended
    joint = "transformer_proj.weight" in shapes
    emb = shape_of(shapes, f"input_blocks.{first[0]}.0.emb_layers.1.weight", 2)
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": width,
        "channel_mult": tuple(shape[0] // width for shape in conv1),
        "num_res_blocks": blocks,
        "attention_depth": tuple(depths),
        "middle_depth": _depth(shapes, "middle_block.1."),
        "context_dim": shapes[context][1] if context else None,
        "context_attention": "appended" if appended else "cross",
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "added_condition_dim": next(
            (
                shapes[key][1]
                for key in ("label_emb.0.0.weight", "transformer_proj.weight")
                if key in shapes
            ),
            None,
        ),
        "added_layers": 1 if joint else 2,
        "scale_shift_norm": emb[0] == 2 * conv1[0][0],
        "resblock_updown": any("in_layers" in key for key in resampled),
        "time_channels": None if embedding == width else embedding,
        "conv_resample": bool(resampled) or levels == 1,
        "norm_groups": options.norm_groups,
        "timestep_scale": options.timestep_scale or 1.0,
        **fixed,
    }
    for name in ("qkv_order", "num_heads_upsample"):
        if (said := getattr(options, name)) is not None:
            config[name] = said
    if options.num_heads is not None or options.head_dim is not None:
        config.update(num_heads=options.num_heads, head_dim=options.head_dim)
    return UNetConfig(**config)


def published(config: UNetConfig) -> Published:
    """The published model of this architecture, or the defaults of both repositories."""
    key = (
        config.model_channels,
        config.channel_mult,
        config.num_res_blocks,
        sum(depth > 0 for depth in config.attention_depth),
        config.resblock_updown,
    )
    return PUBLISHED.get(key, OTHER)


def pixel_unet_config(shapes: Shapes, options: LoadOptions) -> tuple[UNetConfig, Published]:
    """The config of a U-Net of improved-diffusion or guided-diffusion, and its documented settings.

    Twice as many output channels as an image has mean a learned variance (IDDPM section 3.1). Six
    input channels are those of an upsampler: x and the low-resolution image.
    """
    plain = replace(options, num_heads_upsample=None)
    config = unet_config(shapes, plain, num_heads=1, qkv_order="legacy")
    known = published(config)
    heads = {"num_heads": options.num_heads, "head_dim": options.head_dim}
    if options.num_heads is None and options.head_dim is None:
        heads = {"num_heads": None, "head_dim": None, **known.heads}
    learned = config.out_channels in (2 * config.in_channels, 6) and config.out_channels > 1
    return (
        unet_config(
            shapes,
            LoadOptions(norm_groups=options.norm_groups),
            **heads,
            num_heads_upsample=options.num_heads_upsample,
            qkv_order=options.qkv_order or known.qkv_order,
            learned_sigma=learned,
            timestep_scale=options.timestep_scale or known.timestep_scale,
        ),
        known,
    )


def head_choices(config: UNetConfig) -> str:
    """Describe the numbers and widths of heads that are possible for the widths of the levels."""
    depths = (*config.attention_depth, config.middle_depth)
    widths = [w for w, d in zip((*config.widths, config.widths[-1]), depths, strict=True) if d]
    counts, dims = (
        [str(n) for n in usual if all(width % n == 0 for width in widths)]
        for usual in ((1, 2, 4, 8, 16), (16, 32, 64))
    )
    return " or ".join([", ".join(counts), *(f"head_dim {dim}" for dim in dims)])


def _levels(shapes: Shapes) -> tuple[int, int, list[str]]:
    """Number of levels, residual blocks per level, and the weights that upsample.

    Without convolutions between the levels (conv_resample=False) nothing upsamples, and the input
    blocks that would downsample have no tensors: their numbers are missing.
    """
    outputs, inputs = (
        {key.split(".")[1] for key in shapes if key.startswith(f"{part}.")}
        for part in ("output_blocks", "input_blocks")
    )
    upsampler = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
    resampled = [key for key in shapes if upsampler.fullmatch(key)]
    absent = {str(number) for number in range(len(outputs))} - inputs
    levels = 1 + (len(resampled) or len(absent))
    blocks = len(outputs) // levels - 1
    between = {str(level * (blocks + 1)) for level in range(1, levels)} if absent else set()
    if (
        blocks < 1
        or len(outputs) % levels
        or len(inputs) + len(absent) != len(outputs)
        or absent != between
        or (absent and resampled)
    ):
        raise ValueError(
            f"expected a U-Net, got {len(inputs)} input blocks, {len(outputs)} output blocks and "
            f"{len(resampled)} upsamplers; fastdiff does not support this model"
        )
    return levels, blocks, resampled


def _depth(shapes: Shapes, prefix: str) -> int:
    """Attention depth: 0 for none, 1 for attention, k for a transformer of k blocks."""
    if f"{prefix}qkv.weight" in shapes:
        return 1
    return len(
        {
            key[len(prefix) :].split(".")[1]
            for key in shapes
            if key.startswith(f"{prefix}transformer_blocks.")
        }
    )


def shape_of(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != ndim or 0 in shape:
        raise ValueError(
            f"{key} must be a tensor of {ndim} dimensions, got "
            f"{'none' if shape is None else f'shape {shape}'}; fastdiff does not support this model"
        )
    return shape


def pixel_model(
    weights: Weights,
    loading: Loading,
    config: UNetConfig,
    known: Published,
    *,
    names: Callable[[nn.Module], Sources],
    layout: str,
) -> Model:
    """Load a U-Net on pixels, using its documentation for what the file does not state."""
    options, take = loading.options, loading.assumed.take

    def unless_published(words: str) -> str | None:
        return words if known is OTHER else None

    if options.num_heads is None and options.head_dim is None:
        heads = "num_heads" if config.num_heads is not None else "head_dim"
        take(heads, getattr(config, heads), unless_published(head_choices(config)))
    if known is OTHER and config.num_heads is not None and options.num_heads_upsample is None:
        take("num_heads_upsample", config.num_heads, "as num_heads, unless it was set in training")
    if not loading.says_noise:
        take("schedule", known.schedule, unless_published(", ".join(get_args(ScheduleKind))))
    if options.prediction is None:
        take("prediction", "eps", unless_published(", ".join(get_args(Prediction))))
    if options.image_size is None and known.image_size is not None:
        take("image_size", known.image_size)
    plan = plan_model(config, names, weights)
    denoiser: UNet = loading.fill(plan)
    provenance: dict[str, Any] = {"facts": weights.facts, **loading.assumed.provenance}
    if config.in_channels == 6:
        provenance["condition"] = "the low-resolution image, upsampled, in the last 3 channels of x"
    return Model(
        layout=layout,
        denoiser=denoiser,
        schedule=loading.noise(known.schedule),
        prediction=options.prediction or "eps",
        image_size=options.image_size or known.image_size,
        image_channels=image_channels(denoiser, None),
        path=weights.path,
        provenance=provenance,
    )


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    options, take = loading.options, loading.assumed.take
    config, known = pixel_unet_config(source.shapes, options)
    if options.qkv_order is None:
        take("qkv_order", config.qkv_order, "legacy, new" if known is OTHER else None)
    if options.timestep_scale is None and config.timestep_scale != 1:
        take("timestep_scale", config.timestep_scale)
    return pixel_model(source, loading, config, known, names=names, layout=NAME)


LAYOUT = Layout(
    name=NAME,
    files=(("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),),
    open=_open,
)
