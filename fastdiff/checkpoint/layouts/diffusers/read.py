"""Read diffusers' configs and state dicts as ours.

Understood: `UNet2DConditionModel`, `UNet2DModel`, `AutoencoderKL`, `VQModel`;
`DiTTransformer2DModel` has a file of its own, `dit.py`. Everything else, and
every option that our models do not have, is an error that names it. Nothing here imports diffusers:
a config is what its `config.json` holds, weights are a dictionary of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.build import Layers, Place, check_names, source_names
from fastdiff.checkpoint.layouts.diffusers.options import Options
from fastdiff.checkpoint.weights import Sources
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig, Chain
from fastdiff.models.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
)
from fastdiff.models.unet import UNet, UNetConfig

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def unet_config(data: Mapping[str, Any]) -> UNetConfig:
    """Our config for the `config.json` of a UNet2DConditionModel or UNet2DModel.

    Raises:
        ValueError: another class, or an option that our U-Net does not have.
    """
    options = Options(data)
    if options.class_name == "UNet2DConditionModel":
        specific = _condition_options(options)
    elif options.class_name == "UNet2DModel":
        specific = _unconditional_options(options)
    else:
        raise ValueError(
            "_class_name must be 'UNet2DConditionModel' or 'UNet2DModel', "
            f"got {options.class_name!r}; give the config.json of a U-Net"
        )
    widths = options.require("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise options.fail("block_out_channels", "multiples of the first")
    config = UNetConfig(
        in_channels=options.require("in_channels"),
        out_channels=options.require("out_channels"),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=_constant(options, "layers_per_block"),
        time_embedding=_time_embedding(options),
        num_classes=options.get("num_class_embeds"),
        scale_shift_norm=_one_of(
            options, "resnet_time_scale_shift", {"default": False, "scale_shift": True}, "default"
        ),
        downsample_padding=_one_of(
            options, "downsample_padding", {1: "symmetric", 0: "asymmetric"}, 1
        ),
        norm_groups=options.get("norm_num_groups", 32),
        norm_eps=options.get("norm_eps", 1e-5),
        dropout=options.get("dropout", 0.0),
        **specific,
    )
    options.finish()
    return config


def autoencoder_config(data: Mapping[str, Any]) -> AutoencoderConfig:
    """Our config for the `config.json` of an AutoencoderKL or VQModel.

    Raises:
        ValueError: another class, or an option that our autoencoder does not have.
    """
    options = Options(data)
    if options.class_name not in ("AutoencoderKL", "VQModel"):
        raise ValueError(
            f"_class_name must be 'AutoencoderKL' or 'VQModel', got {options.class_name!r}; "
            "give the config.json of an autoencoder"
        )
    vq = options.class_name == "VQModel"
    widths = options.require("block_out_channels")
    latent_channels = options.require("latent_channels")
    if any(width % widths[0] for width in widths):
        raise options.fail("block_out_channels", "multiples of the first")
    if options.require("out_channels") != options.require("in_channels"):
        raise options.fail("out_channels", f"{options.get('in_channels')}, as in_channels")
    if vq and options.get("vq_embed_dim", latent_channels) != latent_channels:
        raise options.fail("vq_embed_dim", f"{latent_channels}, as latent_channels")
    config = AutoencoderConfig(
        regularization="vq" if vq else "kl",
        image_channels=options.require("in_channels"),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=options.require("layers_per_block"),
        latent_channels=latent_channels,
        attention=_levels(
            options,
            {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True},
            {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True},
        ),
        codebook_size=options.get("num_vq_embeddings", 256) if vq else 0,
        norm_groups=options.get("norm_num_groups", 32),
        middle_attention=_one_of(
            options, "mid_block_add_attention", {True: True, False: False}, True
        ),
    )
    options.finish()
    return config


def _condition_options(options: Options) -> dict[str, Any]:
    """Options of UNet2DConditionModel only: transformers, their depth, SDXL's added condition."""
    if any("SimpleCrossAttn" in name for name in options.require("down_block_types")):
        return _appended_options(options)
    options.get("use_linear_projection")  # one linear layer of ours implements both
    levels = len(options.require("block_out_channels"))
    attention = _levels(
        options,
        {"DownBlock2D": False, "CrossAttnDownBlock2D": True},
        {"UpBlock2D": False, "CrossAttnUpBlock2D": True},
    )
    depths = _per_level(options.get("transformer_layers_per_block", 1), levels)
    crossed = options.get("only_cross_attention", False)
    if crossed is True:
        raise options.fail(
            "only_cross_attention", "given per level, as the middle block has self-attention"
        )
    if options.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        raise options.fail("mid_block_type", "'UNetMidBlock2DCrossAttn'")
    kind = options.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise options.fail("addition_embed_type", "None or 'text_time'")
    embedded = options.get("class_embed_type")
    if embedded not in (None, "projection") or (embedded and kind):
        raise options.fail("class_embed_type", "None or, without addition_embed_type, 'projection'")
    options.get("addition_time_embed_dim")  # the caller embeds sizes and crops
    added = options.get("projection_class_embeddings_input_dim")
    return {
        "attention_depth": tuple(
            depth if on else 0 for depth, on in zip(depths, attention, strict=True)
        ),
        "middle_depth": depths[-1],
        "context_dim": _constant(options, "cross_attention_dim", 1280),
        "added_condition_dim": added if kind or embedded else None,
        "self_attention": tuple(not each for each in crossed) if crossed else (),
        **_heads(options, attention),
    }


def _appended_options(options: Options) -> dict[str, Any]:
    """Options of UNet2DConditionModel with the blocks of unCLIP's decoder: self-attention to which
    keys and values of the context are appended, and residual blocks between the levels."""
    attention = _levels(
        options,
        {"ResnetDownsampleBlock2D": 0, "SimpleCrossAttnDownBlock2D": 1},
        {"ResnetUpsampleBlock2D": 0, "SimpleCrossAttnUpBlock2D": 1},
    )
    middle = "UNetMidBlock2DSimpleCrossAttn"
    if options.get("mid_block_type", "UNetMidBlock2DCrossAttn") != middle:
        raise options.fail("mid_block_type", repr(middle))
    kind = options.get("class_embed_type")
    if kind not in (None, "identity"):
        raise options.fail("class_embed_type", "None or 'identity'")
    width = options.require("block_out_channels")[0]
    for unused in ("transformer_layers_per_block", "addition_time_embed_dim"):
        options.get(unused)  # of blocks that are not here
    return {
        "attention_depth": attention,
        "middle_depth": 1,
        "context_dim": _constant(options, "cross_attention_dim", 1280),
        "context_attention": "appended",
        "added_condition_dim": None if kind is None else 4 * width,
        "added_layers": 0,
        "resblock_updown": True,
        "learned_sigma": options.require("out_channels") == 2 * options.require("in_channels"),
        "head_dim": _constant(options, "attention_head_dim", 8),
    }


def _heads(options: Options, attention: tuple[bool, ...]) -> dict[str, int]:
    """`attention_head_dim` of UNet2DConditionModel is the number of heads, one or one per level."""
    widths = options.require("block_out_channels")
    heads = _per_level(options.get("attention_head_dim", 8), len(widths))
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    used = [*attention[:-1], True]  # the middle block has the last level's heads
    dims = {width / count for width, count, on in zip(widths, heads, used, strict=True) if on}
    if len(dims) != 1:
        raise options.fail("attention_head_dim", "one number of heads, or one width of head")
    return {"head_dim": int(dims.pop())}


def _unconditional_options(options: Options) -> dict[str, Any]:
    """Options of UNet2DModel only: self-attention, residual blocks that change the resolution."""
    attention = _levels(
        options,
        {"DownBlock2D": 0, "ResnetDownsampleBlock2D": 0, "AttnDownBlock2D": 1},
        {"UpBlock2D": 0, "ResnetUpsampleBlock2D": 0, "AttnUpBlock2D": 1},
    )
    blocks = (
        (options.require("down_block_types")[:-1], options.get("downsample_type", "conv")),
        (options.require("up_block_types")[:-1], options.get("upsample_type", "conv")),
    )
    updown = {
        name.startswith("Resnet") or (name.startswith("Attn") and attention_type == "resnet")
        for names, attention_type in blocks
        for name in names
    }
    if len(updown) > 1:
        raise options.fail("down_block_types", "all with or all without residual resampling")
    groups, middle = options.get("norm_num_groups", 32), options.get("add_attention", True)
    scale_shift = options.get("resnet_time_scale_shift", "default") == "scale_shift"
    attn_groups = options.get("attn_norm_num_groups", None if scale_shift else groups)
    if (middle or any(attention)) and attn_groups != groups:
        raise options.fail("attn_norm_num_groups", f"{groups}, as norm_num_groups")
    if options.get("mid_block_type", "UNetMidBlock2D") != "UNetMidBlock2D":
        raise options.fail("mid_block_type", "'UNetMidBlock2D'")
    # None means one head of the level's width
    one_head = "attention_head_dim" in options.data and options.data["attention_head_dim"] is None
    head_dim = options.get("attention_head_dim", 8)
    return {
        "attention_depth": attention,
        "middle_depth": int(middle),
        "resblock_updown": updown == {True},
        **({"num_heads": 1} if one_head else {"head_dim": head_dim}),
    }


def _levels(options: Options, down: dict[str, Any], up: dict[str, Any]) -> tuple[Any, ...]:
    """The meaning of each level's block type; the way up must mirror the way down."""
    for name, known in (("down_block_types", down), ("up_block_types", up)):
        if not set(options.get(name, ())) <= set(known):
            raise options.fail(name, f"of {', '.join(known)}")
    levels = tuple(down[name] for name in options.require("down_block_types"))
    mirrored = tuple(up[name] for name in reversed(options.require("up_block_types")))
    if levels != mirrored:
        raise options.fail("up_block_types", "the mirror image of down_block_types")
    return levels


def _per_level(value: Any, levels: int) -> list[Any]:
    return [value] * levels if isinstance(value, int) else list(value)


def _constant(options: Options, name: str, default: Any = None) -> Any:
    """An option that may be given per level, in which case all levels must have the same value."""
    value = options.require(name) if default is None else options.get(name, default)
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise options.fail(name, "the same at every level")
    return values.pop()


def _one_of(options: Options, name: str, meaning: dict[Any, Any], default: Any) -> Any:
    value = options.get(name, default)
    if value not in meaning:
        raise options.fail(name, " or ".join(map(repr, meaning)))
    return meaning[value]


def _time_embedding(options: Options) -> TimeEmbedding:
    kind = (options.get("flip_sin_to_cos", True), options.get("freq_shift", 0))
    if kind == (True, 0):
        return "openai"
    if kind == (False, 1):
        return "ddpm"
    raise options.fail("freq_shift", "0 with flip_sin_to_cos, 1 without")


# Our layer inside a block -> diffusers'; several are concatenated along the rows.
LAYERS: Layers = {
    ResBlock: {"emb": ("time_emb_proj",), "skip": ("conv_shortcut",)},
    AttentionBlock: {
        "norm": ("group_norm",),
        "qkv": ("to_q", "to_k", "to_v"),
        "context_kv": ("add_k_proj", "add_v_proj"),
        "proj": ("to_out.0",),
    },
    SpatialTransformer: {
        "attn1.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn1.q": ("attn1.to_q",),  # without self-attention
        "attn1.kv": ("attn1.to_k", "attn1.to_v"),
        "attn1.out": ("attn1.to_out.0",),
        "attn2.q": ("attn2.to_q",),
        "attn2.kv": ("attn2.to_k", "attn2.to_v"),
        "attn2.out": ("attn2.to_out.0",),
        "ff.proj": ("ff.net.0.proj",),
        "ff.out": ("ff.net.2",),
    },
}
# Names of attention layers in diffusers before 0.15, which Stable Diffusion 1's files still use.
OLD_ATTENTION_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def convert_state_dict(state: Mapping[str, Tensor], model: UNet | Autoencoder) -> dict[str, Tensor]:
    """diffusers' weights under our names, shaped for `model.load_state_dict`.

    Args:
        state: the state dict of the diffusers model whose config `model` was built from.
        model: may be on the meta device; only its names and shapes are read.

    Raises:
        ValueError: as `check_names`.
    """
    state = {current_name(key): value for key, value in state.items()}
    ours, sources = model.state_dict(), names(model)
    check_names(model, sources, {key: tuple(value.shape) for key, value in state.items()})
    return {
        name: torch.cat([state[key] for key in keys]).view(ours[name].shape)
        for name, keys in sources.items()
    }


def current_name(key: str) -> str:
    """The name of a tensor in `names`, given its current or old name in diffusers."""
    for old, new in OLD_ATTENTION_NAMES.items():
        key = key.replace(old, new)
    # "projection" of Stable Diffusion unCLIP computes what SDXL's added condition does
    return key.replace("class_embedding.linear_", "add_embedding.linear_")


def names(model: nn.Module) -> Sources:
    """The map (our parameter -> diffusers' parameters) of a whole model."""
    assert isinstance(model, UNet | Autoencoder)
    places = unet_places(model) if isinstance(model, UNet) else autoencoder_places(model)
    return source_names(places, LAYERS)


def encoder_places(model: Any, config: UNetConfig) -> Iterator[Place]:
    """The places of embedding, way down and middle, which a U-Net and a ControlNet have."""
    last = len(config.channel_mult) - 1
    yield "time_embed.0", model.time_embed[0], "time_embedding.linear_1"
    yield "time_embed.2", model.time_embed[2], "time_embedding.linear_2"
    if config.num_classes is not None:
        yield "label_embed", model.label_embed, "class_embedding"
    if config.added_condition_dim is not None and config.added_layers:
        yield "added_embed.0", model.added_embed[0], "add_embedding.linear_1"
        yield "added_embed.2", model.added_embed[2], "add_embedding.linear_2"

    stages = enumerate(model.input_blocks)
    index, stage = next(stages)
    yield f"input_blocks.{index}.0", next(stage.children()), "conv_in"
    for level in range(last + 1):
        for j in range(config.num_res_blocks):
            index, stage = next(stages)
            yield from _stage_places(f"input_blocks.{index}", stage, f"down_blocks.{level}", j)
        if level < last:
            index, stage = next(stages)
            theirs = f"down_blocks.{level}.downsamplers.0"
            yield f"input_blocks.{index}.0", next(stage.children()), theirs

    first, *attention, second = model.middle_block
    yield "middle_block.0", first, "mid_block.resnets.0"
    for block in attention:
        yield "middle_block.1", block, "mid_block.attentions.0"
    yield f"middle_block.{len(model.middle_block) - 1}", second, "mid_block.resnets.1"


def unet_places(unet: UNet) -> Iterator[Place]:
    yield from encoder_places(unet, unet.config)
    for index, stage in enumerate(unet.output_blocks):
        level, j = divmod(index, unet.config.num_res_blocks + 1)
        yield from _stage_places(f"output_blocks.{index}", stage, f"up_blocks.{level}", j)
    yield "norm_out", unet.norm_out, "conv_norm_out"
    yield "conv_out", unet.conv_out, "conv_out"


def _stage_places(ours: str, stage: nn.Module, theirs: str, index: int) -> Iterator[Place]:
    """A residual block, with attention and upsampling where the stage has them."""
    for position, (_, block) in enumerate(stage.named_children()):
        if isinstance(block, AttentionBlock | SpatialTransformer):
            name = f"attentions.{index}"
        elif position == 0:
            name = f"resnets.{index}"
        else:
            name = "upsamplers.0"
        yield f"{ours}.{position}", block, f"{theirs}.{name}"


def autoencoder_places(model: Autoencoder) -> Iterator[Place]:
    for name, chain, blocks, sampler in (
        ("encoder", model.encoder, "down_blocks", "downsamplers"),
        ("decoder", model.decoder, "up_blocks", "upsamplers"),
    ):
        assert isinstance(chain, Chain)
        yield f"{name}.conv_in", chain.conv_in, f"{name}.conv_in"
        yield from _chain_places(name, chain, blocks, sampler, model.config.middle_attention)
        yield f"{name}.norm_out", chain.norm_out, f"{name}.conv_norm_out"
        yield f"{name}.conv_out", chain.conv_out, f"{name}.conv_out"
    yield "quant_conv", model.quant_conv, "quant_conv"
    yield "post_quant_conv", model.post_quant_conv, "post_quant_conv"
    if model.config.regularization == "vq":
        yield "codebook", model.codebook, "quantize.embedding"


def _chain_places(
    name: str, chain: Chain, levels: str, sampler: str, attention: bool
) -> Iterator[Place]:
    """Places of the blocks; the middle ones are last in the encoder, first in the decoder."""
    count = 2 + attention
    middle = len(chain.blocks) - count if name == "encoder" else 0
    level = resnets = attentions = 0
    for index, block in enumerate(chain.blocks):
        ours = f"{name}.blocks.{index}"
        if middle <= index < middle + count:
            kind = "attentions" if isinstance(block, AttentionBlock) else "resnets"
            number = int(index == middle + count - 1)
            yield ours, block, f"{name}.mid_block.{kind}.{number}"
        elif isinstance(block, ResBlock):
            yield ours, block, f"{name}.{levels}.{level}.resnets.{resnets}"
            resnets += 1
        elif isinstance(block, AttentionBlock):
            yield ours, block, f"{name}.{levels}.{level}.attentions.{attentions}"
            attentions += 1
        else:
            assert isinstance(block, Downsample | Upsample)
            yield ours, block, f"{name}.{levels}.{level}.{sampler}.0"
            level, resnets, attentions = level + 1, 0, 0
