"""LoRA files, merged into a model's weights when it is loaded.

Hu et al. 2021 (arXiv 2106.09685): W' = W + s (alpha / r) B A, with A: (r, in) and B: (out, r). For
a convolution A is (r, in, kh, kw) and B (out, r, 1, 1). Two ways to name the matrices are read:

    kohya   lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha; the U-Net's
            layers have diffusers' names or (XL) CompVis'; text encoders lora_te_, lora_te1_, ...
    peft    unet.down_blocks.0....to_q.lora_A.weight, .lora_B.weight (and diffusers' older names);
            text_encoder., text_encoder_2.; alpha beside them or in the file's metadata

Merging costs nothing when sampling, and the weights' hash covers it. In half precision the sum is
formed in fp32 and rounded once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.layouts import openai
from fastdiff.checkpoint.layouts.diffusers import read as diffusers
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.weights import Weights, some
from fastdiff.models.layers import AttentionBlock
from fastdiff.models.unet import UNet

METADATA = "lora_adapter_metadata"
"""Key of a file's metadata under which diffusers writes peft's configs."""
_ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_KOHYA = {"lora_unet_": 0, "lora_te_": 1, "lora_te1_": 1, "lora_te2_": 2}
"""Prefix -> part: 0 the denoiser, 1 and 2 the text encoders."""
_PEFT = {"unet.": 0, "text_encoder.": 1, "text_encoder_2.": 2}
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a LoRA in Tucker form",
    ".oft_": "OFT",
}
"""Part of a name -> another method than LoRA, which is not supported."""


@dataclass(frozen=True)
class Target:
    """Where a layer of a file lies in a model: rows [start, stop) of a parameter."""

    parameter: Tensor
    start: int
    stop: int


@dataclass
class Pair:
    """The matrices of one layer."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def merge(model: Model, path: Path, scale: float = 1.0) -> Model:
    """Merge a LoRA file into a model's weights, in place; returns the model with its provenance.

    Args:
        model: with a U-Net; text encoders are changed too if the file has matrices for them.
        path: a .safetensors, .pt or .bin file.
        scale: s, the strength; a negative one removes what a merge of its absolute value added.

    Raises:
        ValueError: the file is no LoRA, is of another method, or does not fit the model.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a LoRA file")
    weights = open_weights(path)
    pairs, alphas = _pairs(weights), _alphas(weights)
    parts = _Parts(model)
    changes = []  # all are checked before the first one is made
    for (part, stem), pair in pairs.items():
        found = parts.find(part, stem, path)
        if found is not None:
            changes.append((found, *_matrices(weights, pair, found, alphas.get((part, stem)))))
    if not changes:
        raise ValueError(f"{path} has no matrices for the parts of this model; use another file")
    for target, down, up, factor in changes:
        _add(target, down, up, scale * factor)
    merged = [*model.provenance.get("lora", ()), f"{path} x {scale:g}"]
    return replace(model, provenance={**model.provenance, "lora": merged}, stored_hash="")


def read_spec(spec: str) -> tuple[Path, float]:
    """A file and its strength from PATH or PATH:STRENGTH.

    >>> read_spec("style.safetensors:0.8")
    (PosixPath('style.safetensors'), 0.8)

    Raises:
        ValueError: the strength is not finite.
    """
    place, _, number = spec.rpartition(":")
    if place and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return Path(place), float(number)
    return Path(spec), 1.0


def _pairs(weights: Weights) -> dict[tuple[int, str], Pair]:
    """(part, layer's name in the file) -> its matrices.

    Raises:
        ValueError: a name is not one of a LoRA's, or a matrix has no partner.
    """
    pairs: dict[tuple[int, str], Pair] = {}
    for key in weights.places:
        if other := next((what for mark, what in _OTHERS.items() if mark in key), None):
            raise ValueError(f"{weights.path} is {other} ({key}); fastdiff supports plain LoRA")
        end = next((end for end in _ENDS if key.endswith(end)), None)
        prefix = next((p for p in (*_KOHYA, *_PEFT) if key.startswith(p)), None)
        if end is None or prefix is None:
            raise ValueError(
                f"{weights.path}: {key} is no matrix of a LoRA with kohya's or peft's names; give "
                "a LoRA for Stable Diffusion"
            )
        part = _KOHYA[prefix] if prefix in _KOHYA else _PEFT[prefix]
        stem = key[len(prefix) : -len(end)]
        setattr(pairs.setdefault((part, stem), Pair()), _ENDS[end], key)
    if alone := [stem for (_, stem), pair in pairs.items() if not (pair.down and pair.up)]:
        raise ValueError(
            f"{weights.path}: layers without both matrices: {some(alone)}; download the file again"
        )
    return pairs


def _alphas(weights: Weights) -> dict[tuple[int, str], float]:
    """(part, layer) -> alpha of peft's configs in the metadata, for layers of the file."""
    text = weights.facts.get(METADATA)
    if text is None:
        return {}
    try:
        data = json.loads(text)
        found = {}
        for key in _pairs(weights):
            part, stem = key
            prefix = next(name for name, number in _PEFT.items() if number == part)
            if f"{prefix}lora_alpha" in data:
                pattern = data.get(f"{prefix}alpha_pattern") or {}
                own = [
                    v for name, v in pattern.items() if stem == name or stem.endswith("." + name)
                ]
                found[key] = float(own[0] if own else data[f"{prefix}lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{weights.path}: cannot read {METADATA} ({error}); remove it from the file"
        ) from error
    return found


class _Parts:
    """Finds the layers of a file in a model, by any of the names that they may have."""

    def __init__(self, model: Model) -> None:
        if not isinstance(model.denoiser, UNet):
            raise ValueError(
                f"a LoRA is for a U-Net, got {type(model.denoiser).__name__}; leave lora out"
            )
        self.encoders = [encoder.model for encoder in model.text_encoders]
        self.unet = dict(_unet_targets(model.denoiser))

    def find(self, part: int, stem: str, path: Path) -> Target | None:
        """The layer's target; None for a text encoder that was not loaded.

        Raises:
            ValueError: the model has no such layer.
        """
        if part == 0:
            found = self.unet.get(stem.removesuffix(".processor"), self.unet.get(stem))
        elif not self.encoders:
            return None
        elif part > len(self.encoders):
            raise ValueError(
                f"{path} has matrices for {part} text encoders, the model has "
                f"{len(self.encoders)}; use a LoRA for this kind of model"
            )
        else:
            found = dict(_text_targets(self.encoders[part - 1])).get(stem)
        if found is None:
            raise ValueError(
                f"{path} changes the layer {stem}, which this model does not have; use a LoRA that "
                "was trained for this kind of model"
            )
        return found


def _unet_targets(unet: UNet) -> Iterator[tuple[str, Target]]:
    """Name -> target: diffusers' names with dots and underscores, CompVis' with underscores."""
    parameters = dict(unet.named_parameters())
    legacy = {
        name
        for name, block in unet.named_modules()
        if isinstance(block, AttentionBlock) and block.qkv_order == "legacy"
    }
    for sources, dotted in ((diffusers.names(unet), True), (openai.names(unet), False)):
        for name, keys in sources.items():
            if not name.endswith(".weight") or name.rpartition(".qkv.")[0] in legacy:
                continue
            for stem, target in _rows(parameters[name], keys):
                yield stem.replace(".", "_"), target
                if dotted:
                    yield stem, target


def _rows(parameter: Tensor, keys: tuple[str, ...]) -> Iterator[tuple[str, Target]]:
    step = parameter.shape[0] // len(keys)
    for index, key in enumerate(keys):
        yield key.removesuffix(".weight"), Target(parameter, index * step, (index + 1) * step)


def _text_targets(encoder: nn.Module) -> Iterator[tuple[str, Target]]:
    for name, parameter in encoder.named_parameters():
        if name.endswith(".weight"):
            stem = name.removeprefix("text_model.").removesuffix(".weight")
            target = Target(parameter, 0, parameter.shape[0])
            for full in (stem, f"text_model.{stem}"):
                yield full, target
                yield full.replace(".", "_"), target


def _matrices(
    weights: Weights, pair: Pair, target: Target, alpha: float | None
) -> tuple[Tensor, Tensor, float]:
    """A: (r, in), B: (out, r) and alpha / r.

    Raises:
        ValueError: they do not have the layer's shape.
    """
    assert pair.down is not None
    assert pair.up is not None
    down, up = (weights.tensor(key).flatten(1) for key in (pair.down, pair.up))
    rows, columns = target.stop - target.start, target.parameter[0].numel()
    rank = down.shape[0]
    if up.shape != (rows, rank) or down.shape[1] != columns:
        raise ValueError(
            f"{weights.path}: {pair.up} and {pair.down} make a matrix of {up.shape[0]} x "
            f"{down.shape[1]}, the layer's is {rows} x {columns}; use a LoRA that was trained for "
            "this kind of model"
        )
    if pair.alpha is not None:
        alpha = float(weights.tensor(pair.alpha))
    return down, up, (rank if alpha is None else alpha) / rank


def _add(target: Target, down: Tensor, up: Tensor, factor: float) -> None:
    with torch.no_grad():
        own = target.parameter[target.start : target.stop]
        wide = torch.promote_types(own.dtype, torch.float32)
        change = factor * (up.to(own.device, wide) @ down.to(own.device, wide))
        own.copy_(own.to(wide) + change.view_as(own))


def merge_all(model: Model, specs: tuple[str, ...]) -> Model:
    """Merge files given as PATH or PATH:STRENGTH, in their order."""
    for spec in specs:
        path, scale = read_spec(spec)
        model = merge(model, path, scale)
    return model
