"""OpenAI's noisy classifiers: the `*_classifier.pt` files of guided-diffusion.

Dhariwal & Nichol 2021 (arXiv 2105.05233). The blocks have the names of the U-Net's
(`fastdiff.checkpoint.layouts.openai`), and `out` is the pool. The config is inferred from names and
shapes; schedule and image size come from the table of published models or from `LoadOptions`.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from torch import nn

from fastdiff.checkpoint.build import Layers, Place, plan_model, source_names
from fastdiff.checkpoint.layouts.openai import (
    COSINE,
    LAYERS,
    LINEAR,
    shape_of,
    stage_places,
)
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.weights import Shapes, Sources, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.classifier import AttentionPool, Classifier, ClassifierConfig, Pool
from fastdiff.names import ScheduleKind

NAME = "guided-diffusion-classifier"
HEAD_DIM = 64  # of all of OpenAI's classifiers
Key = tuple[int, tuple[int, ...], int]
PUBLISHED: dict[Key, tuple[int, ScheduleConfig]] = {
    # width, channel_mult and residual blocks -> image size and schedule, as in the README
    (128, (1, 2, 3, 4), 4): (64, COSINE),
    (128, (1, 1, 2, 3, 4), 2): (128, LINEAR),
    (128, (1, 1, 2, 2, 4, 4), 2): (256, LINEAR),
    (64, (1, 2, 2, 4, 4, 8, 8), 2): (512, LINEAR),
}
_LAYERS: Layers = {**LAYERS, AttentionPool: {"qkv": ("qkv_proj",), "proj": ("c_proj",)}}
_POOLS: dict[Pool, dict[str, str]] = {  # our layers -> theirs
    "adaptive": {"norm_out": "out.0", "linear_out": "out.3"},
    "attention": {"norm_out": "out.0"},
    "spatial": {"hidden": "out.0", "linear_out": "out.2"},
    "spatial_v2": {"hidden": "out.0", "norm_out": "out.1", "linear_out": "out.3"},
}


def names(model: nn.Module) -> Sources:
    """(our parameter -> OpenAI's parameters) of a classifier."""
    assert isinstance(model, Classifier)
    places: list[Place] = [
        (f"time_embed.{layer}", model.time_embed[layer], f"time_embed.{layer}") for layer in (0, 2)
    ]
    places += stage_places(model, ("input_blocks", "middle_block"))
    places += [(o, getattr(model, o), t) for o, t in _POOLS[model.config.pool].items()]
    if model.config.pool == "attention":
        places.append(("pool", model.pool, "out.2"))
    sources = source_names(places, _LAYERS)
    if model.config.pool == "attention":
        sources["pool.positions"] = ("out.2.positional_embedding",)
    return sources


def pool_of(shapes: Shapes) -> Pool:
    """How a classifier pools, from the shapes of `out`.

    Raises:
        ValueError: in none of the four published ways.
    """
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if "out.1.weight" in shapes:
        return "spatial_v2"
    return "adaptive" if len(shapes.get("out.0.weight", ())) == 1 else "spatial"


def _levels(shapes: Shapes) -> tuple[list[int], list[int], int]:
    """Width and attention depth of each level, and the residual blocks per level.

    With residual blocks that change the resolution, names do not tell where a level ends. The
    blocks of one level have one width and all or none of them attention, and the block between two
    levels has no attention, which leaves one choice for every published model.

    Raises:
        ValueError: no choice, or more than one.
    """
    numbers = {int(key.split(".")[1]) for key in shapes if re.match(r"input_blocks\.\d+\.", key)}
    last = max(numbers)
    convolutions = sorted(n for n in numbers if f"input_blocks.{n}.0.op.weight" in shapes)
    attends = [int(f"input_blocks.{n}.1.qkv.weight" in shapes) for n in range(last + 1)]
    widths = [_width(shapes, n) for n in range(last + 1)]
    found = []
    for levels in range(1, last + 2):
        blocks, rest = divmod(last + 1, levels)
        blocks -= 1
        between = [level * (blocks + 1) for level in range(1, levels)]
        if rest or blocks < 1 or (convolutions and convolutions != between):
            continue
        spans = [range(1 + i * (blocks + 1), (i + 1) * (blocks + 1)) for i in range(levels)]
        same = all(len({(widths[n], attends[n]) for n in span}) == 1 for span in spans)
        if same and all(not attends[n] and widths[n] in (None, widths[n - 1]) for n in between):
            found.append(([widths[s[0]] for s in spans], [attends[s[0]] for s in spans], blocks))
    if len(found) != 1:
        choices = " or ".join(f"{len(w)} levels of {b} blocks" for w, _, b in found)
        raise ValueError(
            f"expected a classifier of equal levels, got {last + 1} input blocks that form "
            f"{choices or 'none'}; fastdiff does not support this model"
        )
    return found[0]  # type: ignore[return-value]


def _width(shapes: Shapes, number: int) -> int | None:
    """Channels of an input block's result; None for a convolution between levels."""
    shape = shapes.get(f"input_blocks.{number}.0.in_layers.2.weight")
    return None if shape is None else shape[0]


def classifier_config(shapes: Shapes, loading: Loading) -> ClassifierConfig:
    """Infer our config from the names and shapes of a classifier, and its options.

    Raises:
        ValueError: the names do not describe a classifier that fastdiff supports.
    """
    options = loading.options
    widths, depths, blocks = _levels(shapes)
    width, in_channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[:2]
    time_width = shape_of(shapes, "time_embed.0.weight", 2)[1]
    if any(level is None or level % width for level in widths):
        raise ValueError(
            f"the channels of every level must be a multiple of {width}, got {widths}; fastdiff "
            "does not support this model"
        )
    pool = pool_of(shapes)
    side = options.image_size
    if pool == "attention":
        places = shape_of(shapes, "out.2.positional_embedding", 2)[1] - 1
        side = round(places**0.5) * 2 ** (len(widths) - 1)
        if options.image_size not in (None, side):
            raise ValueError(
                f"image_size must be {side} for these positions, got {options.image_size}; leave "
                "it out"
            )
    last = {"adaptive": "out.3", "attention": "out.2.c_proj", "spatial": "out.2"}
    emb = shape_of(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)
    heads: dict[str, Any] = {"num_heads": options.num_heads, "head_dim": options.head_dim}
    if options.num_heads is None and options.head_dim is None:
        heads["head_dim"] = HEAD_DIM
    return ClassifierConfig(
        in_channels=in_channels,
        num_classes=shapes.get(f"{last.get(pool, 'out.3')}.bias", (0,))[0],
        model_channels=width,
        channel_mult=tuple(level // width for level in widths),
        num_res_blocks=blocks,
        attention_depth=tuple(depths),
        pool=pool,
        sample_size=side,
        scale_shift_norm=emb[0] == 2 * widths[0],
        resblock_updown=not any(key.endswith(".0.op.weight") for key in shapes),
        qkv_order=options.qkv_order or "legacy",
        time_channels=None if time_width == width else time_width,
        norm_groups=options.norm_groups,
        **heads,
    )


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    config, options, take = (
        classifier_config(source.shapes, loading),
        loading.options,
        loading.assumed.take,
    )
    key = config.model_channels, config.channel_mult, config.num_res_blocks
    size, schedule = PUBLISHED.get(key, (None, LINEAR))
    unknown = size is None
    if options.num_heads is None and options.head_dim is None:
        take("head_dim", HEAD_DIM, "16, 32, 64, or num_heads" if unknown else None)
    if options.qkv_order is None:
        take("qkv_order", config.qkv_order, "legacy, new" if unknown else None)
    if not loading.says_noise:
        take("schedule", schedule, ", ".join(get_args(ScheduleKind)) if unknown else None)
    if config.pool == "attention":
        size = config.sample_size
    elif options.image_size is None and size is not None:
        take("image_size", size)
    classifier: Classifier = loading.fill(plan_model(config, names, source))
    return Model(
        layout=NAME,
        classifier=classifier,
        schedule=loading.noise(schedule),
        image_size=options.image_size or size,
        image_channels=config.in_channels,
        path=source.path,
        provenance={"facts": source.facts, **loading.assumed.provenance},
    )


_ENCODER = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
LAYOUT = Layout(
    name=NAME,
    files=(  # a U-Net has these too, and its own layout comes first
        (*_ENCODER, "out.2.positional_embedding"),
        (*_ENCODER, "out.0.weight", "out.2.weight"),
        (*_ENCODER, "out.0.weight", "out.3.weight"),
    ),
    open=_open,
)
