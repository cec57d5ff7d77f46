"""The published files of DiT: a plain state dict.

Peebles & Xie 2023 (arXiv 2212.09748). Config and size are read off names and shapes; heads and
noise, which they do not tell, are those of the published models. SiT (Ma et al. 2024) has the same
names and shapes and other predictions: give what it was trained with, where fastdiff has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint.build import Layers, Place, Plan, plan_model, source_names
from fastdiff.checkpoint.layouts.openai import shape_of
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.weights import Shapes, Sources, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.dit import DiT, DiTBlock, DiTConfig, position_table

NAME = "dit"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width of a token -> heads, of the published sizes S, B, L and XL."""
SCHEDULE = ScheduleConfig()  # linear, 1e-4 to 0.02, 1000 steps: section 4
SCALE = 0.18215  # of Stable Diffusion's autoencoder, whose latents all published models make
LATENT_CHANNELS = 4
POSITIONS = "pos_embed"
LAYERS: Layers = {
    DiTBlock: {
        "modulation": ("adaLN_modulation.1",),
        "attn.out": ("attn.proj",),
    },
}


def names(model: nn.Module) -> Sources:
    """(our parameter -> the published one); the table of positions is fixed and no parameter."""
    assert isinstance(model, DiT)
    return source_names(_places(model), LAYERS)


def _places(model: DiT) -> Iterator[Place]:
    yield "patch_embed", model.patch_embed, "x_embedder.proj"
    yield "time_embed.0", model.time_embed[0], "t_embedder.mlp.0"
    yield "time_embed.2", model.time_embed[2], "t_embedder.mlp.2"
    if model.config.num_classes is not None:
        yield "label_embed", model.label_embed, "y_embedder.embedding_table"
    for index, block in enumerate(model.blocks):
        yield f"blocks.{index}", block, f"blocks.{index}"
    yield "modulation_out", model.modulation_out, "final_layer.adaLN_modulation.1"
    yield "linear_out", model.linear_out, "final_layer.linear"


def config(shapes: Shapes, loading: Loading) -> DiTConfig:
    """Our config for the names and shapes of a DiT.

    Raises:
        ValueError: they do not make a DiT.
    """
    width, in_channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    out = shape_of(shapes, "final_layer.linear.weight", 2)[0]
    tokens = shape_of(shapes, POSITIONS, 3)[1]
    grid = math.isqrt(tokens)
    channels, left = divmod(out, patch * patch)
    if grid * grid != tokens or left or channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"expected a DiT, got {tokens} positions, and {out} numbers out for a patch of "
            f"{patch} x {patch} x {in_channels}; fastdiff has no such model"
        )
    hidden = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    classes, null = label_rows(shapes, "y_embedder.embedding_table.weight", loading, null=True)
    return DiTConfig(
        in_channels=in_channels,
        out_channels=channels,
        width=width,
        depth=count_blocks(shapes, "blocks."),
        num_heads=heads(width, HEADS, loading),
        patch_size=patch,
        sample_size=grid * patch,
        mlp_ratio=hidden / width,
        num_classes=classes,
        null_class=null,
        learned_sigma=channels == 2 * in_channels,
    )


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are under a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


def heads(width: int, published: dict[int, int], loading: Loading) -> int:
    """Heads of every attention: as the caller says, as published, or of 64 channels.

    Raises:
        ValueError: what the caller says does not divide the width.
    """
    options = loading.options
    if options.head_dim is not None:
        if width % options.head_dim:
            raise ValueError(
                f"head_dim must divide the width of a token, {width}, got {options.head_dim}"
            )
        return width // options.head_dim
    if options.num_heads is not None:
        return options.num_heads
    known = published.get(width)
    guess = known or max(1, width // 64)
    choices = ", ".join(str(n) for n in (1, 2, 4, 6, 8, 12, 16) if width % n == 0)
    return int(loading.assumed.take("num_heads", guess, None if known else choices))


def label_rows(
    shapes: Shapes, key: str, loading: Loading, *, null: bool
) -> tuple[int | None, bool]:
    """Number of classes, and whether the last row is "no class"; `null` unless an option says."""
    if key not in shapes:
        return None, False
    rows = shape_of(shapes, key, 2)[0]
    has_null = loading.options.null_class
    if has_null is None:
        published = rows in (1000, 1001)
        has_null = bool(
            loading.assumed.take("null_class", null, None if published else "True, False")
        )
    return rows - has_null, has_null


def latents(model: DiTConfig | Any, loading: Loading, schedule: ScheduleConfig) -> dict[str, Any]:
    """Fields of `Model` that a file of this kind does not state, and that are taken as published.

    A file of a vision transformer holds no autoencoder: of four channels it makes latents.
    """
    options, take = loading.options, loading.assumed.take
    provenance: dict[str, Any] = {}
    if not loading.says_noise:
        take("schedule", schedule)
    if options.prediction is None:
        take("prediction", "eps")
    fields: dict[str, Any] = {
        "schedule": loading.noise(schedule),
        "prediction": options.prediction or "eps",
        "image_size": options.image_size,
    }
    if model.in_channels == LATENT_CHANNELS:
        provenance["latent size"] = model.sample_size
        scale = options.scale_factor or take("scale_factor", SCALE)
        fields["scale_factor"] = scale
    else:
        fields["image_size"] = options.image_size or model.sample_size
    return {**fields, "provenance": provenance}


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    made = config(source.shapes, loading)
    rest = source.renamed({key: key for key in source.places if key != POSITIONS})
    planned = plan_model(made, names, rest)
    known = latents(made, loading, SCHEDULE)
    plan = Plan(
        planned.model, planned.sources, planned.weights, lambda: _check_positions(source, made)
    )
    denoiser: DiT = loading.fill(plan)
    known["provenance"] |= {"facts": source.facts, **loading.assumed.provenance}
    return Model(
        layout=NAME,
        denoiser=denoiser,
        image_channels=image_channels(denoiser, None),
        path=source.path,
        **known,
    )


def _check_positions(weights: Weights, made: DiTConfig) -> None:
    """
    Raises:
        ValueError: the file's table of positions is not the fixed one.
    """
    grid = made.sample_size // made.patch_size
    fixed = position_table(made.width, (grid, grid), grid, torch.device("cpu"))
    found = weights.tensor(POSITIONS)
    if found.shape[1:] != fixed.shape or not torch.allclose(
        found[0].float(), fixed, rtol=0, atol=1e-2 if found.element_size() < 4 else 1e-5
    ):
        raise ValueError(
            f"{weights.path}: {POSITIONS} must be the fixed table of sinusoids, which fastdiff's "
            "DiT computes; this one was trained, or has another order"
        )


LAYOUT = Layout(
    name=NAME,
    files=(
        (
            "x_embedder.proj.weight",
            "t_embedder.mlp.0.weight",
            "blocks.0.adaLN_modulation.1.weight",
            "final_layer.adaLN_modulation.1.weight",
        ),
    ),
    open=_open,
)
