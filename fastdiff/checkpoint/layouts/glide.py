"""OpenAI's files of GLIDE: the base model, the one for inpainting, and the upsampler.

Nichol et al. 2021 (arXiv 2112.10741). A file holds a U-Net in the layout of guided-diffusion whose
attentions have an `encoder_kv`, and next to it, without a prefix, the text transformer. The
vocabulary, 50,257 tokens of GPT-2, is no part of it: `tokenizer` names its folder.
"""

from __future__ import annotations

from torch import nn

from fastdiff.checkpoint import text_encoders
from fastdiff.checkpoint.build import Layers, Place, Plan, plan_model, source_names
from fastdiff.checkpoint.layouts import openai
from fastdiff.checkpoint.layouts.dit import count_blocks
from fastdiff.checkpoint.layouts.openai import shape_of
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.weights import Shapes, Sources, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.glide import GLIDEEncoder, GLIDEText, GLIDETextBlock, GLIDETextConfig
from fastdiff.models.unet import UNet, UNetConfig

NAME = "glide"
HEAD_DIM = 64
"""Width of every head, in the U-Nets and in the text transformer."""
BASE = ScheduleConfig(kind="cosine")
UPSAMPLER = ScheduleConfig(kind="linear", rescale_ends=True)
BASE_SIZE, UPSAMPLER_SIZE = 64, 256
BASE_GUIDANCE, UPSAMPLER_GUIDANCE = 3.0, 1.0
"""Guidance scales of the published samples: the upsampler is not guided."""
UPSAMPLED = "the small image, upsampled bilinearly, in the last channels of x"
MASKED = "the image where the mask is 1, and the mask, which is 1 where it is kept, after x"
TEXT = ("transformer.", "token_embedding.", "positional_embedding", "padding_embedding", "final_ln")
"""What the names of the text transformer begin with."""
LAYERS: Layers = {
    GLIDETextBlock: {
        "norm1": ("ln_1",),
        "attn.qkv": ("attn.c_qkv",),
        "attn.out": ("attn.c_proj",),
        "norm2": ("ln_2",),
        "mlp.fc1": ("mlp.c_fc",),
        "mlp.fc2": ("mlp.c_proj",),
    }
}


def text_names(model: nn.Module) -> Sources:
    """(our parameter -> OpenAI's) of the text transformer."""
    assert isinstance(model, GLIDEText)
    places: list[Place] = [
        ("token_embed", model.token_embed, "token_embedding"),
        ("norm_out", model.norm_out, "final_ln"),
    ]
    for index, block in enumerate(model.blocks):
        places.append((f"blocks.{index}", block, f"transformer.resblocks.{index}"))
    return {
        "pos_embed": ("positional_embedding",),
        "padding_embed": ("padding_embedding",),
        **source_names(places, LAYERS),
    }


def text_config(shapes: Shapes, loading: Loading) -> GLIDETextConfig:
    """Our config for the names and shapes of the text transformer.

    Raises:
        ValueError: they do not describe one.
    """
    vocabulary, width = shape_of(shapes, "token_embedding.weight", 2)
    head_dim = loading.options.head_dim or HEAD_DIM
    if width % head_dim:
        raise ValueError(
            f"the text transformer's width must be a multiple of its head_dim {head_dim}, got "
            f"{width}; set head_dim"
        )
    return GLIDETextConfig(
        vocabulary=vocabulary,
        tokens=shape_of(shapes, "positional_embedding", 2)[0],
        width=width,
        depth=count_blocks(shapes, "transformer.resblocks."),
        num_heads=width // head_dim,
    )


def unet_config(shapes: Shapes, loading: Loading) -> UNetConfig:
    """Our config for the names and shapes of the U-Net.

    Raises:
        ValueError: they do not describe one.
    """
    options = loading.options
    heads = {"num_heads": None, "head_dim": HEAD_DIM}
    if options.num_heads is not None or options.head_dim is not None:
        heads = {"num_heads": options.num_heads, "head_dim": options.head_dim}
    return openai.unet_config(shapes, options, **heads, qkv_order="legacy", learned_sigma=True)


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    options, take = loading.options, loading.assumed.take
    text = source.renamed({k: k for k in source.places if k.startswith(TEXT)})
    rest = source.renamed({k: k for k in source.places if not k.startswith(TEXT)})
    spoken, config = text_config(text.shapes, loading), unet_config(rest.shapes, loading)
    channels = config.out_channels // 2
    extra = config.in_channels - channels
    upsamples = extra == channels
    size = UPSAMPLER_SIZE if upsamples else BASE_SIZE
    schedule = UPSAMPLER if upsamples else BASE
    if not loading.says_noise:
        take("schedule", schedule)
    if options.prediction is None:
        take("prediction", "eps")
    if options.image_size is None:
        take("image_size", size)
    text_plan = plan_model(spoken, text_names, text)
    plan = plan_model(config, openai.names, rest)
    denoiser: UNet = loading.fill(plan)
    encoders = _encoders(loading, text_plan, spoken.vocabulary) if options.text_encoders else ()
    return Model(
        layout=NAME,
        denoiser=denoiser,
        text_encoders=encoders,
        schedule=loading.noise(schedule),
        prediction=options.prediction or "eps",
        guidance_scale=UPSAMPLER_GUIDANCE if upsamples else BASE_GUIDANCE,
        image_size=options.image_size or size,
        image_channels=channels,
        path=source.path,
        provenance={
            "facts": source.facts,
            **loading.assumed.provenance,
            **({"condition": UPSAMPLED if upsamples else MASKED} if extra else {}),
        },
    )


def _encoders(loading: Loading, plan: Plan, vocabulary: int) -> tuple[GLIDEEncoder, ...]:
    folders = loading.options.tokenizer
    if len(folders) > 1:
        raise ValueError(f"expected 1 tokenizer folder, got {len(folders)}")
    tokenizer = None
    if folders:
        tokenizer = text_encoders.read_tokenizer(folders[0], "GPT2Tokenizer")
        text_encoders.check_vocabulary(tokenizer, vocabulary)
    return (GLIDEEncoder(model=loading.fill(plan), tokenizer=tokenizer),)


LAYOUT = Layout(
    name=NAME,
    files=(("input_blocks.0.0.weight", "transformer_proj.weight", "token_embedding.weight"),),
    open=_open,
)
