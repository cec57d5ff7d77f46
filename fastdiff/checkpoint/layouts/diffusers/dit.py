"""diffusers' DiT, read as ours and written back: `DiTTransformer2DModel`.

It differs from the published code in two numbers that our config has: the timestep's frequencies
are 10000^(-i / 127) in place of 10000^(-i / 128), and the norm before an MLP has epsilon 1e-5. Each
of its blocks has embedders of timestep and class of its own; in files that were converted from the
published ones they are copies of each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.build import Layers, Place, Plan, check_names, plan_model, source_names
from fastdiff.checkpoint.layouts.diffusers.options import Options
from fastdiff.checkpoint.weights import Sources, Weights
from fastdiff.models.dit import DiT, DiTBlock, DiTConfig

NAME = "DiTTransformer2DModel"
OLD_NAME = "Transformer2DModel"
"""Name of the class in the published folders."""
ID2LABEL = "id2label"
"""Key of a DiTPipeline's model_index.json with the names of its classes, several for each."""
FREQUENCY_SHIFT, NORM_EPS = 1, 1e-5
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
"""Defaults of DiTTransformer2DModel. Those of the older class differ, but its files state all."""
FIXED: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
LAYERS: Layers = {
    DiTBlock: {
        "modulation": ("norm1.linear",),
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.out": ("attn1.to_out.0",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
    },
}
_EMBEDDERS = "transformer_blocks.{}.norm1.emb."
_COPY = re.compile(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.(.*)")


def config(data: Mapping[str, Any]) -> DiTConfig:
    """Our config for the config.json of a DiTTransformer2DModel, under its old name or its new.

    Raises:
        ValueError: another model, or an option that our DiT does not have.
    """
    options = Options(data)
    if options.class_name not in (NAME, OLD_NAME):
        raise ValueError(f"_class_name must be {NAME!r}, got {options.class_name!r:.60}")

    def get(name: str) -> Any:
        default = DEFAULTS[name] if options.class_name == NAME else None
        return options.get(name, default) if default is not None else options.require(name)

    for name, value in FIXED.items():
        if get(name) != value:
            raise options.fail(name, repr(value))
    options.get("norm_num_groups")  # there is no GroupNorm in it
    heads, channels = get("num_attention_heads"), get("in_channels")
    out_channels = options.get("out_channels", channels)
    if out_channels not in (channels, 2 * channels):
        raise options.fail("out_channels", f"{channels}, or {2 * channels} with a learned variance")
    made = DiTConfig(
        in_channels=channels,
        out_channels=out_channels,
        width=heads * get("attention_head_dim"),
        depth=get("num_layers"),
        num_heads=heads,
        patch_size=get("patch_size"),
        sample_size=get("sample_size"),
        num_classes=get("num_embeds_ada_norm"),
        null_class=True,
        learned_sigma=out_channels == 2 * channels,
        frequency_shift=FREQUENCY_SHIFT,
        mlp_norm_eps=options.get("norm_eps", NORM_EPS),
        dropout=options.get("dropout", 0.0),
    )
    options.finish()
    return made


def options(config: DiTConfig) -> dict[str, Any]:
    """The config.json of the diffusers model that computes the same.

    Raises:
        ValueError: DiTTransformer2DModel has no such architecture.
    """
    for name, expected in (
        ("frequency_shift", FREQUENCY_SHIFT),
        ("mlp_ratio", 4.0),
        ("null_class", True),
        ("out_channels", config.in_channels * (2 if config.learned_sigma else 1)),
    ):
        if (got := getattr(config, name)) != expected:
            raise ValueError(
                f"diffusers has no DiT with {name} {got!r}, expected {expected!r}; save a bundle "
                "instead"
            )
    return {
        "_class_name": NAME,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "dropout": config.dropout,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
        **FIXED,
    }


def first_names(table: Mapping[str, str]) -> tuple[str, ...]:
    """The first of each class's names. table: class -> names, separated by commas (ID2LABEL)."""
    return tuple(table[str(label)].partition(",")[0].strip() for label in range(len(table)))


def all_names(class_names: tuple[str, ...], known: Mapping[str, str] | None) -> dict[str, str]:
    """ID2LABEL for these classes. known: that of the file they came from, if it still fits."""
    if known is not None and first_names(known) == class_names:
        return dict(known)
    return {str(label): name for label, name in enumerate(class_names)}


def names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers' parameters); of the embedders those of the first block."""
    assert isinstance(model, DiT)
    return source_names(_places(model), LAYERS)


def _places(model: DiT) -> Iterator[Place]:
    embedders = _EMBEDDERS.format(0)
    yield "patch_embed", model.patch_embed, "pos_embed.proj"
    yield "time_embed.0", model.time_embed[0], f"{embedders}timestep_embedder.linear_1"
    yield "time_embed.2", model.time_embed[2], f"{embedders}timestep_embedder.linear_2"
    if model.config.num_classes is not None:
        yield "label_embed", model.label_embed, f"{embedders}class_embedder.embedding_table"
    for index, block in enumerate(model.blocks):
        yield f"blocks.{index}", block, f"transformer_blocks.{index}"
    yield "modulation_out", model.modulation_out, "proj_out_1"
    yield "linear_out", model.linear_out, "proj_out_2"


def plan(config: DiTConfig, weights: Weights) -> Plan:
    """The model for a file, checked as `plan_model` does; that the embedders of all blocks are
    equal is found when their numbers are read.

    Raises:
        ValueError: names or shapes do not fit.
    """
    copies = {key: _original(key) for key in weights.places if _COPY.fullmatch(key)}
    expected = set(copies_of(config))
    if odd := sorted(expected ^ copies.keys()):
        raise ValueError(
            f"{weights.path}: every block must have embedders of timestep and class, got "
            f"{len(odd)} too few or too many, {odd[0]:.80} for one; check that the config and the "
            "weights belong together"
        )
    for copy, original in copies.items():
        got, first = weights.places[copy].shape, weights.places.get(original)
        if first is None or got != first.shape:
            raise ValueError(
                f"{weights.path}: {copy} has shape {got}, expected that of {original}, "
                f"{None if first is None else first.shape}; check that the config and the weights "
                "belong together"
            )
    rest = weights.renamed({key: key for key in weights.places if key not in copies})
    planned = plan_model(config, names, rest)
    return Plan(
        planned.model, planned.sources, planned.weights, lambda: _check_copies(weights, copies)
    )


def _check_copies(weights: Weights, copies: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: a block embeds the timestep or the class in its own way.
    """
    first: dict[str, Tensor] = {}
    for copy, original in copies.items():
        if original not in first:
            first[original] = weights.tensor(original)
        if not torch.equal(weights.tensor(copy), first[original]):
            raise ValueError(_differ(f"{weights.path}: ", copy, original))


def _differ(file: str, copy: str, original: str) -> str:
    return (
        f"{file}{copy} must equal {original}: fastdiff's DiT embeds timestep and class once for "
        "all blocks, as the published models do; this one was trained by diffusers with different "
        "embedders in each block, and only diffusers can run it"
    )


def copies_of(config: DiTConfig) -> dict[str, str]:
    """Embedders of the later blocks -> those of the first."""
    layers = ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
    leaves = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    if config.num_classes is not None:
        leaves.append("class_embedder.embedding_table.weight")
    return {
        _EMBEDDERS.format(index) + leaf: _EMBEDDERS.format(0) + leaf
        for index in range(1, config.depth)
        for leaf in leaves
    }


def _original(copy: str) -> str:
    return _COPY.sub(lambda match: _EMBEDDERS.format(0) + match[1], copy)


def state_dict(model: DiT) -> dict[str, Tensor]:
    """Our weights under diffusers' names, views of ours."""
    ours, result = model.state_dict(), dict[str, Tensor]()
    for name, keys in names(model).items():
        result.update(zip(keys, ours[name].chunk(len(keys)), strict=True))
    return result | {copy: result[first] for copy, first in copies_of(model.config).items()}


def convert_state_dict(state: Mapping[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """diffusers' weights under our names, shaped for `model.load_state_dict`.

    Raises:
        ValueError: keys are unknown, missing or of the wrong shape, or the blocks' embedders
            differ.
    """
    copies = {key: _original(key) for key in state if _COPY.fullmatch(key)}
    for copy, original in copies.items():
        if original not in state or not torch.equal(state[copy], state[original]):
            raise ValueError(_differ("", copy, original))
    rest = {key: value for key, value in state.items() if key not in copies}
    sources = names(model)
    check_names(model, sources, {key: tuple(value.shape) for key, value in rest.items()})
    return {name: torch.cat([rest[key] for key in keys]) for name, keys in sources.items()}
